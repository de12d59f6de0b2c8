// A tile of trellis codes times one row of int8 activations: whole numbers are summed over a block of 32 inputs, and times
// the scale of its activations added up. Included with instructions that multiply bytes, and by the plain level.
#pragma once

#include "trellis_tiles.h"

namespace {

struct Dots { IntLanes part[PARTS]; };

#if (LANES == 16 && defined(__AVX512VNNI__)) || (LANES == 8 && (defined(__AVX512VNNI__) || defined(__AVXVNNI__)))
INLINE IntLanes add_dot(IntLanes sum, WordLanes bytes, int8_t x) {
#if LANES == 16
  return (IntLanes)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, _mm512_set1_epi8(x));
#elif defined(__AVXVNNI__)
  return (IntLanes)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)bytes, _mm256_set1_epi8(x));
#else
  return (IntLanes)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)bytes, _mm256_set1_epi8(x));
#endif
}
INLINE IntLanes add_two_dots(IntLanes sum, WordLanes a, int8_t x, WordLanes b, int8_t y) {
  return add_dot(add_dot(sum, a, x), b, y);
}
#elif LANES == 8
// Two bytes of two columns, at most 63 times 127 each: 32004, which 16 bits hold.
INLINE IntLanes add_two_dots(IntLanes sum, WordLanes a, int8_t x, WordLanes b, int8_t y) {
  const __m256i first = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), _mm256_set1_epi8(x));
  const __m256i second = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(b), _mm256_set1_epi8(y));
  return sum + (IntLanes)_mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1));
}
#else
INLINE IntLanes add_two_dots(IntLanes sum, WordLanes a, int8_t x, WordLanes b, int8_t y) {
  return sum + reinterpret_cast<IntLanes>(sums_of_bytes(a)) * x + reinterpret_cast<IntLanes>(sums_of_bytes(b)) * y;
}
#endif

// sums [strip][16] of one row of x, whose middle is not taken off.
template <int BITS, int HEIGHT>
__attribute__((noinline)) void multiply_row_int8(const trellis::Stored* w, const Inputs& x, int64_t tile, float* sums) {
  using W = Walk<BITS, HEIGHT>;
  const int8_t* row = static_cast<const int8_t*>(x.rows);
  const uint8_t* column = w->codes + tile * w->k * W::BYTES;
  Floats own[W::STRIPS];
  for (Floats& sum : own) sum = all(0);
  for (int64_t k = 0, block = 0; k < w->k; ++block) {
    const int64_t end = k + BLOCK < w->k ? k + BLOCK : w->k;
    Dots dots[W::STRIPS] = {};
    for (; k + 2 <= end; k += 2, column += 2 * W::BYTES)
      for_each_strip<BITS, HEIGHT, 2>(column, [&](auto s, const Words (&bytes)[2]) INLINE_LAMBDA {
        for (int p = 0; p < PARTS; ++p)
          dots[s].part[p] = add_two_dots(dots[s].part[p], bytes[0].part[p], row[k], bytes[1].part[p], row[k + 1]);
      });
    for (; k < end; ++k, column += W::BYTES)
      for_each_strip<BITS, HEIGHT, 1>(column, [&](auto s, const Words (&bytes)[1]) INLINE_LAMBDA {
        for (int p = 0; p < PARTS; ++p)
          dots[s].part[p] = add_two_dots(dots[s].part[p], bytes[0].part[p], row[k], WordLanes{}, 0);
      });
    unrolled<W::STRIPS>([&](auto s) INLINE_LAMBDA {
      Floats whole;
      for (int p = 0; p < PARTS; ++p) whole.part[p] = __builtin_convertvector(dots[s].part[p], FloatLanes);
      own[s] = multiply_add(whole, x.scales[block], own[s]);
    });
  }
  unrolled<W::STRIPS>([&](auto s) INLINE_LAMBDA { store_floats(own[s], sums + s * STRIP); });
}

void multiply_trellis_int8(const trellis::Stored* w, const Inputs& x, const Outputs& y, int64_t tile, float* workspace) {
  with_walk(w, [&](auto bits, auto height) INLINE_LAMBDA { multiply_row_int8<bits, height>(w, x, tile, workspace); });
  store_sums(w, y, tile, workspace, x.sums);
}

}  // namespace
