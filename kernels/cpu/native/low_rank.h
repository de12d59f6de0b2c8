// The low-rank addition b (a x) of one row. Included after wide.h, once for each instruction set.
#pragma once

#include "wide.h"

namespace {

INLINE float sum_of(const Floats& values) {
  float lanes[STRIP], sum = 0;
  store_floats(values, lanes);
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

// Outputs of a strip within [from, to) of ROWS rows: sums of their own for more rows, or for every fourth rank of one.
template <int ROWS>
INLINE void strip_of_b(const Weight* w, const float* inner, Floats start, int64_t strip, int64_t from, int64_t to, float* added,
                       int64_t n) {
  constexpr int CHAINS = ROWS == 1 ? 4 : 1;
  const uint16_t* b = w->low_rank_b + strip * w->rank * STRIP;
  Floats sums[ROWS][CHAINS];
  for (auto& row : sums)
    for (int c = 0; c < CHAINS; ++c) row[c] = c ? all(0) : start;
  const auto step = [&](int64_t r, int c) INLINE_LAMBDA {
    const Floats factors = load_float16(b + r * STRIP);
    unrolled<ROWS>([&](int i) INLINE_LAMBDA { sums[i][c] = multiply_add(factors, inner[i * w->rank + r], sums[i][c]); });
  };
  int64_t r = 0;
  for (; r + CHAINS <= w->rank; r += CHAINS) unrolled<CHAINS>([&](int c) INLINE_LAMBDA { step(r + c, c); });
  for (; r < w->rank; ++r) step(r, 0);
  const int64_t first = strip * STRIP > from ? strip * STRIP : from, end = strip * STRIP + STRIP < to ? strip * STRIP + STRIP : to;
  for (int i = 0; i < ROWS; ++i) {
    for (int c = 1; c < CHAINS; ++c) sums[i][0] = add(sums[i][0], sums[i][c]);
    float lanes[STRIP];
    store_floats(sums[i][0], lanes);
    __builtin_memcpy(added + i * n + first, lanes + (first - strip * STRIP), static_cast<size_t>(4 * (end - first)));
  }
}

void add_times_b(const Weight* w, const float* inner, const Outputs& y, int64_t from, int64_t to, float* added) {
  const int64_t n = y.n;
  for (int64_t strip = from / STRIP; strip * STRIP < to; ++strip) {
    float bias[STRIP] = {};
    for (int64_t i = 0; y.bias && i < STRIP && strip * STRIP + i < n; ++i)
      bias[i] = load_as_float(y.bias, y.bias_type, strip * STRIP + i);
    const Floats start = load_floats(bias);
    int row = 0;
    for (; row + 4 <= y.rows; row += 4) strip_of_b<4>(w, inner + row * w->rank, start, strip, from, to, added + row * n, n);
    for (; row < y.rows; ++row) strip_of_b<1>(w, inner + row * w->rank, start, strip, from, to, added + row * n, n);
  }
}

}  // namespace
