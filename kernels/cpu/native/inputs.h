// Activations brought into the order of an image's blocks. Included after wide.h, once for each instruction set.
#pragma once

#include "wide.h"

namespace {

// Sums of each group, eight chains at once.
INLINE void sum_groups(const Image* w, const float* row, float* sums) {
  for (int64_t g = 0; g < w->groups; ++g) {
    float lanes[BLOCK] = {};
    for (int64_t b = blocks_before(w, g); b < blocks_before(w, g + 1); ++b)
      for (int i = 0; i < BLOCK; ++i) lanes[i] += row[b * BLOCK + i];
    float sum = 0;
    for (float lane : lanes) sum += lane;
    sums[g] = sum;
  }
}

template <typename Convert, typename To>
INLINE void order_blocks(const Image* w, To* row, Convert value) {
  for (int64_t b = 0; b < w->blocks; ++b) {
    const int64_t first = first_input(w, b);
    const int count = inputs_in(w, b);
    To* to = row + b * BLOCK;
    if (count == BLOCK) {
      for (int i = 0; i < BLOCK; ++i) to[i] = value(first + i);
    } else {
      for (int i = 0; i < BLOCK; ++i) to[i] = i < count ? value(first + i) : To{};
    }
  }
}

void load_float(const Image* w, const void* x, Type type, float* row, float* sums) {
  if (type == FLOAT32) {
    const float* from = static_cast<const float*>(x);
    order_blocks(w, row, [=](int64_t i) { return from[i]; });
  } else if (type == BFLOAT16) {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    order_blocks(w, row, [=](int64_t i) { return from_bfloat16(from[i]); });
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    order_blocks(w, row, [=](int64_t i) { return from_float16(from[i]); });
  }
  if (!w->symmetric && !w->per_ic) sum_groups(w, row, sums);
}

void load_bfloat16(const Image* w, const void* x, uint16_t* row, float* sums) {
  const uint16_t* from = static_cast<const uint16_t*>(x);
  order_blocks(w, row, [=](int64_t i) { return from[i]; });
  if (w->symmetric || !sums) return;
  for (int64_t g = 0; g < w->groups; ++g) {
    float lanes[BLOCK] = {};
    for (int64_t b = blocks_before(w, g); b < blocks_before(w, g + 1); ++b)
      for (int i = 0; i < BLOCK; ++i) lanes[i] += from_bfloat16(row[b * BLOCK + i]);
    float sum = 0;
    for (float lane : lanes) sum += lane;
    sums[g] = sum;
  }
}

// Each block of 32 gets a scale of its own, so that an outlier costs its 31 neighbours precision and nobody else.
void load_int8(const Image* w, const float* ordered, int8_t* row, float* scales, float* sums) {
  uint8_t order[BLOCK];
  for (int i = 0; i < BLOCK; ++i) order[i] = static_cast<uint8_t>(quad_input(w->bits, i / 4, i % 4));
  for (int64_t g = 0; g < (w->per_ic ? 1 : w->groups); ++g) sums[g] = 0;
  for (int64_t b = 0; b < w->blocks; ++b) {
    const float* x = ordered + b * BLOCK;
    int32_t largest_bits = 0;  // positive floats have the order of their bits, infinity and NaN above the numbers
    for (int i = 0; i < BLOCK; ++i) {
      const int32_t size = static_cast<int32_t>(to_bits(x[i]) & 0x7fffffff);
      largest_bits = size > largest_bits ? size : largest_bits;
    }
    const float largest = from_bits(static_cast<uint32_t>(largest_bits));
    const bool rounds = largest > 1e-30f && largest_bits < 0x7f800000;  // infinity and NaN must not become numbers
    const float inverse = rounds ? 127 / largest : 0;
    int32_t rounded[BLOCK];
    int sum = 0;
    for (int i = 0; i < BLOCK; ++i) {
      const float scaled = rounds ? x[i] * inverse : 0;
      rounded[i] = static_cast<int32_t>(scaled + __builtin_copysignf(0.5f, scaled));
      sum += rounded[i];
    }
    for (int i = 0; i < BLOCK; ++i) row[b * BLOCK + i] = static_cast<int8_t>(rounded[order[i]]);
    scales[b] = largest_bits < 0x7f800000 ? largest / 127 : from_bits(0x7fc00000);
    sums[w->per_ic ? 0 : b / w->group_blocks] += scales[b] * static_cast<float>(sum);
  }
}

float scale_inputs(const Image* w, const float* ordered, int64_t group, float* scaled) {
  const int64_t count = w->blocks * BLOCK;
  const uint16_t* scales = scales_of(w) + group * count;
  for (int64_t i = 0; i < count; ++i) scaled[i] = ordered[i] * from_float16(scales[i]);
  if (w->symmetric) return 0;
  const uint8_t* zeros = zeros_of(w) + group * count;
  float lanes[BLOCK] = {};
  for (int64_t i = 0; i < count; i += BLOCK)
    for (int j = 0; j < BLOCK; ++j) lanes[j] += scaled[i + j] * static_cast<float>(w->mid - zeros[i + j]);
  float sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

}  // namespace
