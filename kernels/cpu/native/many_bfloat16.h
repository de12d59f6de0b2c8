// Products of many rows of bfloat16 by dot products: weights rounded to bfloat16 (rounded.h), and then multiplied with all
// rows of a slab, so that codes are made numbers once and not for every 8 rows. Included by avx512_bf16.cpp.
#pragma once

#include "rounded.h"
#include "scratch.h"

namespace {

// Rows of x: with two strips 16 sums, enough to start two dot products of 6 cycles in each.
constexpr int AT_ONCE = 8;
// Blocks of inputs at once: two strips of tiles are 32 KB, two thirds of a Zen 5's first cache. With 8, which reads and
// writes sums twice as often, 32 to 128 rows take 1.05 to 1.2 times as long; making tiles between products gains nothing.
constexpr int64_t ROUNDED_DEPTH = 16;
constexpr int64_t ROUNDED_BYTES = ROUNDED_DEPTH * TILE_ROWS * VECTOR;  // of a strip

thread_local Scratch many_scratch;

// sums [8][16] of one or two strips += 8 rows of x times `count` blocks of weights.
// x: [count][TILE_ROWS][32]; side: floats from the sums of one strip to those of the other.
template <int SIDE>
INLINE void add_blocks(const char* x, const char* tiles, int64_t count, float* sums, int64_t side, bool first) {
  __m512 own[SIDE][AT_ONCE];
  unrolled<SIDE * AT_ONCE>([&](int i) INLINE_LAMBDA {
    const float* from = sums + i / AT_ONCE * side + i % AT_ONCE * STRIP;
    own[i / AT_ONCE][i % AT_ONCE] = first ? _mm512_setzero_ps() : _mm512_load_ps(from);
  });
  for (int64_t b = 0; b < count; ++b, x += TILE_ROWS * VECTOR, tiles += TILE_ROWS * VECTOR) {
    unrolled<BLOCK / 2>([&](auto pair) INLINE_LAMBDA {
      __m512bh weights[SIDE];
      for (int s = 0; s < SIDE; ++s)
        weights[s] = (__m512bh)_mm512_load_si512(tiles + s * ROUNDED_BYTES + pair * VECTOR);
      unrolled<AT_ONCE>([&](int m) INLINE_LAMBDA {
        int32_t two;
        __builtin_memcpy(&two, x + m * VECTOR + pair * 4, sizeof two);
        const __m512bh values = (__m512bh)_mm512_set1_epi32(two);
        for (int s = 0; s < SIDE; ++s) own[s][m] = _mm512_dpbf16_ps(own[s][m], weights[s], values);
      });
    });
  }
  unrolled<SIDE * AT_ONCE>([&](int i) INLINE_LAMBDA {
    _mm512_store_ps(sums + i / AT_ONCE * side + i % AT_ONCE * STRIP, own[i / AT_ONCE][i % AT_ONCE]);
  });
}

template <int SIDE>
void add_rows(const Image* w, const Inputs& x, const Part& part, const char* tiles, float* sums) {
  const int64_t tile_bytes = TILE_ROWS * VECTOR, side = tiles_of(x.m) * TILE_ROWS * STRIP;
  const char* rows = static_cast<const char*>(x.rows) + part.from * tile_bytes;
  for (int64_t m = 0; m < x.m; m += AT_ONCE) {
    const char* own = rows + m / TILE_ROWS * w->blocks * tile_bytes + m % TILE_ROWS * VECTOR;
    add_blocks<SIDE>(own, tiles, part.blocks, sums + m * STRIP, side, part.from == 0);
  }
}

template <int BITS>
void multiply_rounded_bits(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  const int64_t side = tiles_of(x.m) * TILE_ROWS * STRIP;
  char* tiles = many_scratch.at_least(2 * ROUNDED_BYTES + static_cast<size_t>(4 * (to - from) * side));
  float* sums = reinterpret_cast<float*>(tiles + 2 * ROUNDED_BYTES);
  Maker<BITS, ROUNDED_DEPTH> maker(w);
  for (int64_t i = 0; i < parts_of(w, from, to, ROUNDED_DEPTH); ++i) {
    const Part part = part_of(w, from, to, ROUNDED_DEPTH, i);
    maker.make_all(part, tiles);
    float* own = sums + (part.strip - from) * side;
    part.side == 2 ? add_rows<2>(w, x, part, tiles, own) : add_rows<1>(w, x, part, tiles, own);
  }
  for (int64_t strip = from; strip < to; ++strip)
    for (int m = 0; m < y.rows; ++m) {
      const Floats row{{_mm512_load_ps(sums + (strip - from) * side + m * STRIP)}};
      store_row(y, m, first_row(w, strip), rows_in(w, strip), row);
    }
}

}  // namespace
