// Products of many rows of bfloat16 in tiles, on processors that have them.
#pragma once

#include "level.h"

constexpr int TILE_ROWS = 16;

bool tiles_run_here();
void multiply_tiles(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to);
