// int8 activations by VNNI: unsigned codes times signed bytes, four inputs of LANES rows in an instruction, summed exactly
// in int32 over a block of 32. Included with LANES 8 or 16.
#pragma once

#include <immintrin.h>

#include "int8_codes.h"

namespace {

#if LANES == 16
INLINE IntLanes add_dots(IntLanes sum, WordLanes codes, int32_t four) {
  return (IntLanes)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(four));
}
#elif defined(__AVXVNNI__)
INLINE IntLanes add_dots(IntLanes sum, WordLanes codes, int32_t four) {
  return (IntLanes)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(four));
}
#else
INLINE IntLanes add_dots(IntLanes sum, WordLanes codes, int32_t four) {
  return (IntLanes)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(four));
}
#endif

// As int8_strips.h asks. CHAINS: sums that do not wait for each other, as an instruction takes four or five cycles.
template <int BITS, int M>
INLINE void sums_of_block(const uint32_t* block, const int8_t* x, int64_t stride, Floats (&sums)[M]) {
  constexpr int CHAINS = M * PARTS == 1 ? 4 : M * PARTS == 2 ? 2 : 1;
  IntLanes dots[CHAINS][M][PARTS] = {};
  unrolled<BLOCK / 4>([&](auto quad) INLINE_LAMBDA {
    const Words codes = codes_of_quad<BITS, quad>(block);
    unrolled<M>([&](int m) INLINE_LAMBDA {
      const int32_t four = inputs_of_quad(x + m * stride, quad);
      unrolled<PARTS>([&](int p) INLINE_LAMBDA {
        IntLanes& dot = dots[quad % CHAINS][m][p];
        dot = add_dots(dot, codes.part[p], four);
      });
    });
  });
  unrolled<M * PARTS>([&](int n) INLINE_LAMBDA {
    const int m = n / PARTS, p = n % PARTS;
    IntLanes sum = dots[0][m][p];
    for (int c = 1; c < CHAINS; ++c) sum += dots[c][m][p];
    sums[m].part[p] = __builtin_convertvector(sum, FloatLanes);
  });
}

}  // namespace

#include "int8_strips.h"

namespace {

void multiply_quads(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  with_bits(w->bits, [&](auto bits) { multiply_bits_int8<bits>(w, x, y, from, to); });
}

}  // namespace
