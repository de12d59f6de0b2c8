// Rows of x times a strip of weights made floats. Included after wide.h, once for each instruction set.
#pragma once

#include "wide.h"

namespace {

// Rows of x at once: with the registers of a strip as many sums as 16 registers leave room for. Of 32 registers eight sums
// take every cycle's product, whose sum takes four.
constexpr int ABREAST = LANES == 16 ? 8 : LANES == 8 ? 6 : 3;

// sums [ROWS][16] += ROWS rows of x times `inputs` inputs of weights [inputs][16]. CHAINS: sums of every other input, and so
// on, where there are fewer than the eight registers of sums that do not wait for each other's four cycles.
template <int ROWS>
__attribute__((noinline)) void add_inputs(const float* x, int64_t stride, const float* weights, int64_t inputs, float* sums,
                                          bool first) {
  constexpr int CHAINS = ROWS * PARTS >= 8 ? 1 : ROWS * PARTS >= 3 ? 2 : 4;
  const float* rows[ROWS];
  Floats own[CHAINS][ROWS];
  unrolled<ROWS>([&](int m) INLINE_LAMBDA {
    rows[m] = x + m * stride;
    own[0][m] = first ? all(0) : load_floats(sums + m * STRIP);
    for (int c = 1; c < CHAINS; ++c) own[c][m] = all(0);
  });
  const auto step = [&](int64_t k, int c) INLINE_LAMBDA {
    const Floats outputs = load_floats(weights + k * STRIP);
    unrolled<ROWS>([&](int m) INLINE_LAMBDA { own[c][m] = multiply_add(outputs, rows[m][k], own[c][m]); });
  };
  int64_t k = 0;
  for (; k + 4 <= inputs; k += 4) unrolled<4>([&](auto i) INLINE_LAMBDA { step(k + i, i % CHAINS); });
  for (; k < inputs; ++k) step(k, 0);
  unrolled<ROWS>([&](int m) INLINE_LAMBDA {
    for (int c = 1; c < CHAINS; ++c) own[0][m] = add(own[0][m], own[c][m]);
    store_floats(own[0][m], sums + m * STRIP);
  });
}

// The same of 1 to ABREAST rows.
template <int ROWS = ABREAST>
void add_rows(int rows, const float* x, int64_t stride, const float* weights, int64_t inputs, float* sums, bool first) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return add_rows<ROWS - 1>(rows, x, stride, weights, inputs, sums, first);
  add_inputs<ROWS>(x, stride, weights, inputs, sums, first);
}

// The same of any number of rows, in even groups.
INLINE void add_all_rows(int64_t count, const float* x, int64_t stride, const float* weights, int64_t inputs, float* sums,
                         bool first) {
  const int64_t tiles = (count + ABREAST - 1) / ABREAST;
  for (int64_t t = 0, row = 0; t < tiles; ++t) {
    const int rows = static_cast<int>((count - row + tiles - t - 1) / (tiles - t));
    add_rows(rows, x + row * stride, stride, weights, inputs, sums + row * STRIP, first);
    row += rows;
  }
}

}  // namespace
