// int8 activations by AVX2: unsigned codes times signed bytes, in pairs that are summed in 16 bits while those hold them.
// Included with LANES 8.
#pragma once

#include <immintrin.h>

#include "fields.h"
#include "totals.h"

namespace {

// Pairs of a code and an activation, at most 127 in size, whose sum 16 bits hold. Codes of 8 bits are taken in halves.
constexpr int bits_at_once(int bits) { return bits == 8 ? 4 : bits; }
constexpr int quads_in_sum(int bits) {
  int quads = 1;
  while (2 * quads <= BLOCK / 4 && 2 * quads * 2 * 127 * ((1 << bits_at_once(bits)) - 1) <= 32767) quads *= 2;
  return quads;
}
static_assert(quads_in_sum(4) == 8 && quads_in_sum(5) == 4 && quads_in_sum(6) == 2 && quads_in_sum(8) == 8, "sums fit 16 bits");

INLINE __m256i bits_of(WordLanes words) { return reinterpret_cast<__m256i>(words); }

// Sums of integers may be taken in any order, and compilers put them off until there are more than registers: with four rows
// that took three times as long.
INLINE __m256i added_now(__m256i sum) {
  __asm__("" : "+x"(sum));
  return sum;
}

// The codes of four inputs (image.h, quad_input) of 8 rows as bytes.
template <int BITS, int QUAD>
INLINE Words codes_of_quad(const uint32_t* block) {
  constexpr int k = quad_input(BITS, QUAD, 0), L = low_width(BITS), H = high_width(BITS);
  Words low = load_words(block + low_vector(BITS, k) * STRIP);
  const Words high = H ? load_words(block + high_vector(BITS, k) * STRIP) : Words{};
  for (int p = 0; p < PARTS; ++p) {
    low.part[p] = low.part[p] >> low_bit(BITS, k);
    if (L < 8) low.part[p] &= 0x01010101u * ((1u << L) - 1);
    if (H) low.part[p] |= move_bit(high.part[p], high_bit(BITS, k), L) & 0x01010101u * (((1u << H) - 1) << L % 8);
  }
  return low;
}

// The sums of a block's products in 32 bits. HALVES: of a code that are multiplied one by one.
template <int BITS, int M>
INLINE void dots_of_block(const uint32_t* block, const int8_t* const (&rows)[M], __m256i (&dots)[M][PARTS]) {
  constexpr int HALVES = BITS == 8 ? 2 : 1, QUADS = quads_in_sum(BITS);
  unrolled<BLOCK / 4 / QUADS>([&](auto part_sum) INLINE_LAMBDA {
    __m256i sums[M][HALVES][PARTS];
    unrolled<QUADS>([&](auto i) INLINE_LAMBDA {
      constexpr int quad = part_sum * QUADS + i;
      const Words codes = codes_of_quad<BITS, quad>(block);
      unrolled<M>([&](int m) INLINE_LAMBDA {
        int32_t four;
        __builtin_memcpy(&four, rows[m] + quad * 4, sizeof four);
        const __m256i x = _mm256_set1_epi32(four);
        unrolled<HALVES * PARTS>([&](int n) INLINE_LAMBDA {
          const int p = n % PARTS, half = n / PARTS;
          WordLanes part = codes.part[p];
          if (HALVES > 1) part = part >> 4 * half & 0x0f0f0f0f;
          const __m256i pairs = _mm256_maddubs_epi16(bits_of(part), x);
          sums[m][half][p] = i ? added_now(_mm256_add_epi16(sums[m][half][p], pairs)) : pairs;
        });
      });
    });
    unrolled<M * PARTS>([&](int n) INLINE_LAMBDA {
      const int m = n / PARTS, p = n % PARTS;
      __m256i sum = _mm256_madd_epi16(sums[m][0][p], _mm256_set1_epi16(1));
      if (HALVES > 1) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(sums[m][HALVES - 1][p], _mm256_set1_epi16(16)));
      dots[m][p] = part_sum ? _mm256_add_epi32(dots[m][p], sum) : sum;
    });
  });
}

template <int BITS, int M>
void multiply_strips_int8(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  const int64_t groups = w->per_ic ? 1 : w->groups;
  for (int64_t strip = from; strip < to; ++strip) {
    const uint32_t* block = codes_of(w, strip);
    const int8_t* rows[M];
    unrolled<M>([&](int m) INLINE_LAMBDA { rows[m] = static_cast<const int8_t*>(x.rows) + m * x.stride; });
    Totals<M> totals;
    for (int64_t g = 0; g < groups; ++g) {
      Floats products[M];
      for (Floats& sum : products) sum = all(0);
      const int64_t end = w->per_ic ? w->blocks : blocks_before(w, g + 1);
      for (int64_t b = blocks_before(w, g); b < end; ++b, block += BITS * STRIP) {
        __m256i dots[M][PARTS];
        dots_of_block<BITS>(block, rows, dots);
        unrolled<M>([&](int m) INLINE_LAMBDA {
          Floats sums;
          for (int p = 0; p < PARTS; ++p) sums.part[p] = _mm256_cvtepi32_ps(dots[m][p]);
          products[m] = multiply_add(sums, x.scales[m * w->blocks + b], products[m]);
          rows[m] += BLOCK;
        });
      }
      totals.add_int8_group(w, x, strip, g, products);
    }
    totals.store(w, y, strip);
  }
}

template <int BITS>
void multiply_bits_int8(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  switch (x.m) {
    case 1: return multiply_strips_int8<BITS, 1>(w, x, y, from, to);
    case 2: return multiply_strips_int8<BITS, 2>(w, x, y, from, to);
    case 4: return multiply_strips_int8<BITS, 4>(w, x, y, from, to);
    default: return multiply_strips_int8<BITS, LARGEST_TILE>(w, x, y, from, to);
  }
}

void multiply_int8(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  with_bits(w->bits, [&](auto bits) { multiply_bits_int8<bits>(w, x, y, from, to); });
}

}  // namespace
