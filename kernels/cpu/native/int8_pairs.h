// int8 activations by AVX2: unsigned codes times signed bytes, in pairs that are summed in 16 bits while those hold them.
// Included with LANES 8.
#pragma once

#include <immintrin.h>

#include "int8_codes.h"

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

// As int8_strips.h asks. HALVES: of a code that are multiplied one by one.
template <int BITS, int M>
INLINE void sums_of_block(const uint32_t* block, const int8_t* x, int64_t stride, Floats (&sums_of_rows)[M]) {
  constexpr int HALVES = BITS == 8 ? 2 : 1, QUADS = quads_in_sum(BITS);
  __m256i dots[M][PARTS];
  unrolled<BLOCK / 4 / QUADS>([&](auto part_sum) INLINE_LAMBDA {
    __m256i sums[M][HALVES][PARTS];
    unrolled<QUADS>([&](auto i) INLINE_LAMBDA {
      constexpr int quad = part_sum * QUADS + i;
      const Words codes = codes_of_quad<BITS, quad>(block);
      unrolled<M>([&](int m) INLINE_LAMBDA {
        const __m256i inputs = _mm256_set1_epi32(inputs_of_quad(x + m * stride, quad));
        unrolled<HALVES * PARTS>([&](int n) INLINE_LAMBDA {
          const int p = n % PARTS, half = n / PARTS;
          WordLanes part = codes.part[p];
          if (HALVES > 1) part = part >> 4 * half & 0x0f0f0f0f;
          const __m256i pairs = _mm256_maddubs_epi16(bits_of(part), inputs);
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
  unrolled<M * PARTS>([&](int n) INLINE_LAMBDA {
    sums_of_rows[n / PARTS].part[n % PARTS] = _mm256_cvtepi32_ps(dots[n / PARTS][n % PARTS]);
  });
}

}  // namespace

#include "int8_strips.h"

namespace {

void multiply_int8(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  with_bits(w->bits, [&](auto bits) { multiply_bits_int8<bits>(w, x, y, from, to); });
}

}  // namespace
