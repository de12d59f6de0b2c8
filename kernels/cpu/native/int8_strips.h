// The product of strips with int8 activations. Included after sums_of_block, which says how an instruction set multiplies a
// block: template <int BITS, int M> void sums_of_block(const uint32_t* block, const int8_t* x, int64_t stride, Floats (&sums)[M]),
// for whole codes and M rows of x in the order of quad_input, `stride` apart.
#pragma once

#include "totals.h"

namespace {

template <int BITS, int M>
void multiply_strips_int8(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  const int64_t groups = w->per_ic ? 1 : w->groups;
  for (int64_t strip = from; strip < to; ++strip) {
    const uint32_t* block = codes_of(w, strip);
    Totals<M> totals;
    for (int64_t g = 0; g < groups; ++g) {
      Floats products[M];
      for (Floats& sum : products) sum = all(0);
      const int64_t end = w->per_ic ? w->blocks : blocks_before(w, g + 1);
      for (int64_t b = blocks_before(w, g); b < end; ++b, block += BITS * STRIP) {
        Floats sums[M];
        sums_of_block<BITS>(block, static_cast<const int8_t*>(x.rows) + b * BLOCK, x.stride, sums);
        unrolled<M>([&](int m) INLINE_LAMBDA {
          products[m] = multiply_add(sums[m], x.scales[m * w->blocks + b], products[m]);
        });
      }
      totals.add_int8_group(w, x, strip, g, products);
    }
    totals.store(w, y, strip);
  }
}

template <int BITS>
void multiply_bits_int8(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  switch (x.m) {
    case 1: return multiply_strips_int8<BITS, 1>(w, x, y, from, to);
    case 2: return multiply_strips_int8<BITS, 2>(w, x, y, from, to);
    case 4: return multiply_strips_int8<BITS, 4>(w, x, y, from, to);
    default: return multiply_strips_int8<BITS, LARGEST_TILE>(w, x, y, from, to);
  }
}

}  // namespace
