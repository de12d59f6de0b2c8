// Trellis codes as quantc/numerics/trellis/ defines them: what states mean, and the search for them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trellis {

constexpr int STATE_BITS = 12, STATES = 1 << STATE_BITS, LEAST_BITS = 1, MOST_BITS = 5;
constexpr int VALUE_UNIT = 3800;
constexpr int AROUND = 32;  // numbers on either side of the seam that the free run of a search sees
constexpr int LARGEST_TILE = 96;
constexpr uint32_t MULTIPLIER = 0x4c5bbdb1, MASK = 0x3f3f3f3f;
constexpr int MIDDLE = 126;
constexpr double RMS = 36.89;

constexpr int value_of(uint32_t state) {
  const uint32_t word = state * MULTIPLIER & MASK;
  return static_cast<int>((word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24)) - MIDDLE;
}

// Tiles that kernels know: a weight has the first of them that divides its rows (quantc/spec/grids/trellis.py).
constexpr int TILES[] = {64, 96, 80, 48, 32};
constexpr bool is_tile(int tile) {
  for (int one : TILES)
    if (tile == one) return true;
  return false;
}
constexpr int tile_of(int64_t n) {
  for (int one : TILES)
    if (n % one == 0) return one;
  return n < TILES[4] ? TILES[4] : TILES[0];
}

// A weight [n][k] as it is stored: codes [ceil(n / tile)][k][tile * bits / 8], and a float16 scale for each row.
// kernels/cpu/trellis.py writes this struct.
struct Stored {
  const uint8_t* codes;
  const uint16_t* scales;
  int64_t code_bytes, n, k;
  int32_t bits, tile;
};

// Integers of a tile that are decoded at once, half of the smallest first cache in floats.
constexpr int64_t PART_VALUES = 4096;

// By state: values over their RMS in units of 1 / VALUE_UNIT, and the values.
struct Tables {
  alignas(64) int16_t scaled[STATES], values[STATES];
};
const Tables& tables();

// Rows [first, first + rows) of `columns` columns: the rows of one tile, which are coded together.
struct Rounding {
  int bits, tile;
  int64_t columns, stride;   // of left, errors and codes: [columns][stride]
  float* left;               // what is to be rounded; errors of a column are fed into those after it
  const float *unit, *scale;  // [n]: by which numbers are divided, and integers multiplied
  const float* upper;        // U[column][column], ..., or null where nothing is fed back
  int64_t upper_row, upper_column;  // its strides
  float* errors;             // over their pivots; null where nothing is fed back
  int16_t* codes;
};

// workspace: room_for(bits) bytes, at a multiple of 64.
using RoundTile = void (*)(const Rounding&, int64_t first, int rows, char* workspace);
size_t room_for(int bits);
inline size_t bytes_of_heads(int bits) { return static_cast<size_t>(2 * STATES >> bits); }

// Rounds all tiles of n rows. Throws std::bad_alloc.
void round(const Rounding& job, int64_t n, int threads);

}  // namespace trellis
