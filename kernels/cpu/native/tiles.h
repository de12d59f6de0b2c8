// Rows of bfloat16 in tiles of 16, block by block, and what processors with registers for tiles make of them.
#pragma once

#include "level.h"

constexpr int TILE_ROWS = 16;
inline int64_t tiles_of(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

// Sums of codes that are not less mid outgrow what is left without it (RaisedPairs in pairs.h): it is taken away after so
// many blocks at the latest, with the sums of x over as many.
constexpr int64_t UNIT_BLOCKS = 8;
inline int64_t units_of_group(const Image* w) { return (w->group_blocks + UNIT_BLOCKS - 1) / UNIT_BLOCKS; }
inline int64_t end_of_unit(const Image* w, int64_t group, int64_t first_block) {
  const int64_t unit = first_block + UNIT_BLOCKS, end = blocks_before(w, group + 1);
  return unit < end ? unit : end;
}

bool tiles_run_here();
// As Level::load_bfloat16; sums [groups][units_of_group].
void load_for_tiles(const Image* w, const void* x, uint16_t* row, float* sums);
// Inputs::sums as of load_for_tiles. Inputs::rows: [blocks][m][32].
void multiply_tiles(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to);
// Inputs::rows: [tiles_of(m)][blocks][TILE_ROWS][32]. What is in the rows beyond the last does not matter.
void multiply_rounded_tiles(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to);
