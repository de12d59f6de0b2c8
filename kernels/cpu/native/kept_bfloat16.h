// The product of kept groups (kept.h) with one row of bfloat16: two slots of 16 inputs in an instruction, 4-bit codes.
// Codes and zeros are exact in bfloat16 and their products in the float32 sums, so nothing is lost. Loads are what it
// waits for, so four slots share one of their codes, of their scales and of their zeros. Included after wide.h.
#pragma once

#include <immintrin.h>

#include "kept.h"
#include "wide.h"

namespace {

constexpr int64_t PAIR_PLACE = PLACE / 2;  // groups of x take half as much as floats

struct ZerosAndScales {
  static constexpr int64_t RUN = 256;  // slots; widened before they are used, as in kept_rows.h
  alignas(64) float scales[RUN];
  alignas(64) uint32_t zeros[RUN];  // less than nothing, as two bfloat16
  INLINE_MEMBER void load(const Image* w, int64_t from, int64_t to) {
    for (int64_t slot = from; slot < to; slot += UNIT) {
      fetch_slots<UNIT / 2>(w, slot, UNIT / 2);
      const Floats wide = load_float16(at_offset<uint16_t>(w, w->scales) + slot);
      const Floats shifts = load_offsets(w, slot, 0);
      const WordLanes upper = reinterpret_cast<WordLanes>(shifts.part[0]);
      const WordLanes twice = upper | upper >> 16;
      __builtin_memcpy(scales + (slot - from), &wide, sizeof wide);
      __builtin_memcpy(zeros + (slot - from), &twice, sizeof twice);
    }
  }
};

// The slots of a pair fill half a register each, whose 64-bit words are a slot's codes from one, two, three bits on.
struct PairDecoder {
  __m512i table, shifts, first, second;  // of four slots' codes, and the same of their scales and zeros below
  __m512i first_words, second_words;
  PairDecoder() {
    uint16_t values[32], amounts[32];
    for (int i = 0; i < 32; ++i) {
      values[i] = to_bfloat16(static_cast<float>(i % 16));  // a lookup reads 5 bits, of which one is the next code's
      amounts[i] = static_cast<uint16_t>(i / 4 % 4 * 4);
    }
    table = _mm512_loadu_si512(values);
    shifts = _mm512_loadu_si512(amounts);
    first = _mm512_set_epi64(1, 1, 1, 1, 0, 0, 0, 0);
    second = _mm512_set_epi64(3, 3, 3, 3, 2, 2, 2, 2);
    first_words = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    second_words = _mm512_add_epi32(first_words, _mm512_set1_epi32(2));
  }
  INLINE_MEMBER __m512bh codes(__m512i four, __m512i which) const {
    const __m512i shifted = _mm512_srlv_epi16(_mm512_permutexvar_epi64(which, four), shifts);
    return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(shifted, table));
  }
};

INLINE __m512bh pair_of_inputs(const char* row, const uint16_t* places) {
  const auto at = [&](int i) { return reinterpret_cast<const __m256i*>(row + static_cast<int64_t>(places[i]) * PAIR_PLACE); };
  return reinterpret_cast<__m512bh>(_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_load_si256(at(0))), _mm256_load_si256(at(1)), 1));
}

INLINE __m512 pair_product(__m512bh codes, __m512i zeros, __m512bh inputs) {
  const __m512 product = _mm512_dpbf16_ps(_mm512_setzero_ps(), codes, inputs);
  return _mm512_dpbf16_ps(product, reinterpret_cast<__m512bh>(zeros), inputs);
}

// Of both halves of both sums.
INLINE __m128 sums_of_halves(__m512 first, __m512 second) {
  const __m256 one = _mm256_hadd_ps(_mm512_castps512_ps256(first), _mm512_extractf32x8_ps(first, 1));
  const __m256 two = _mm256_hadd_ps(_mm512_castps512_ps256(second), _mm512_extractf32x8_ps(second, 1));
  const __m256 all = _mm256_hadd_ps(one, two);
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
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
      const __m512i zeros = _mm512_castsi128_si512(_mm_load_si128(reinterpret_cast<const __m128i*>(grids.zeros + i)));
      const __m512 scales = _mm512_castps128_ps512(_mm_load_ps(grids.scales + i));
      const __m512 one = pair_product(decode.codes(codes, decode.first), _mm512_permutexvar_epi32(decode.first_words, zeros),
                                      pair_of_inputs(row, places));
      const __m512 two = pair_product(decode.codes(codes, decode.second), _mm512_permutexvar_epi32(decode.second_words, zeros),
                                      pair_of_inputs(row, places + 2));
      first = _mm512_fmadd_ps(one, _mm512_permutexvar_ps(decode.first_words, scales), first);
      second = _mm512_fmadd_ps(two, _mm512_permutexvar_ps(decode.second_words, scales), second);
    }
  }
  return sums_of_halves(first, second);
}

}  // namespace

// A group as its codes meet it: place 4 b + w holds the input whose code is at bit 4 b of 16-bit word w. Half the bytes of
// floats, so that PLACE halves too: where x outgrows the first cache, products take twice as long.
void load_kept_bfloat16(const Image* w, const void* x, uint16_t* row) {
  const __m256i order = _mm256_set_epi16(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const char* from = static_cast<const char*>(x);
  const int64_t whole = w->k / UNIT, left = w->k % UNIT;
  const auto put = [&](int64_t g, __m256i inputs) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(row + g * UNIT), _mm256_permutexvar_epi16(order, inputs));
  };
  for (int64_t g = 0; g < whole; ++g) put(g, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + g * 2 * UNIT)));
  if (left) put(whole, _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1 << left) - 1), from + whole * 2 * UNIT));
  put(w->groups, _mm256_setzero_si256());
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
