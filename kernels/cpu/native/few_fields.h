// The product of strips with up to six rows of float activations, by fields (fields.h). Inputs::rows as fit_fields
// leaves them; Inputs::sums those of whole codes.
#pragma once

#include "fields.h"
#include "totals.h"

namespace {

// Strips beside each other: what ends a group, a quarter of the time where it has 64 inputs, then overlaps. Two strips of
// bytes take more registers than there are.
constexpr int side_by_side(int bits, int m) { return LANES == 8 && m == 1 && bits <= 4 ? 2 : 1; }
// Sums of a row that are added up at a group's end, eight registers of them: an addition takes 4 cycles, and two start in
// each. The same for a strip that is left over, or its sums would depend on how strips are divided among threads.
constexpr int chains_of(int bits, int m) {
  const int most = 8 / PARTS / (m * side_by_side(bits, m));
  return most > 1 ? most : 1;
}

template <int BITS, int M, int SIDE>
INLINE void strips_of_fields(const Image* w, const Inputs& x, const Outputs& y, int64_t strip) {
  constexpr int CHAINS = chains_of(BITS, M);
  const float* rows[M];  // one pointer each, as compilers keep one for every input of every row otherwise
  unrolled<M>([&](int m) INLINE_LAMBDA { rows[m] = static_cast<const float*>(x.rows) + m * x.stride; });
  const uint32_t* block[SIDE];
  for (int s = 0; s < SIDE; ++s) block[s] = codes_of(w, strip + s);
  const int64_t groups = w->per_ic ? 1 : w->groups;
  Totals<M> totals[SIDE];
  for (int64_t g = 0; g < groups; ++g) {
    Floats chains[SIDE][CHAINS][M];
    for (auto& side : chains)
      for (auto& chain : side)
        for (Floats& sum : chain) sum = all(0);
    const int64_t end = w->per_ic ? w->blocks : blocks_before(w, g + 1);
    for (int64_t b = blocks_before(w, g); b < end; ++b) {
      for_each_field<BITS, SIDE>(block, [&](int n, int k, int s, const Floats& codes) INLINE_LAMBDA {
        unrolled<M>([&](int m) INLINE_LAMBDA {
          Floats& sum = chains[s][n % CHAINS][m];
          sum = multiply_add(codes, rows[m][k], sum);
        });
      });
      for (int s = 0; s < SIDE; ++s) block[s] += BITS * STRIP;
      unrolled<M>([&](int m) INLINE_LAMBDA { rows[m] += BLOCK; });
    }
    for (int s = 0; s < SIDE; ++s) {
      for (int c = 1; c < CHAINS; ++c)
        for (int m = 0; m < M; ++m) chains[s][0][m] = add(chains[s][0][m], chains[s][c][m]);
      totals[s].add_group(w, x, strip + s, g, chains[s][0], 0);
    }
  }
  for (int s = 0; s < SIDE; ++s) totals[s].store(w, y, strip + s);
}

template <int BITS, int M>
void multiply_fields_of(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  constexpr int SIDE = side_by_side(BITS, M);
  int64_t strip = from;
  for (; strip + SIDE <= to; strip += SIDE) strips_of_fields<BITS, M, SIDE>(w, x, y, strip);
  for (; strip < to; ++strip) strips_of_fields<BITS, M, 1>(w, x, y, strip);
}

template <int BITS>
void multiply_fields_bits(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  if (x.m == 1) return multiply_fields_of<BITS, 1>(w, x, y, from, to);
  if (x.m == 2) return multiply_fields_of<BITS, 2>(w, x, y, from, to);
  if constexpr (LARGEST_TILE >= 4)
    if (x.m == 4) return multiply_fields_of<BITS, 4>(w, x, y, from, to);
  if constexpr (LARGEST_TILE == 6) multiply_fields_of<BITS, 6>(w, x, y, from, to);
}

void multiply_fields(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  with_bits(w->bits, [&](auto bits) { multiply_fields_bits<bits>(w, x, y, from, to); });
}

}  // namespace
