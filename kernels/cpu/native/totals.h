// The last steps of every kernel: a group's sums with its scales, a strip's sums to y.
#pragma once

#include "wide.h"

namespace {

template <int M>
struct Totals {
  Floats sums[M];
  Totals() {
    for (int m = 0; m < M; ++m) sums[m] = all(0);
  }
  // Of codes less `base`, which is mid or 0.
  INLINE_MEMBER void add_group(const Image* w, const Inputs& x, int64_t strip, int64_t g, const Floats (&products)[M], int base) {
    if (w->per_ic) {
      for (int m = 0; m < M; ++m) sums[m] = add(products[m], all(x.sums[m * x.sums_stride]));
      return;
    }
    const int64_t at = (strip * w->groups + g) * STRIP;
    const Floats scales = load_float16(scales_of(w) + at);
    if (w->symmetric && base) {
      for (int m = 0; m < M; ++m) sums[m] = multiply_add(products[m], scales, sums[m]);
      return;
    }
    const Floats offsets = load_offsets(w, at, base);
    for (int m = 0; m < M; ++m) {
      const Floats group = multiply_add(offsets, x.sums[m * x.sums_stride + g], products[m]);
      sums[m] = multiply_add(group, scales, sums[m]);
    }
  }
  // int8 products are of whole codes: mid leaves through the sums, which here are those of the rounded x.
  INLINE_MEMBER void add_int8_group(const Image* w, const Inputs& x, int64_t strip, int64_t g, Floats (&products)[M]) {
    if (w->per_ic) {  // the driver has put what the zeros add into the sums
      for (int m = 0; m < M; ++m) sums[m] = add(products[m], all(-w->mid * x.sums[m * x.sums_stride]));
      return;
    }
    for (int m = 0; m < M; ++m) products[m] = add(products[m], all(-w->mid * x.sums[m * x.sums_stride + g]));
    add_group(w, x, strip, g, products, w->mid);
  }
  INLINE_MEMBER void store(const Image* w, const Outputs& y, int64_t strip) {
    for (int m = 0; m < M && m < y.rows; ++m) store_row(y, m, first_row(w, strip), rows_in(w, strip), sums[m]);
  }
};

}  // namespace
