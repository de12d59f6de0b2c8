// int8 activations: unsigned codes times signed bytes, four inputs of 16 rows in an instruction, summed exactly in
// int32 over a block of 32. Compiled as avx512.cpp, with -mavx512vnni.
#if defined(__x86_64__)
#define LANES 16
#include <immintrin.h>

#include "wide.h"

namespace {

// As int8_strips.h asks.
template <int BITS, int M>
INLINE void sums_of_block(const uint32_t* block, const int8_t* x, int64_t stride, Floats (&sums)[M]) {
  constexpr int CHAINS = M == 1 ? 4 : M == 2 ? 2 : 1;
  constexpr int L = low_width(BITS), H = high_width(BITS);
  constexpr uint32_t low_mask = 0x01010101u * ((1u << L) - 1), high_mask = 0x01010101u * (((1u << H) - 1) << L % 8);
  __m512i dots[CHAINS][M];
  for (auto& chain : dots)
    for (__m512i& dot : chain) dot = _mm512_setzero_si512();
  unrolled<BLOCK / 4>([&](auto quad) INLINE_LAMBDA {
    constexpr int k = quad_input(BITS, quad, 0);
    WordLanes codes = load_words(block + low_vector(BITS, k) * STRIP).part[0] >> low_bit(BITS, k) & low_mask;
    if (H) {
      const Words high = load_words(block + high_vector(BITS, k) * STRIP);
      codes |= move_bit(high.part[0], high_bit(BITS, k), L) & high_mask;
    }
    unrolled<M>([&](int m) INLINE_LAMBDA {
      int32_t four;
      __builtin_memcpy(&four, x + m * stride + quad * 4, sizeof four);
      __m512i& dot = dots[quad % CHAINS][m];
      dot = _mm512_dpbusd_epi32(dot, reinterpret_cast<__m512i>(codes), _mm512_set1_epi32(four));
    });
  });
  unrolled<M>([&](int m) INLINE_LAMBDA {
    __m512i sum = dots[0][m];
    for (int c = 1; c < CHAINS; ++c) sum = _mm512_add_epi32(sum, dots[c][m]);
    sums[m] = {{_mm512_cvtepi32_ps(sum)}};
  });
}

}  // namespace

#include "int8_strips.h"

void multiply_vnni(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  with_bits(w->bits, [&](auto bits) { multiply_bits_int8<bits>(w, x, y, from, to); });
}
#endif
