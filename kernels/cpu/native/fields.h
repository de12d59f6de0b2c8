// Codes whole and in fields of 2, 4 or 8 bits, for instruction sets that look nothing up: a code in its field, as it lies
// there, is one mask and one conversion away from a float. That is the code times a power of two, which the inputs that
// it meets are divided by beforehand. Included after wide.h, once for each instruction set.
#pragma once

#include "wide.h"

namespace {

constexpr int fields_in_word(int bits) { return 32 / field_width(bits); }
constexpr int words_in_block(int bits) { return BLOCK / fields_in_word(bits); }

// The input whose code field j of word i holds.
constexpr int input_of_field(int bits, int i, int j) {
  for (int k = 0; k < BLOCK; ++k)
    if (low_vector(bits, k) == i / joints(bits) && low_bit(bits, k) == j * field_width(bits) + i % joints(bits) * low_width(bits)) return k;
  return -1;
}

constexpr uint32_t in_each_field(int bits, uint32_t value) {
  return field_width(bits) == 4 ? value * 0x11111111u : value * 0x01010101u;
}

// Word i of a block, for sixteen rows: codes of input_of_field in their fields, and nothing else.
template <int BITS, int I>
INLINE Words joined(const uint32_t* block) {
  constexpr int L = low_width(BITS), H = high_width(BITS), vector = I / joints(BITS), joint = I % joints(BITS);
  Words words = load_words(block + vector * STRIP);
  if constexpr (joints(BITS) > 1) {
    constexpr int k = input_of_field(BITS, I, 0);
    const Words high = H ? load_words(block + high_vector(BITS, k) * STRIP) : Words{};
    for (int p = 0; p < PARTS; ++p) {
      words.part[p] = words.part[p] >> joint * L & in_each_field(BITS, (1u << L) - 1);
      if (H) words.part[p] |= move_bit(high.part[p], high_bit(BITS, k), L) & in_each_field(BITS, ((1u << H) - 1) << L);
    }
  }
  return words;
}

// Where a field is when it is converted. Where fields are wide, all but the last stay in their places; the last, whose first
// bit would be the sign, is moved down. Of fields of 2 bits the upper half of a word is moved down, as 16 masks are too
// many. Moving fields of 4 bits so too made a product at AVX2 6 % slower, keeping those of 2 bits in place 2 %.
constexpr bool moves_halves(int bits) { return field_width(bits) == 2; }
constexpr int place_of_field(int bits, int j) {
  if (moves_halves(bits)) return j * field_width(bits) % 16;
  return j + 1 < fields_in_word(bits) ? j * field_width(bits) : 0;
}
constexpr int count_of_places(int bits) { return moves_halves(bits) ? fields_in_word(bits) / 2 : fields_in_word(bits) - 1; }

// Calls visit(n, k, s, codes of input k of strip s times 2^place_of_field) for the inputs of a block of SIDE strips, the n-th
// being k; all three are constants.
template <int BITS, int SIDE, typename Visit>
INLINE void for_each_field(const uint32_t* const (&block)[SIDE], Visit visit) {
  constexpr int COUNT = fields_in_word(BITS);
  constexpr uint32_t mask = (1u << field_width(BITS)) - 1;
  unrolled<words_in_block(BITS)>([&](auto i) INLINE_LAMBDA {
    Words words[SIDE];
    for (int s = 0; s < SIDE; ++s) words[s] = joined<BITS, i>(block[s]);
    unrolled<COUNT>([&](auto j) INLINE_LAMBDA {
      if (moves_halves(BITS) && j == COUNT / 2)
        for (Words& sixteen : words)
          for (WordLanes& part : sixteen.part) part >>= 16;
      unrolled<SIDE>([&](auto s) INLINE_LAMBDA {
        Floats codes;
        for (int p = 0; p < PARTS; ++p) {
          const WordLanes field = !moves_halves(BITS) && j + 1 == COUNT ? words[s].part[p] >> (32 - field_width(BITS))
                                                                        : words[s].part[p] & mask << place_of_field(BITS, j);
          codes.part[p] = __builtin_convertvector(reinterpret_cast<IntLanes>(field), FloatLanes);
        }
        visit(COUNT * i + j, input_of_field(BITS, i, j), s, codes);
      });
    });
  });
}

// What undoes 2^place_of_field, for each input of a block.
template <int BITS>
struct FieldFactors {
  float of[BLOCK];
  FieldFactors() {
    unrolled<words_in_block(BITS)>([&](auto i) INLINE_LAMBDA {
      unrolled<fields_in_word(BITS)>([&](auto j) INLINE_LAMBDA {
        of[input_of_field(BITS, i, j)] = 1.0f / static_cast<float>(1 << place_of_field(BITS, j));
      });
    });
  }
};

void fit_fields(const Image* w, float* row) {
  with_bits(w->bits, [&](auto bits) INLINE_LAMBDA {
    const FieldFactors<bits> factors;
    for (int64_t b = 0; b < w->blocks; ++b)
      for (int k = 0; k < BLOCK; ++k) row[b * BLOCK + k] *= factors.of[k];
  });
}

}  // namespace
