// The low-rank addition b (a x) of one row. Included after wide.h, once for each instruction set.
#pragma once

#include "wide.h"

namespace {

INLINE float sum_of(const Floats& values) {
  float lanes[STRIP], sum = 0;
  __builtin_memcpy(lanes, &values, sizeof lanes);
  for (float lane : lanes) sum += lane;
  return sum;
}

// Rows [first, first + ROWS) of a times x.
template <int ROWS>
INLINE void times_rows_of_a(const uint16_t* a, int64_t k, const void* x, Type type, float* inner) {
  const size_t size = type == FLOAT32 ? 4 : 2;
  const char* from = static_cast<const char*>(x);
  Floats sums[ROWS];
  for (Floats& sum : sums) sum = all(0);
  int64_t i = 0;
  for (; i + STRIP <= k; i += STRIP) {
    const Floats values = load_from(type, from + static_cast<size_t>(i) * size);
    unrolled<ROWS>([&](int r) INLINE_LAMBDA { sums[r] = multiply_add(load_float16(a + r * k + i), values, sums[r]); });
  }
  if (i < k) {
    char last[4 * STRIP] = {};
    __builtin_memcpy(last, from + static_cast<size_t>(i) * size, static_cast<size_t>(k - i) * size);
    const Floats values = load_from(type, last);
    for (int r = 0; r < ROWS; ++r) {
      uint16_t factors[STRIP] = {};
      __builtin_memcpy(factors, a + r * k + i, static_cast<size_t>(k - i) * 2);
      sums[r] = multiply_add(load_float16(factors), values, sums[r]);
    }
  }
  for (int r = 0; r < ROWS; ++r) inner[r] = sum_of(sums[r]);
}

void times_a(const Weight* w, int64_t k, const void* x, Type type, float* inner) {
  int64_t r = 0;
  for (; r + 4 <= w->rank; r += 4) times_rows_of_a<4>(w->low_rank_a + r * k, k, x, type, inner + r);
  for (; r < w->rank; ++r) times_rows_of_a<1>(w->low_rank_a + r * k, k, x, type, inner + r);
}

void add_times_b(const Weight* w, const float* inner, const void* bias, Type bias_type, int64_t from, int64_t to, float* added) {
  for (int64_t strip = from / STRIP; strip * STRIP < to; ++strip) {
    const uint16_t* b = w->low_rank_b + strip * w->rank * STRIP;
    Floats sums = all(0);
    for (int64_t r = 0; r < w->rank; ++r) sums = multiply_add(load_float16(b + r * STRIP), inner[r], sums);
    float lanes[STRIP];
    __builtin_memcpy(lanes, &sums, sizeof lanes);
    for (int i = 0; i < STRIP; ++i) {
      const int64_t n = strip * STRIP + i;
      if (n >= from && n < to) added[n] = lanes[i] + (bias ? load_as_float(bias, bias_type, n) : 0);
    }
  }
}

}  // namespace
