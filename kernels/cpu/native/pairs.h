// Codes as pairs of bfloat16, two inputs of 16 rows in a register: those of up to 8 bits less mid are exact. Included
// with AVX-512.
#pragma once

#include <immintrin.h>

#include "wide.h"

namespace {

constexpr int SELECT = 0xca;  // vpternlog's a ? b : c; of the two operations that make it, compilers keep two

// Two codes less mid of each row as bfloat16. Lanes of 16 bits: an index has 5 bits, or 6 with two registers.
template <int BITS>
struct Pairs {
  __m512i table[2];
  explicit Pairs(int mid) {
    for (int half = 0; half < 2; ++half) {
      uint16_t entries[32];
      for (int i = 0; i < 32; ++i) {
        entries[i] = to_bfloat16(static_cast<float>(((half * 32 + i) & ((1 << BITS) - 1)) - mid));
      }
      table[half] = _mm512_loadu_si512(entries);
    }
  }
  INLINE_MEMBER __m512i operator()(const Words& low, const Words& high, int low_at, int high_at) const {
    __m512i index = reinterpret_cast<__m512i>(low.part[0] >> low_at);
    if (high_width(BITS)) {
      const __m512i mask = _mm512_set1_epi32(0x10001 * ((1 << low_width(BITS)) - 1));
      const WordLanes upper = move_bit(high.part[0], high_at, low_width(BITS));
      index = _mm512_ternarylogic_epi32(mask, index, reinterpret_cast<__m512i>(upper), SELECT);
    }
    if (BITS == 6) return _mm512_permutex2var_epi16(table[0], index, table[1]);
    return _mm512_permutexvar_epi16(index, table[0]);
  }
};
template <>
struct Pairs<8> {
  IntLanes mid;
  explicit Pairs(int value) : mid(value - IntLanes{}) {}
  INLINE_MEMBER __m512i operator()(const Words& low, const Words&, int low_at, int) const {
    const IntLanes even = reinterpret_cast<IntLanes>(low.part[0] >> low_at & 0xff) - mid;
    const IntLanes odd = reinterpret_cast<IntLanes>(low.part[0] >> (low_at + 16) & 0xff) - mid;
    const __m512i evens = reinterpret_cast<__m512i>(__builtin_convertvector(even, FloatLanes));
    const __m512i odds = reinterpret_cast<__m512i>(__builtin_convertvector(odd, FloatLanes));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(evens, 16), odds);
  }
};

// Two codes of each row plus `base` as bfloat16, for a register that looks nothing up: a permutation of 16-bit lanes takes
// a shift's place besides its own on Intel. Codes of up to 6 bits become the mantissa of 2^BITS; those of 8 bits lose mid.
template <int BITS>
struct RaisedPairs {
  static constexpr int AT = 7 - BITS;  // of a code among the mantissa's bits
  static constexpr int EACH = 0x10001;
  int base = 1 << BITS;
  __m512i lower = _mm512_set1_epi32(EACH * (((1 << low_width(BITS)) - 1) << AT));
  __m512i all_bits = _mm512_set1_epi32(EACH * (((1 << BITS) - 1) << AT));
  __m512i exponent = _mm512_set1_epi32(EACH * ((127 + BITS) << 7));
  explicit RaisedPairs(int) {}
  INLINE_MEMBER __m512i operator()(const Words& low, const Words& high, int low_at, int high_at) const {
    constexpr int AND_OR = 0xea;  // vpternlog's (a & b) | c
    __m512i code = reinterpret_cast<__m512i>(move_bit(low.part[0], low_at, AT));
    if (high_width(BITS)) {
      const WordLanes upper = move_bit(high.part[0], high_at, AT + low_width(BITS));
      code = _mm512_ternarylogic_epi32(lower, code, reinterpret_cast<__m512i>(upper), SELECT);
    }
    return _mm512_ternarylogic_epi32(code, all_bits, exponent, AND_OR);
  }
};
template <>
struct RaisedPairs<8> : Pairs<8> {
  int base;
  explicit RaisedPairs(int mid) : Pairs<8>(mid), base(-mid) {}
};

}  // namespace
