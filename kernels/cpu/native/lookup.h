// AVX-512: codes become numbers by looking them up in a register. A lookup reads the lowest bits of each lane and
// ignores the rest, so a code needs a shift and no mask.
#pragma once

#include <immintrin.h>

#include "strips.h"

namespace {

INLINE __m512i bits_of(const Words& words) { return reinterpret_cast<__m512i>(words.part[0]); }

// As Converter. Sixteen entries serve codes of up to 4 bits; wider ones are converted.
template <int BITS>
struct Lookup {
  __m512 table;
  explicit Lookup(int mid) {
    float entries[16];
    for (int i = 0; i < 16; ++i) entries[i] = static_cast<float>((i & ((1 << BITS) - 1)) - mid);
    table = _mm512_loadu_ps(entries);
  }
  INLINE_MEMBER Floats operator()(const Words& low, const Words& high, int low_at, int high_at) const {
    __m512i index = reinterpret_cast<__m512i>(low.part[0] >> low_at);
    if (high_width(BITS)) {  // one operation, where compilers make two of (index & mask) | (upper & ~mask)
      const __m512i mask = _mm512_set1_epi32((1 << low_width(BITS)) - 1);
      const WordLanes upper = move_bit(high.part[0], high_at, low_width(BITS));
      index = _mm512_ternarylogic_epi32(mask, index, reinterpret_cast<__m512i>(upper), 0xca);
    }
    return {{_mm512_permutexvar_ps(index, table)}};
  }
};
template <>
struct Lookup<5> : Converter<5> { using Converter::Converter; };
template <>
struct Lookup<6> : Converter<6> { using Converter::Converter; };
template <>
struct Lookup<8> : Converter<8> { using Converter::Converter; };

}  // namespace
