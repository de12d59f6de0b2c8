// Products of up to 16 rows of bfloat16: whole codes go into the tiles, exact as bfloat16, and the sums of every group get
// its scales, so that no weight is rounded. A tile takes 16 cycles whatever the rows are, where dot products take 2 for
// each of its 16 vectors and each row. Included by avx512_amx.cpp.
#pragma once

#include "pairs.h"
#include "tile_register.h"

namespace {

constexpr int SIDE_BY_SIDE = 4;
constexpr int CODES_AHEAD = 16;  // blocks

// sums [rows][16] += scales (products - (base + zeros) times the sums of x), of a unit of group g.
INLINE void add_unit(const Image* w, const Inputs& x, int base, int64_t strip, int64_t g, int64_t unit, const float* products, float* sums) {
  const int64_t at = (strip * w->groups + g) * STRIP;
  const __m512 scales = load_float16(scales_of(w) + at).part[0];
  const __m512 offsets = w->symmetric ? _mm512_set1_ps(static_cast<float>(-base - w->mid)) : load_offsets(zeros_of(w) + at, -base).part[0];
  for (int m = 0; m < x.m; ++m) {
    const __m512 group = _mm512_fmadd_ps(offsets, _mm512_set1_ps(x.sums[m * x.sums_stride + unit]), _mm512_load_ps(products + m * STRIP));
    _mm512_store_ps(sums + m * STRIP, _mm512_fmadd_ps(group, scales, _mm512_load_ps(sums + m * STRIP)));
  }
}

// A block is decoded while the tiles multiply the one before it. A tile that is loaded right after it was stored waits
// until its stores have reached the cache: 75 cycles a block of 4 bits, and 42 with one block in between.
template <int BITS>
INLINE void decode_block(const RaisedPairs<BITS>& decode, const uint32_t* block, char* tile) {
  for (int v = 0; v < BITS; ++v) _mm_prefetch(reinterpret_cast<const char*>(block + (CODES_AHEAD * BITS + v) * STRIP), _MM_HINT_T0);
  unrolled<BLOCK / 2>([&](auto pair) INLINE_LAMBDA {
    constexpr int k = 2 * pair;
    const Words low = load_words(block + low_vector(BITS, k) * STRIP);
    const Words high = high_width(BITS) ? load_words(block + high_vector(BITS, k) * STRIP) : Words{};
    _mm512_store_si512(tile + pair * VECTOR, decode(low, high, low_bit(BITS, k), high_bit(BITS, k)));
  });
  before_tiles_read();
}

// The sums of strip S of those side by side, in tile S; the tile of x is tile 4.
template <int S>
INLINE void clear_sums() {
  if constexpr (S == 0) _tile_zero(0);
  if constexpr (S == 1) _tile_zero(1);
  if constexpr (S == 2) _tile_zero(2);
  if constexpr (S == 3) _tile_zero(3);
}
template <int S>
INLINE void add_product(const char* tile) {
  if constexpr (S % 2 == 0) _tile_loadd(6, tile, VECTOR);
  if constexpr (S % 2 == 1) _tile_loadd(7, tile, VECTOR);
  if constexpr (S == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (S == 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (S == 2) _tile_dpbf16ps(2, 4, 6);
  if constexpr (S == 3) _tile_dpbf16ps(3, 4, 7);
}
template <int S>
INLINE void store_sums(float* to) {
  if constexpr (S == 0) _tile_stored(0, to, VECTOR);
  if constexpr (S == 1) _tile_stored(1, to, VECTOR);
  if constexpr (S == 2) _tile_stored(2, to, VECTOR);
  if constexpr (S == 3) _tile_stored(3, to, VECTOR);
}

// SIDE strips at once share what is read of x.
template <int BITS, int SIDE>
void few_side_by_side(const RaisedPairs<BITS>& decode, const Image* w, const Inputs& x, const Outputs& y, int64_t strip, char* room) {
  char* tiles = room;  // [2][SIDE]: of this block and of the next
  float* products = reinterpret_cast<float*>(room + 2 * SIDE * TILE_BYTES);
  float* sums = products + SIDE * TILE_FLOATS;
  const int64_t block_bytes = x.m * VECTOR;
  const uint32_t* codes[SIDE];
  for (int s = 0; s < SIDE; ++s) {
    codes[s] = codes_of(w, strip + s);
    decode_block(decode, codes[s], tiles + s * TILE_BYTES);
    for (int m = 0; m < x.m; ++m) _mm512_store_ps(sums + s * TILE_FLOATS + m * STRIP, _mm512_setzero_ps());
  }
  const char* rows = static_cast<const char*>(x.rows);
  const int64_t units = units_of_group(w);
  for (int64_t b = 0, unit = 0; b < w->blocks; ++unit) {
    const int64_t g = unit / units, end = end_of_unit(w, g, b);
    unrolled<SIDE>([&](auto s) INLINE_LAMBDA { clear_sums<s>(); });
    for (; b < end; ++b, rows += block_bytes) {
      char* these = tiles + b % 2 * SIDE * TILE_BYTES;
      char* others = tiles + (b + 1) % 2 * SIDE * TILE_BYTES;
      _tile_loadd(4, rows, VECTOR);
      unrolled<SIDE>([&](auto s) INLINE_LAMBDA {
        codes[s] += BITS * STRIP;
        if (b + 1 < w->blocks) decode_block(decode, codes[s], others + s * TILE_BYTES);
        add_product<s>(these + s * TILE_BYTES);
      });
    }
    unrolled<SIDE>([&](auto s) INLINE_LAMBDA { store_sums<s>(products + s * TILE_FLOATS); });
    for (int s = 0; s < SIDE; ++s)
      add_unit(w, x, decode.base, strip + s, g, unit, products + s * TILE_FLOATS, sums + s * TILE_FLOATS);
  }
  for (int s = 0; s < SIDE; ++s)
    for (int m = 0; m < y.rows; ++m)
      store_row(y, m, first_row(w, strip + s), rows_in(w, strip + s), Floats{{_mm512_load_ps(sums + s * TILE_FLOATS + m * STRIP)}});
}

template <int BITS>
void multiply_few_bits(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  const RaisedPairs<BITS> decode(w->mid);
  char* room = tile_scratch.at_least(4 * SIDE_BY_SIDE * TILE_BYTES);
  const TilesInUse tiles_in_use(x.m);
  int64_t strip = from;
  for (; strip + SIDE_BY_SIDE <= to; strip += SIDE_BY_SIDE) few_side_by_side<BITS, SIDE_BY_SIDE>(decode, w, x, y, strip, room);
  for (; strip < to; ++strip) few_side_by_side<BITS, 1>(decode, w, x, y, strip, room);
}

void multiply_few(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  with_bits(w->bits, [&](auto bits) { multiply_few_bits<bits>(w, x, y, from, to); });
}

}  // namespace
