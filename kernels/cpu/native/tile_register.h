// The tile registers: their shapes, and what the compiler must know of them. Included by the parts of avx512_amx.cpp.
#pragma once

#include <immintrin.h>

#include "scratch.h"
#include "tiles.h"

namespace {

constexpr int TILE_BYTES = TILE_ROWS * VECTOR;
constexpr int TILE_FLOATS = TILE_BYTES / 4;

thread_local Scratch tile_scratch;

// Tiles 0 to 5 have `rows` rows, of sums (0 to 3) and of x (4, 5); those of weights (6, 7) sixteen.
struct TilesInUse {
  struct alignas(64) Palette {
    uint8_t palette = 1, start_row = 0, unused[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  explicit TilesInUse(int rows) {
    Palette palette;
    for (int i = 0; i < 8; ++i) palette.row_bytes[i] = VECTOR, palette.rows[i] = static_cast<uint8_t>(i < 6 ? rows : TILE_ROWS);
    _tile_loadconfig(&palette);
  }
  ~TilesInUse() { _tile_release(); }
};

// Compilers take a tile's load for an instruction that reads no memory: what was written must be written by then.
inline void before_tiles_read() { __asm__ volatile("" ::: "memory"); }

}  // namespace
