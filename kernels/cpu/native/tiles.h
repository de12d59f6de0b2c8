// Products of many rows of bfloat16 in tiles, on processors that have them.
#pragma once

#include "level.h"

constexpr int TILE_ROWS = 16;
inline int64_t tiles_of(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
inline int64_t tile_height(int64_t rows) { return rows < TILE_ROWS ? rows : TILE_ROWS; }

bool tiles_run_here();
// Inputs::rows: [tiles_of(m)][blocks][tile_height(m)][32]. What is in the rows beyond the last does not matter.
void multiply_tiles(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to);
