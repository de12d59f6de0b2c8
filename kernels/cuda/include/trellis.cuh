// What the states of trellis codes mean, and how they are cut out of a walk: docs/format.md has both to the bit.
//
// Needs BITS (1 to 5), of a symbol.
#pragma once

#include "ptx.cuh"

constexpr int STATE_BITS = 12, STATES = 1 << STATE_BITS;
constexpr int MIDDLE = 126;  // of the sum of four numbers of 6 bits

// The four numbers of a state, a byte each.
INLINE u32 numbers_of(u32 state) { return state * 0x4c5bbdb1u & 0x3f3f3f3fu; }

// Sums of numbers become floats where they are added to the bits of a float whose last place is 1: 2^23 and, as float16,
// 1024.
INLINE float value_of(u32 state) {
    return __uint_as_float(sum_bytes(numbers_of(state), 0x4b000000u)) - (float)((1 << 23) + MIDDLE);
}

// The values of two states, exact in 16 bits.
template <class T>
INLINE u32 pair_of_values(u32 first, u32 second);

template <>
INLINE u32 pair_of_values<Half>(u32 first, u32 second) {
    const u32 sums = lower_halves(sum_bytes(numbers_of(first), 0x6400), sum_bytes(numbers_of(second), 0x6400));
    return fma2<Half>(sums, 0x3c003c00, 0xe47ee47e);  // times 1, less 1024 + MIDDLE
}

template <>
INLINE u32 pair_of_values<Bfloat>(u32 first, u32 second) {
    return upper_halves(__float_as_uint(value_of(first)), __float_as_uint(value_of(second)));
}

// Neighbouring places of a walk, from the lowest bit on.
template <int PLACES>
struct Stretch {
    static constexpr int NEEDED = (PLACES - 1) * BITS + STATE_BITS, WORDS = (NEEDED + 31) / 32;
    u32 words[WORDS];

    // Bits from `shift` on of RAW words, which hold all that is needed.
    template <int RAW>
    INLINE void set(const u32 (&raw)[RAW], int shift) {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) words[w] = funnel_right(raw[w], raw[w + 1 < RAW ? w + 1 : w], shift);
    }

    // place: known when this is compiled.
    INLINE u32 state(int place) const {
        const int bit = place * BITS, word = bit / 32;
        return funnel_right(words[word], words[word + 1 < WORDS ? word + 1 : word], bit % 32) & (STATES - 1);
    }
};
