// A weight as the caller hands it over: an image and what goes with it. kernels/cpu/native.py writes these structs.
#pragma once

#include <cstddef>
#include <cstdint>

// A row x of `width` becomes x times signs, and then each of its blocks x H / sqrt(block), H = H_base (x) S_rest with
// rest = block / base a power of two: quantc/numerics/hadamard.py.
struct Rotation {
  int64_t width, block;
  int64_t base;             // 1, or a multiple of 4
  const uint16_t* signs;    // [ceil(width / 16)]: a bit for each input, lowest first, set where its sign changes
  const uint8_t* quarters;  // [base][base / 4]: bit b of (i, g) is set where H_base[4 g + b][i] is -1; unused for base 1
  float scale;              // 1 / sqrt(block)
};

struct Weight {
  const void* image;
  const Rotation* rotation;  // of x, or null
  // y += b (a x), x rotated, in float16: a [rank][k], b [ceil(n / 16)][rank][16]. rank: 0 without.
  const uint16_t *low_rank_a, *low_rank_b;
  int64_t rank;
};

constexpr int LARGEST_GROUP = 8;  // products in a call

// y [m][n] of x's type = x W^T + bias [n] of bias_type (level.h), or null.
struct Product {
  Weight weight;
  void* y;
  const void* bias;
  int64_t bias_type;
};

// Bytes of the workspace that rotating a row takes, in floats: the row, what a last load of sixteen reads beyond it,
// and up to 32 columns of a block.
inline size_t rotation_room(const Rotation* r) {
  return r ? static_cast<size_t>(4 * ((r->width + 15) / 16 * 16 + 16 + (r->base > 1 ? 32 * r->base : 0))) : 0;
}
