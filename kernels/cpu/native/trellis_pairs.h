// Products of a few rows of bfloat16 with trellis codes by dot products: integers of two inputs side by side, which are
// exact in bfloat16. Included by avx512_bf16.cpp.
#pragma once

#include "trellis_tiles.h"

namespace {

// bfloat16 of two integers of each of sixteen rows: the upper halves of their floats.
INLINE __m512i pair_of(const Floats& even, const Floats& odd) {
  const __m512i low = _mm512_srli_epi32(reinterpret_cast<__m512i>(even.part[0]), 16);
  const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
  return _mm512_ternarylogic_epi32(upper, reinterpret_cast<__m512i>(odd.part[0]), low, 0xea);  // upper & odd | low
}

// Integers of columns [from, from + count) of a tile: [strip][(count + 1) / 2][16] pairs, the last one with zeros.
template <int BITS, int HEIGHT>
__attribute__((noinline)) void decode_pairs(const trellis::Stored* w, int64_t tile, int64_t from, int64_t count, __m512i* out) {
  using W = Walk<BITS, HEIGHT>;
  const int64_t pairs = (count + 1) / 2;
  const uint8_t* column = w->codes + (tile * w->k + from) * W::BYTES;
  for (int64_t p = 0; p < pairs; ++p, column += 2 * W::BYTES) {
    if (2 * p + 1 < count)
      for_each_strip<BITS, HEIGHT, 2>(column, [&](auto s, const Words (&bytes)[2]) INLINE_LAMBDA {
        out[s * pairs + p] = pair_of(centred(integers_of(bytes[0])), centred(integers_of(bytes[1])));
      });
    else
      for_each_strip<BITS, HEIGHT, 1>(column, [&](auto s, const Words (&bytes)[1]) INLINE_LAMBDA {
        out[s * pairs + p] = pair_of(centred(integers_of(bytes[0])), all(0));
      });
  }
}

constexpr int PAIR_ROWS = 8;

// sums [ROWS][16] += ROWS rows of x times `pairs` pairs of inputs. CHAINS: as in float_rows.h, for six cycles.
template <int ROWS>
__attribute__((noinline)) void add_pairs(const uint16_t* x, int64_t stride, const __m512i* weights, int64_t pairs, float* sums,
                                         bool first) {
  constexpr int CHAINS = ROWS > 4 ? 1 : ROWS > 2 ? 2 : 4;
  __m512 own[CHAINS][ROWS];
  unrolled<ROWS>([&](int m) INLINE_LAMBDA {
    own[0][m] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + m * STRIP);
    for (int c = 1; c < CHAINS; ++c) own[c][m] = _mm512_setzero_ps();
  });
  const auto step = [&](int64_t p, int c) INLINE_LAMBDA {
    unrolled<ROWS>([&](int m) INLINE_LAMBDA {
      int32_t two;
      __builtin_memcpy(&two, x + m * stride + 2 * p, sizeof two);
      own[c][m] = _mm512_dpbf16_ps(own[c][m], (__m512bh)weights[p], (__m512bh)_mm512_set1_epi32(two));
    });
  };
  int64_t p = 0;
  for (; p + 4 <= pairs; p += 4) unrolled<4>([&](auto i) INLINE_LAMBDA { step(p + i, i % CHAINS); });
  for (; p < pairs; ++p) step(p, 0);
  unrolled<ROWS>([&](int m) INLINE_LAMBDA {
    for (int c = 1; c < CHAINS; ++c) own[0][m] = _mm512_add_ps(own[0][m], own[c][m]);
    _mm512_store_ps(sums + m * STRIP, own[0][m]);
  });
}

template <int ROWS = PAIR_ROWS>
void add_pairs_of(int rows, const uint16_t* x, int64_t stride, const __m512i* weights, int64_t pairs, float* sums, bool first) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return add_pairs_of<ROWS - 1>(rows, x, stride, weights, pairs, sums, first);
  add_pairs<ROWS>(x, stride, weights, pairs, sums, first);
}

}  // namespace

void multiply_trellis_pairs(const trellis::Stored* w, const Inputs& x, const Outputs& y, int64_t tile, float* workspace) {
  const int64_t strips = w->tile / STRIP, side = x.m * STRIP;
  const int64_t depth = trellis::PART_VALUES / w->tile * 2;  // inputs: pairs take half the room of floats
  __m512i* weights = reinterpret_cast<__m512i*>(workspace);
  float* sums = workspace + trellis::PART_VALUES;
  for (int64_t k = 0; k < w->k; k += depth) {
    const int64_t count = w->k - k < depth ? w->k - k : depth, pairs = (count + 1) / 2;
    with_walk(w, [&](auto bits, auto height) INLINE_LAMBDA { decode_pairs<bits, height>(w, tile, k, count, weights); });
    for (int64_t s = 0; s < strips; ++s)
      for (int64_t row = 0; row < x.m; row += PAIR_ROWS) {
        const int rows = static_cast<int>(x.m - row < PAIR_ROWS ? x.m - row : PAIR_ROWS);
        const uint16_t* from = static_cast<const uint16_t*>(x.rows) + row * x.stride + k;
        add_pairs_of(rows, from, x.stride, weights + s * pairs, pairs, sums + s * side + row * STRIP, k == 0);
      }
  }
  store_sums(w, y, tile, sums, nullptr);
}
