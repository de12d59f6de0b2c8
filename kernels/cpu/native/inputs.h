// Activations brought into the order of an image's blocks. Included after wide.h, once for each instruction set.
#pragma once

#include "wide.h"

namespace {

// Of BLOCK lanes, in halves: one after the other, each would wait 4 cycles for the one before.
INLINE float sum_of_block(float (&lanes)[BLOCK]) {
  for (int half = BLOCK / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Sums of each group, eight chains at once.
INLINE void sum_groups(const Image* w, const float* row, float* sums) {
  for (int64_t g = 0; g < w->groups; ++g) {
    float lanes[BLOCK] = {};
    for (int64_t b = blocks_before(w, g); b < blocks_before(w, g + 1); ++b)
      for (int i = 0; i < BLOCK; ++i) lanes[i] += row[b * BLOCK + i];
    sums[g] = sum_of_block(lanes);
  }
}

// Group by group: first_input and inputs_in divide twice each, which took half of the time.
template <typename Convert, typename To>
INLINE void order_blocks(const Image* w, To* to, Convert value) {
  const int64_t group = w->per_ic ? w->k : w->group;
  for (int64_t start = 0; start < w->k; start += group) {
    const int64_t end = start + group < w->k ? start + group : w->k;
    for (int64_t first = start; first < end; first += BLOCK, to += BLOCK) {
      const int count = end - first < BLOCK ? static_cast<int>(end - first) : BLOCK;
      if (count == BLOCK) {
        for (int i = 0; i < BLOCK; ++i) to[i] = value(first + i);
      } else {
        for (int i = 0; i < BLOCK; ++i) to[i] = i < count ? value(first + i) : To{};
      }
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
  if (sums && (!w->symmetric || WHOLE_CODES) && !w->per_ic) sum_groups(w, row, sums);
}

void load_bfloat16(const Image* w, const void* x, uint16_t* row, float* sums) {
  const uint16_t* from = static_cast<const uint16_t*>(x);
  order_blocks(w, row, [=](int64_t i) { return from[i]; });
  if (w->symmetric || !sums) return;
  for (int64_t g = 0; g < w->groups; ++g) {
    float lanes[BLOCK] = {};
    for (int64_t b = blocks_before(w, g); b < blocks_before(w, g + 1); ++b)
      for (int i = 0; i < BLOCK; ++i) lanes[i] += from_bfloat16(row[b * BLOCK + i]);
    sums[g] = sum_of_block(lanes);
  }
}

// Up to BLOCK numbers as whole ones of at most 127 times a scale, which infinity and NaN make NaN: they must not become
// numbers. Each block gets a scale of its own, so that an outlier costs its 31 neighbours precision and nobody else.
struct RoundedBlock {
  int32_t values[BLOCK];
  float scale, sum;
};
INLINE RoundedBlock round_block(const float* x, int count) {
  RoundedBlock out;
  int32_t largest_bits = 0;  // positive floats have the order of their bits, infinity and NaN above the numbers
  for (int i = 0; i < count; ++i) {
    const int32_t size = static_cast<int32_t>(to_bits(x[i]) & 0x7fffffff);
    largest_bits = size > largest_bits ? size : largest_bits;
  }
  const float largest = from_bits(static_cast<uint32_t>(largest_bits));
  const bool rounds = largest > 1e-30f && largest_bits < 0x7f800000;
  const float inverse = rounds ? 127 / largest : 0;
  int sum = 0;
  for (int i = 0; i < count; ++i) {
    const float scaled = rounds ? x[i] * inverse : 0;
    out.values[i] = static_cast<int32_t>(scaled + __builtin_copysignf(0.5f, scaled));
    sum += out.values[i];
  }
  out.scale = largest_bits < 0x7f800000 ? largest / 127 : from_bits(0x7fc00000);
  out.sum = out.scale * static_cast<float>(sum);
  return out;
}

void load_int8(const Image* w, const float* ordered, int8_t* row, float* scales, float* sums) {
  uint8_t order[BLOCK];
  for (int i = 0; i < BLOCK; ++i) order[i] = static_cast<uint8_t>(quad_input(w->bits, i / 4, i % 4));
  for (int64_t g = 0; g < (w->per_ic ? 1 : w->groups); ++g) sums[g] = 0;
  for (int64_t b = 0; b < w->blocks; ++b) {
    const RoundedBlock block = round_block(ordered + b * BLOCK, BLOCK);
    for (int i = 0; i < BLOCK; ++i) row[b * BLOCK + i] = static_cast<int8_t>(block.values[order[i]]);
    scales[b] = block.scale;
    sums[w->per_ic ? 0 : b / w->group_blocks] += block.sum;
  }
}

// In the order of inputs; returns the sum of what they are rounded to.
float round_plain(const float* x, int64_t k, int8_t* row, float* scales) {
  float sum = 0;
  for (int64_t from = 0; from < k; from += BLOCK) {
    const int count = k - from < BLOCK ? static_cast<int>(k - from) : BLOCK;
    const RoundedBlock block = count == BLOCK ? round_block(x + from, BLOCK) : round_block(x + from, count);
    for (int i = 0; i < count; ++i) row[from + i] = static_cast<int8_t>(block.values[i]);
    scales[from / BLOCK] = block.scale;
    sum += block.sum;
  }
  return sum;
}

float scale_inputs(const Image* w, const float* ordered, int64_t group, float* scaled, int base) {
  const int64_t count = w->blocks * BLOCK;
  const uint16_t* scales = scales_of(w) + group * count;
  for (int64_t i = 0; i < count; i += STRIP)
    store_floats(multiplied(load_floats(ordered + i), load_float16(scales + i)), scaled + i);
  if (w->symmetric && base == w->mid) return 0;
  const uint8_t* zeros = w->symmetric ? nullptr : zeros_of(w) + group * count;
  float lanes[BLOCK] = {};
  for (int64_t i = 0; i < count; i += BLOCK)
    for (int j = 0; j < BLOCK; ++j) lanes[j] += scaled[i + j] * static_cast<float>(base - (zeros ? zeros[i + j] : w->mid));
  return sum_of_block(lanes);
}

}  // namespace
