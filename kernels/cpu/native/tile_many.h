// Products of more rows of bfloat16 than a tile has: weights rounded to bfloat16, as torch's matmul would have them, and
// then multiplied with all rows of a slab. Included by avx512_amx.cpp.
#pragma once

#include "pairs.h"
#include "tile_register.h"

namespace {

constexpr int64_t DEPTH = 16;                        // blocks of inputs at once: two strips of tiles are 32 KB then

struct EvenOdd { __m512 even, odd; };

// Two codes of each row less mid as floats.
template <int BITS>
INLINE EvenOdd codes_of_pair(const Pairs<BITS>& decode, const uint32_t* block, int k) {
  const Words low = load_words(block + low_vector(BITS, k) * STRIP);
  const int at = low_bit(BITS, k);
  if constexpr (BITS == 8) {
    const IntLanes even = reinterpret_cast<IntLanes>(low.part[0] >> at & 0xff), odd = reinterpret_cast<IntLanes>(low.part[0] >> (at + 16) & 0xff);
    return {__builtin_convertvector(even - decode.mid, FloatLanes), __builtin_convertvector(odd - decode.mid, FloatLanes)};
  } else {
    const Words high = high_width(BITS) ? load_words(block + high_vector(BITS, k) * STRIP) : Words{};
    const __m512i pair = decode(low, high, at, high_bit(BITS, k));
    const __m512i upper_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), _mm512_castsi512_ps(_mm512_and_si512(pair, upper_half))};
  }
}

// Blocks [from, to) of a strip as tiles of weights, (code - zero) * scale.
template <int BITS>
void make_tiles(const Image* w, int64_t strip, int64_t from, int64_t to, char* tiles) {
  const Pairs<BITS> decode(w->mid);
  const uint32_t* block = codes_of(w, strip) + from * BITS * STRIP;
  uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  const __m512i together = _mm512_loadu_si512(order);
  __m512 scales{}, offsets{};
  int64_t group = -1;
  for (int64_t b = from; b < to; ++b, block += BITS * STRIP, tiles += TILE_BYTES) {
    if (b / w->group_blocks != group) {
      group = b / w->group_blocks;
      const int64_t at = (strip * w->groups + group) * STRIP;
      scales = load_float16(scales_of(w) + at).part[0];
      offsets = w->symmetric ? _mm512_setzero_ps() : _mm512_mul_ps(load_offsets(zeros_of(w) + at, w->mid).part[0], scales);
    }
    for (int v = 0; v < BITS; ++v) _mm_prefetch(reinterpret_cast<const char*>(block + (16 * BITS + v) * STRIP), _MM_HINT_T0);
    unrolled<BLOCK / 2>([&](auto pair) INLINE_LAMBDA {
      constexpr int k = 2 * pair;
      const EvenOdd codes = codes_of_pair(decode, block, k);
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_fmadd_ps(codes.odd, scales, offsets), _mm512_fmadd_ps(codes.even, scales, offsets));
      _mm512_store_si512(tiles + pair * VECTOR, _mm512_permutexvar_epi16(together, (__m512i)both));
    });
  }
}

void make(const Image* w, int64_t strip, int64_t from, int64_t to, char* tiles) {
  switch (w->bits) {
    case 2: return make_tiles<2>(w, strip, from, to, tiles);
    case 3: return make_tiles<3>(w, strip, from, to, tiles);
    case 4: return make_tiles<4>(w, strip, from, to, tiles);
    case 5: return make_tiles<5>(w, strip, from, to, tiles);
    case 6: return make_tiles<6>(w, strip, from, to, tiles);
    default: return make_tiles<8>(w, strip, from, to, tiles);
  }
}

// One or two tiles of rows, TILE_BYTES for each block, with one or two strips: sums += x times `count` tiles of weights.
// far: bytes from one tile of rows to the next; side: floats from the sums of one strip to those of the other.
template <int ROWS, int SIDE>
INLINE void add_tiles(const char* x, int64_t far, const char* tiles, int64_t count, float* sums, int64_t side, bool first) {
  if (first) {
    _tile_zero(0);
    if (SIDE > 1) _tile_zero(1);
    if (ROWS > 1) _tile_zero(2);
    if (ROWS > 1 && SIDE > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, VECTOR);
    if (SIDE > 1) _tile_loadd(1, sums + side, VECTOR);
    if (ROWS > 1) _tile_loadd(2, sums + TILE_FLOATS, VECTOR);
    if (ROWS > 1 && SIDE > 1) _tile_loadd(3, sums + side + TILE_FLOATS, VECTOR);
  }
  for (int64_t b = 0; b < count; ++b, x += TILE_BYTES, tiles += TILE_BYTES) {
    _tile_loadd(4, x, VECTOR);
    _tile_loadd(6, tiles, VECTOR);
    _tile_dpbf16ps(0, 4, 6);
    if (SIDE > 1) {
      _tile_loadd(7, tiles + DEPTH * TILE_BYTES, VECTOR);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (ROWS > 1) {
      _tile_loadd(5, x + far, VECTOR);
      _tile_dpbf16ps(2, 5, 6);
      if (SIDE > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, VECTOR);
  if (SIDE > 1) _tile_stored(1, sums + side, VECTOR);
  if (ROWS > 1) _tile_stored(2, sums + TILE_FLOATS, VECTOR);
  if (ROWS > 1 && SIDE > 1) _tile_stored(3, sums + side + TILE_FLOATS, VECTOR);
}

template <int SIDE>
void add_rows(const Image* w, const Inputs& x, int64_t from, const char* tiles, int64_t count, float* sums) {
  const char* rows = static_cast<const char*>(x.rows) + from * TILE_BYTES;
  const int64_t row_tiles = tiles_of(x.m), far = w->blocks * TILE_BYTES, side = row_tiles * TILE_FLOATS;
  int64_t t = 0;
  for (; t + 2 <= row_tiles; t += 2)
    add_tiles<2, SIDE>(rows + t * far, far, tiles, count, sums + t * TILE_FLOATS, side, from == 0);
  if (t < row_tiles) add_tiles<1, SIDE>(rows + t * far, far, tiles, count, sums + t * TILE_FLOATS, side, from == 0);
}

void multiply_many(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  const int64_t side = tiles_of(x.m) * TILE_FLOATS;
  const size_t tiles_bytes = 2 * DEPTH * TILE_BYTES;
  char* tiles = tile_scratch.at_least(tiles_bytes + static_cast<size_t>(4 * (to - from) * side));
  float* sums = reinterpret_cast<float*>(tiles + tiles_bytes);
  const TilesInUse tiles_in_use(TILE_ROWS);
  for (int64_t b = 0; b < w->blocks; b += DEPTH) {
    const int64_t end = b + DEPTH < w->blocks ? b + DEPTH : w->blocks;
    for (int64_t strip = from; strip < to; strip += 2) {
      float* own = sums + (strip - from) * side;
      make(w, strip, b, end, tiles);
      if (strip + 1 == to) {
        add_rows<1>(w, x, b, tiles, end - b, own);
        continue;
      }
      make(w, strip + 1, b, end, tiles + DEPTH * TILE_BYTES);
      add_rows<2>(w, x, b, tiles, end - b, own);
    }
  }
  for (int64_t strip = from; strip < to; ++strip)
    for (int m = 0; m < y.rows; ++m) {
      const Floats row{{_mm512_loadu_ps(sums + (strip - from) * side + m * STRIP)}};
      store_row(y, m, first_row(w, strip), rows_in(w, strip), row);
    }
}

}  // namespace
