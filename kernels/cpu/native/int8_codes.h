// Codes as bytes, the four of a quad in one word: what instructions that multiply bytes take.
#pragma once

#include "wide.h"

namespace {

// The codes of four inputs (image.h, quad_input) of 16 rows.
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

INLINE int32_t inputs_of_quad(const int8_t* x, int quad) {
  int32_t four;
  __builtin_memcpy(&four, x + quad * 4, sizeof four);
  return four;
}

}  // namespace
