// What every instruction set offers to the drivers in api.cpp.
#pragma once

#include "image.h"
#include "trellis.h"
#include "weight.h"

enum Type : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

// A tile of activations as the kernels read it: rows of `stride` inputs in the order of the image's blocks.
struct Inputs {
  const void* rows;     // float, bfloat16 (uint16_t) or int8_t [m][stride]
  // [m][sums_stride]. per_oc: x summed over each group. per_ic: what is added to the sums of the products.
  const float* sums;
  const float* scales;  // int8 only: [m][blocks]
  int64_t stride, sums_stride;
  int m;                // 1, 2, 4 or 8, up to the level's tile; in tiles any
};

// Where the tile's product goes.
struct Outputs {
  void* y;           // [rows][n]
  const void* bias;  // [n], or null
  Type type, bias_type;
  int64_t n;
  int rows;          // of the tile that exist: the last one may be fuller than M
  int64_t bias_stride = 0;  // 0 for the same bias in each row; n for one of its own, in float32
};

using Strips = void (*)(const Image*, const Inputs&, const Outputs&, int64_t from, int64_t to);

struct Level {
  const char* name;
  bool (*runs_here)();
  int tile;  // the largest Inputs::m
  trellis::RoundTile round_tile;
  // Trellis codes: one row of x as floats, and its sum; a tile's outputs for any number of such rows, with their sums in
  // Inputs::sums; and a tile's rows as columns of W^T, out [k][stride] of a type. workspace: trellis::PART_VALUES floats, and
  // for products as many as they have outputs in a tile's rows.
  float (*load_plain)(const void* x, Type, int64_t k, float* row);
  void (*multiply_trellis)(const trellis::Stored*, const Inputs&, const Outputs&, int64_t tile, float* workspace);
  void (*unpack_trellis)(const trellis::Stored*, int64_t tile, char* out, Type, int64_t stride, float* workspace);
  // Of k floats: int8_t [k], and a scale for each block of 32; returns the sum of what they mean.
  float (*round_plain)(const float* x, int64_t k, int8_t* row, float* scales);
  // One row of x (w->k values) in the order of the blocks, and its sums, or no sums if null.
  void (*load_float)(const Image*, const void* x, Type, float* row, float* sums);
  void (*load_bfloat16)(const Image*, const void* x, uint16_t* row, float* sums);
  void (*load_int8)(const Image*, const float* ordered, int8_t* row, float* scales, float* sums);
  // A row as by_float takes it, or null where that is as load_float leaves it. Where it is not, by_float multiplies codes,
  // and load_float sums x for symmetric ones too; elsewhere it multiplies codes less mid.
  void (*fit_fields)(const Image*, float* row);
  // x times the scales of a per_ic group; returns the sum of (base - zero) times that. base: 0 for codes, or mid.
  float (*scale_inputs)(const Image*, const float* ordered, int64_t group, float* scaled, int base);
  // One row of a type, rotated. workspace: rotation_room bytes, at a multiple of 64.
  void (*rotate)(const Rotation*, const void* x, Type, void* out, float* workspace);
  // inner [rank] = a x for one row of a type, and added [rows][from, to) of [rows][n] = bias + b inner for y's rows.
  void (*times_a)(const Weight*, int64_t k, const void* x, Type, float* inner);
  void (*add_times_b)(const Weight*, const float* inner, const Outputs& y, int64_t from, int64_t to, float* added);
  Strips by_float;
  Strips by_bfloat16;  // or null
  Strips by_int8;
  // Strips [from, to) as columns of W^T: out [k][stride] of a type, column 0 being the first row of strip `from`.
  void (*unpack)(const Image*, int64_t from, int64_t to, void* out, Type, int64_t stride);
  // The same of weights with dropped groups (kept.h): a row of x in the order of their units, products of shares, and
  // the strip from a row on as rows of out [16][k].
  void (*load_kept)(const Image*, const void* x, Type, float* row);
  Strips by_kept;
  void (*unpack_kept)(const Image*, int64_t row, void* out, Type);
  // Of one row of bfloat16 where fits_pairs (kept.h), or null.
  void (*load_kept_bfloat16)(const Image*, const void* x, uint16_t* row);
  Strips by_kept_bfloat16;
  // Of up to TILE_ROWS rows of bfloat16 in a tile (tiles.h), or null.
  Strips by_tiles;
  // Of any number of rows of bfloat16 in tiles, filled up to whole ones, with weights rounded to bfloat16, or null;
  // and the number from which this is the fastest way.
  Strips by_rounded;
  int64_t rounded_from;
  // Of any number of rows of floats with weights made floats, or null; and the number from which this is the fastest way.
  Strips by_weights;
  int64_t weights_from;
  // As multiply_trellis, of rows of bfloat16 with an even stride, filled up with zeros; or null.
  void (*multiply_trellis_pairs)(const trellis::Stored*, const Inputs&, const Outputs&, int64_t tile, float* workspace);
  // Of one row as round_plain leaves it, or null.
  void (*multiply_trellis_int8)(const trellis::Stored*, const Inputs&, const Outputs&, int64_t tile, float* workspace);
};

extern const Level LEVEL_SCALAR;
#if defined(__x86_64__)
extern const Level LEVEL_AVX2, LEVEL_AVX512, LEVEL_AVX512_BF16;
#elif defined(__aarch64__)
extern const Level LEVEL_NEON;
#endif
