// The product of kept groups (kept.h) with one row of bfloat16: two slots of 16 inputs in an instruction, 4-bit codes.
// Codes and zeros are exact in bfloat16 and their products in the float32 sums, so nothing is lost. Loads are what it
// waits for, so four slots share one of their codes, of their scales and of their zeros. Included after wide.h.
#pragma once

#include <immintrin.h>

#include "kept.h"
#include "wide.h"

namespace {

struct ZerosAndScales {
  static constexpr int64_t RUN = 256;  // slots; widened before they are used, as in kept_rows.h
  alignas(64) float scales[RUN];
  alignas(64) uint32_t zeros[RUN];  // less than nothing, as two bfloat16
  INLINE_MEMBER void load(const Image* w, int64_t from, int64_t to) {
    for (int64_t slot = from; slot < to; slot += UNIT) {
      const Floats wide = load_float16(at_offset<uint16_t>(w, w->scales) + slot);
      const Floats shifts = w->symmetric ? all(static_cast<float>(-w->mid)) : load_offsets(zeros_of(w) + slot, 0);
      const WordLanes upper = reinterpret_cast<WordLanes>(shifts.part[0]);
      const WordLanes twice = upper | upper >> 16;
      __builtin_memcpy(scales + (slot - from), &wide, sizeof wide);
      __builtin_memcpy(zeros + (slot - from), &twice, sizeof twice);
    }
  }
};

struct PairDecoder {
  __m512i table, shifts;
  PairDecoder() {
    uint16_t values[32], amounts[32];
    for (int i = 0; i < 32; ++i) {
      values[i] = to_bfloat16(static_cast<float>(i % 16));  // a lookup reads 5 bits, of which one is the next code's
      amounts[i] = static_cast<uint16_t>(i / 8 * 4);
    }
    table = _mm512_loadu_si512(values);
    shifts = _mm512_loadu_si512(amounts);
  }
  INLINE_MEMBER __m512bh operator()(__m512i words) const {
    return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(_mm512_srlv_epi16(words, shifts), table));
  }
};

INLINE __m512bh pair_of_inputs(const char* row, const uint16_t* places) {
  const char *first = row + static_cast<int64_t>(places[0]) * PLACE, *second = row + static_cast<int64_t>(places[1]) * PLACE;
  return reinterpret_cast<__m512bh>(_mm512_mask_loadu_epi64(_mm512_loadu_si512(first), 0xaa, second));
}

INLINE __m512 pair_product(__m512bh codes, __m512i zeros, __m512bh inputs) {
  const __m512 product = _mm512_dpbf16_ps(_mm512_setzero_ps(), codes, inputs);
  return _mm512_dpbf16_ps(product, reinterpret_cast<__m512bh>(zeros), inputs);
}

INLINE __m128 sum_of_blocks(__m512 sums) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Sums of four rows.
INLINE __m128 sum_four(const Image* w, const PairDecoder& decode, const char* row, int64_t four) {
  const int64_t from = starts_of_fours(w)[four], end = starts_of_fours(w)[four + 1];
  __m512 first = _mm512_setzero_ps(), second = first;
  ZerosAndScales grids;
  for (int64_t run = from; run < end; run += grids.RUN) {
    const int64_t count = end - run < grids.RUN ? end - run : grids.RUN;
    grids.load(w, run, run + count);
    const uint8_t* at = kept_codes(w) + run * (UNIT / 2);
    const uint16_t* places = places_of(w) + run;
    for (int64_t i = 0; i < count; i += FOUR, at += FOUR * UNIT / 2, places += FOUR) {
      const __m512i codes = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
      const __m512i zeros = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(grids.zeros + i)));
      const __m512 scales = _mm512_broadcast_f32x4(_mm_load_ps(grids.scales + i));
      const __m512 one = pair_product(decode(_mm512_shuffle_i64x2(codes, codes, 0)), _mm512_unpacklo_epi32(zeros, zeros),
                                      pair_of_inputs(row, places));
      const __m512 two = pair_product(decode(_mm512_shuffle_i64x2(codes, codes, 0x55)), _mm512_unpackhi_epi32(zeros, zeros),
                                      pair_of_inputs(row, places + 2));
      first = _mm512_fmadd_ps(one, _mm512_unpacklo_ps(scales, scales), first);
      second = _mm512_fmadd_ps(two, _mm512_unpackhi_ps(scales, scales), second);
    }
  }
  return _mm_hadd_ps(sum_of_blocks(first), sum_of_blocks(second));
}

}  // namespace

// Word w of block b (of four 128-bit ones) is input 4 (w % 4) + b of the group, twice: the first slot of a pair takes
// the lower half of each block, the second the upper one.
void load_kept_bfloat16(const Image* w, const void* x, uint16_t* row) {
  const uint16_t* from = static_cast<const uint16_t*>(x);
  for (int64_t g = 0; g <= w->groups; ++g, from += UNIT, row += 2 * UNIT) {
    const int64_t left = g < w->groups ? w->k - g * UNIT : 0;
    uint16_t inputs[UNIT] = {};
    __builtin_memcpy(inputs, from, static_cast<size_t>(2 * (left < UNIT ? left : UNIT)));
    for (int i = 0; i < 2 * UNIT; ++i) row[i] = inputs[i % 4 * 4 + i / 8];
  }
}

void multiply_kept_bfloat16(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  const PairDecoder decode;
  const int64_t last = first_row(w, to);
  for (int64_t first = first_row(w, from); first < last; first += STRIP) {
    float totals[STRIP], sums[FOUR];
    for (int64_t four = first / FOUR; four < (first + STRIP) / FOUR; ++four) {
      _mm_storeu_ps(sums, sum_four(w, decode, static_cast<const char*>(x.rows), four));
      for (int r = 0; r < FOUR; ++r) totals[row_order(w)[four * FOUR + r]] = sums[r];
    }
    Floats outputs;
    __builtin_memcpy(&outputs, totals, sizeof outputs);
    store_row(y, 0, first, last - first < STRIP ? static_cast<int>(last - first) : STRIP, outputs);
  }
}
