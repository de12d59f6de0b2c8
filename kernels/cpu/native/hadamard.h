// The rotation of one row (weight.h): signs, butterflies for the power of two, sums of four inputs for the base matrix.
// Included after wide.h, once for each instruction set.
#pragma once

#include "wide.h"

namespace {

constexpr int RADIX = LANES == 16 || LANES == 4 ? 16 : 8;  // registers of a pass: half of what the processors have
constexpr int GROUPS = 8;                                  // of four inputs, whose sums take 16 KB: they stay in the first cache

INLINE Floats change_signs(Floats values, uint32_t signs) {
  for (int p = 0; p < PARTS; ++p) {
    WordLanes to_the_top;
    for (int i = 0; i < LANES; ++i) to_the_top[i] = static_cast<uint32_t>(31 - p * LANES - i);
    const WordLanes flips = (signs - WordLanes{}) << to_the_top & 0x80000000u;
    values.part[p] = reinterpret_cast<FloatLanes>(reinterpret_cast<WordLanes>(values.part[p]) ^ flips);
  }
  return values;
}

template <int STEP, int... I>
INLINE FloatLanes swap_lanes(FloatLanes values, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(values, values, (I ^ STEP)...);
#else
  return __builtin_shuffle(values, IntLanes{(I ^ STEP)...});
#endif
}

// Each value and the one STEP lanes on become their sum and their difference.
template <int STEP>
INLINE Floats butterfly_within(Floats values) {
  if constexpr (STEP >= LANES) {
    for (int p = 0; p < PARTS; ++p) {
      if (p & STEP / LANES) continue;
      const FloatLanes first = values.part[p], second = values.part[p + STEP / LANES];
      values.part[p] = first + second;
      values.part[p + STEP / LANES] = first - second;
    }
  } else {
    FloatLanes ones;
    for (int i = 0; i < LANES; ++i) ones[i] = i & STEP ? -1.0f : 1.0f;
    for (FloatLanes& part : values.part)
      part = part * ones + swap_lanes<STEP>(part, std::make_integer_sequence<int, LANES>{});
  }
  return values;
}

// Signs, scale and the first BITS butterflies. row: filled up to a multiple of 16 with zeros.
template <int BITS>
INLINE void load_and_mix(const Rotation* r, const void* x, Type type, float* row) {
  const int64_t size = type == FLOAT32 ? 4 : 2;
  for (int64_t i = 0; i < r->width; i += STRIP) {
    const char* from = static_cast<const char*>(x) + i * size;
    char last[4 * STRIP] = {};
    if (i + STRIP > r->width) from = static_cast<char*>(__builtin_memcpy(last, from, static_cast<size_t>((r->width - i) * size)));
    Floats values = change_signs(load_from(type, from), r->signs[i / STRIP]);
    for (FloatLanes& part : values.part) part *= r->scale;
    if constexpr (BITS > 0) values = butterfly_within<1>(values);
    if constexpr (BITS > 1) values = butterfly_within<2>(values);
    if constexpr (BITS > 2) values = butterfly_within<4>(values);
    if constexpr (BITS > 3) values = butterfly_within<8>(values);
    store_floats(values, row + i);
  }
}

// The next BITS butterflies of the whole row, from values `step` apart on.
template <int BITS>
void mix_apart(float* row, int64_t width, int64_t step) {
  constexpr int COUNT = 1 << BITS;
  for (int64_t first = 0; first < width; first += COUNT * step)
    for (int64_t i = 0; i < step; i += LANES) {
      float* at = row + first + i;
      FloatLanes values[COUNT];
      unrolled<COUNT>([&](int c) INLINE_LAMBDA { __builtin_memcpy(&values[c], at + c * step, sizeof values[c]); });
      unrolled<BITS>([&](auto bit) INLINE_LAMBDA {
        constexpr int far = 1 << bit;
        unrolled<COUNT>([&](int c) INLINE_LAMBDA {
          if (c & far) return;
          const FloatLanes one = values[c], other = values[c + far];
          values[c] = one + other;
          values[c + far] = one - other;
        });
      });
      unrolled<COUNT>([&](int c) INLINE_LAMBDA { __builtin_memcpy(at + c * step, &values[c], sizeof values[c]); });
    }
}

INLINE void mix(float* row, int64_t width, int64_t rest) {
  for (int64_t step = STRIP; step < rest;) {
    const int64_t left = rest / step;
    const int bits = RADIX >= 16 && left >= 16 ? 4 : left >= 8 ? 3 : left >= 4 ? 2 : 1;
    if (bits == 4) mix_apart<4>(row, width, step);
    if (bits == 3) mix_apart<3>(row, width, step);
    if (bits == 2) mix_apart<2>(row, width, step);
    if (bits == 1) mix_apart<1>(row, width, step);
    step <<= bits;
  }
}

// The sixteen sums of four inputs with all their signs: number i subtracts input b where bit b of i is set.
template <int WIDE>
INLINE void sum_four(const float* inputs, int64_t rest, Floats (&sums)[16][WIDE]) {
  for (int v = 0; v < WIDE; ++v)
    for (int p = 0; p < PARTS; ++p) {
      FloatLanes in[4];
      for (int b = 0; b < 4; ++b) __builtin_memcpy(&in[b], inputs + b * rest + v * STRIP + p * LANES, sizeof in[b]);
      const FloatLanes low[4] = {in[0] + in[1], in[1] - in[0], in[0] - in[1], -in[0] - in[1]};
      const FloatLanes high[4] = {in[2] + in[3], in[3] - in[2], in[2] - in[3], -in[2] - in[3]};
      for (int i = 0; i < 16; ++i) sums[i][v].part[p] = low[i & 3] + high[i >> 2];
    }
}

// Columns [0, 16 WIDE) of a block [base][rest] times H_base, to out [base][16 WIDE]. Sums of four, found by their
// signs, leave a quarter of the additions; columns past `rest` hold whatever follows and are not read from `out`.
template <int WIDE>
void times_base(const Rotation* r, const float* column, int64_t rest, Floats* out) {
  const int64_t quarters = r->base / 4;
  Floats sums[GROUPS][16][WIDE];
  for (int64_t first = 0; first < quarters; first += GROUPS) {
    const int count = static_cast<int>(quarters - first < GROUPS ? quarters - first : GROUPS);
    for (int g = 0; g < count; ++g) sum_four<WIDE>(column + (first + g) * 4 * rest, rest, sums[g]);
    for (int64_t i = 0; i < r->base; ++i) {
      const uint8_t* signs = r->quarters + i * quarters + first;
      Floats total[WIDE];
      for (int v = 0; v < WIDE; ++v) total[v] = first ? out[i * WIDE + v] : all(0);
      for (int g = 0; g < count; ++g)
        for (int v = 0; v < WIDE; ++v) total[v] = add(total[v], sums[g][signs[g]][v]);
      for (int v = 0; v < WIDE; ++v) out[i * WIDE + v] = total[v];
    }
  }
}

template <int WIDE>
void times_bases(const Rotation* r, float* row, int64_t rest, Floats* out) {
  for (int64_t first = 0; first < r->width; first += r->block)
    for (int64_t j = 0; j < rest; j += WIDE * STRIP) {
      float* column = row + first + j;
      times_base<WIDE>(r, column, rest, out);
      const int64_t count = rest < WIDE * STRIP ? rest : WIDE * STRIP;
      for (int64_t i = 0; i < r->base; ++i) __builtin_memcpy(column + i * rest, out + i * WIDE, static_cast<size_t>(4 * count));
    }
}

INLINE void store_rotated(const float* row, int64_t width, Type type, void* out) {
  const int64_t size = type == FLOAT32 ? 4 : 2;
  for (int64_t i = 0; i < width; i += STRIP) {
    const Floats values = load_floats(row + i);
    char* to = static_cast<char*>(out) + i * size;
    if (i + STRIP <= width) {
      round_to(type, values, to);
      continue;
    }
    char last[4 * STRIP];
    round_to(type, values, last);
    __builtin_memcpy(to, last, static_cast<size_t>((width - i) * size));
  }
}

void rotate(const Rotation* r, const void* x, Type type, void* out, float* workspace) {
  const int64_t rest = r->block / r->base, padded = (r->width + STRIP - 1) / STRIP * STRIP + STRIP;
  float* row = workspace;
  if (rest == 1) load_and_mix<0>(r, x, type, row);
  else if (rest == 2) load_and_mix<1>(r, x, type, row);
  else if (rest == 4) load_and_mix<2>(r, x, type, row);
  else if (rest == 8) load_and_mix<3>(r, x, type, row);
  else load_and_mix<4>(r, x, type, row);
  mix(row, r->width, rest);
  Floats* columns = reinterpret_cast<Floats*>(workspace + padded);
  if (r->base > 1 && rest > STRIP) times_bases<2>(r, row, rest, columns);
  else if (r->base > 1) times_bases<1>(r, row, rest, columns);
  store_rotated(row, r->width, type, out);
}

}  // namespace
