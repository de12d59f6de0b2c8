// Products of more rows of bfloat16 than a tile has: weights rounded to bfloat16 (rounded.h), and then multiplied with all
// rows of a slab. Included by avx512_amx.cpp.
#pragma once

#include "rounded.h"
#include "tile_register.h"

namespace {

constexpr int64_t DEPTH = 8;  // blocks of inputs at once: two strips of tiles, and the next two, are 32 KB then

// One or two tiles of rows, TILE_BYTES for each block, with one or two strips: sums += x times `count` tiles of weights.
// far: bytes from one tile of rows to the next; side: floats from the sums of one strip to those of the other.
template <int ROWS, int SIDE, typename Between>
INLINE void add_tiles(const char* x, int64_t far, const char* tiles, int64_t count, float* sums, int64_t side, bool first, Between between) {
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
    between();
  }
  _tile_stored(0, sums, VECTOR);
  if (SIDE > 1) _tile_stored(1, sums + side, VECTOR);
  if (ROWS > 1) _tile_stored(2, sums + TILE_FLOATS, VECTOR);
  if (ROWS > 1 && SIDE > 1) _tile_stored(3, sums + side + TILE_FLOATS, VECTOR);
}

template <int SIDE, typename Between>
void add_rows(const Image* w, const Inputs& x, const Part& part, const char* tiles, float* sums, Between between) {
  const char* rows = static_cast<const char*>(x.rows) + part.from * TILE_BYTES;
  const int64_t row_tiles = tiles_of(x.m), far = w->blocks * TILE_BYTES, side = row_tiles * TILE_FLOATS;
  const bool first = part.from == 0;
  int64_t t = 0;
  for (; t + 2 <= row_tiles; t += 2)
    add_tiles<2, SIDE>(rows + t * far, far, tiles, part.blocks, sums + t * TILE_FLOATS, side, first, between);
  if (t < row_tiles) add_tiles<1, SIDE>(rows + t * far, far, tiles, part.blocks, sums + t * TILE_FLOATS, side, first, between);
}

template <int BITS>
void multiply_many_bits(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  const int64_t side = tiles_of(x.m) * TILE_FLOATS, parts = parts_of(w, from, to, DEPTH);
  const size_t tiles_bytes = 2 * DEPTH * TILE_BYTES;
  char* tiles = tile_scratch.at_least(2 * tiles_bytes + static_cast<size_t>(4 * (to - from) * side));
  float* sums = reinterpret_cast<float*>(tiles + 2 * tiles_bytes);
  const auto part_at = [&](int64_t i) { return part_of(w, from, to, DEPTH, i); };
  const TilesInUse tiles_in_use(TILE_ROWS);
  Maker<BITS, DEPTH> maker(w);
  maker.begin(part_at(0), tiles, 1);
  for (int64_t i = 0; i < parts; ++i) {
    maker.finish();
    before_tiles_read();
    const Part part = part_at(i);
    const char* made = tiles + i % 2 * tiles_bytes;
    const int64_t steps = (tiles_of(x.m) + 1) / 2 * part.blocks;
    maker.begin(i + 1 < parts ? part_at(i + 1) : Part{0, 0, 0, 0}, tiles + (i + 1) % 2 * tiles_bytes, steps);
    float* own = sums + (part.strip - from) * side;
    const auto between = [&] { maker.step(); };
    part.side == 2 ? add_rows<2>(w, x, part, made, own, between) : add_rows<1>(w, x, part, made, own, between);
  }
  for (int64_t strip = from; strip < to; ++strip)
    for (int m = 0; m < y.rows; ++m) {
      const Floats row{{_mm512_loadu_ps(sums + (strip - from) * side + m * STRIP)}};
      store_row(y, m, first_row(w, strip), rows_in(w, strip), row);
    }
}

void multiply_many(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  with_bits(w->bits, [&](auto bits) { multiply_many_bits<bits>(w, x, y, from, to); });
}

}  // namespace
