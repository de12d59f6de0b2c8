// How codes lie in words, and how they become numbers (layout.py writes the words).
//
// A lane holds 16 pairs of codes in BITS words. The two codes of a pair are in the lower and the upper half of a word,
// at the same place. Codes of 3, 5 and 6 bits are cut into planes of 2 + 1, 4 + 1 and 4 + 2 bits, so that codes fill
// words: LOW words of the lower plane, HIGH of the upper. low_bit and high_bit say where in its word a pair is: so that
// few words need be shifted before a mask cuts codes out where a float has its last bits.
//
// Needs BITS (2, 3, 4, 5, 6, 8) and ELEMENT (Half, Bfloat).
#pragma once

#include "ptx.cuh"

constexpr int LOW = BITS == 3 ? 2 : BITS == 5 || BITS == 6 ? 4 : BITS;  // bits in the lower plane
constexpr int HIGH = BITS - LOW;
constexpr int UPPER = HIGH ? HIGH : 1;  // HIGH where it must not be zero
constexpr int MID = 1 << (BITS - 1);

// A float 2^e with e <= mantissa whose mantissa bits from `mantissa - e` on count in steps of one: a code put there is
// added to it.
template <class T>
struct Magic;

template <>
struct Magic<Half> {
    static constexpr int mantissa = 10, bias = 15;
};

template <>
struct Magic<Bfloat> {
    static constexpr int mantissa = 7, bias = 127;
};

INLINE u32 twice(u32 half) { return half | half << 16; }

// 2^exponent, in both halves.
template <class T>
INLINE u32 power(int exponent) {
    return twice((u32)(Magic<T>::bias + exponent) << Magic<T>::mantissa);
}

// -(2^(mantissa - place) + offset) in both halves; offset < 2^(mantissa - place).
template <class T>
INLINE u32 minus_magic(int place, int offset) {
    return twice(0x8000u | (u32)offset << place) | power<T>(Magic<T>::mantissa - place);
}

// Pairs with neighbouring rows (p, p + 1) are eight bits apart; e numbers the others, 4 i + 2 s + q / 2.
INLINE int other_bits(int p) { return p / 8 * 4 + p % 8 / 4 * 2 + p % 4 / 2; }
INLINE int low_word(int p) { return other_bits(p) / (8 / LOW); }
INLINE int low_bit(int p) { return other_bits(p) % (8 / LOW) * LOW + p % 2 * 8; }
INLINE int high_word(int p) { return other_bits(p) / (8 / UPPER); }
INLINE int high_bit(int p) {  // LOW bits above the lower plane's, but for the number of its word, or eight more
    return ((low_bit(p) % 8 + LOW) + other_bits(p) % (8 / UPPER) / (8 / LOW) * UPPER + p % 2 * 8) % 16;
}

// Where the codes of pair p are put in a float: as they lie where the mantissa has room.
INLINE int place_of(int p) { return low_bit(p) % 8 + BITS <= Magic<ELEMENT>::mantissa ? low_bit(p) % 8 : 0; }

// Bits of `word` from `from` on, moved to `to`; others are garbage.
INLINE u32 moved(u32 word, int from, int to) { return from >= to ? word >> (from - to) : word << (to - from); }

constexpr bool TOO_WIDE = BITS > Magic<ELEMENT>::mantissa;  // 8 bits where bfloat16 has 7

// A lane's codes of one quarter. p is known once loops are unrolled, and with it all but a few operations.
struct Codes {
    u32 low[LOW];
    u32 high[UPPER];

    // Pair p as numbers code + offset, exactly: an operation for each plane and a share of a shift. offset: offset(p).
    INLINE u32 shifted(int p, u32 offset) const {
        if (TOO_WIDE) return wide(p);
        const int place = place_of(p);
        u32 code = (moved(low[low_word(p)], low_bit(p), place) & twice(((1u << LOW) - 1) << place)) | offset;
        if (HIGH)
            code |= moved(high[high_word(p)], high_bit(p), place + LOW) & twice(((1u << HIGH) - 1) << (place + LOW));
        return code;
    }

    // A pair of what `shifted` adds; the same for all i and for both neighbouring rows, so that there are four.
    static INLINE u32 offset(int p) {
        using T = ELEMENT;
        return TOO_WIDE ? power<T>(BITS - 1) | 0x80008000u : power<T>(Magic<T>::mantissa - place_of(p));
    }

    // Pair p as numbers code - MID, exactly.
    INLINE u32 centred(int p) const {
        using T = ELEMENT;
        return TOO_WIDE ? wide(p) : fma2<T>(shifted(p, offset(p)), power<T>(0), minus_magic<T>(place_of(p), MID));
    }

    // Codes - MID of two nibbles, all steps exact.
    INLINE u32 wide(int p) const {
        using T = ELEMENT;
        const u32 word = low[low_word(p)], magic = minus_magic<T>(0, 0);
        const u32 lower = (word >> low_bit(p) & 0x000f000fu) | power<T>(Magic<T>::mantissa);
        const u32 upper = (word >> (low_bit(p) + 4) & 0x000f000fu) | power<T>(Magic<T>::mantissa);
        const u32 below = fma2<T>(lower, power<T>(0), magic), above = fma2<T>(upper, power<T>(0), magic);
        return fma2<T>(fma2<T>(above, power<T>(4), below), power<T>(0), power<T>(BITS - 1) | 0x80008000u);
    }
};

// Codes::offset of pairs 2 n and 2 n + 1, in registers. An instruction has room for one constant, the mask: where the
// compiler knew the other one, it would fetch it again for every pair.
struct Offsets {
    u32 pair[4];

    // nothing: 0, without the compiler's knowledge.
    INLINE explicit Offsets(u32 nothing) {
#pragma unroll
        for (int n = 0; n < 4; ++n) pair[n] = Codes::offset(2 * n) + nothing;
    }
};

// Times a pair of float16 scales.
template <class T>
INLINE u32 times_scale(u32 codes, u32 scales);

template <>
INLINE u32 times_scale<Half>(u32 codes, u32 scales) {
    return fma2<Half>(codes, scales, 0x80008000u);
}

template <>
INLINE u32 times_scale<Bfloat>(u32 codes, u32 scales) {
    const float2 c = unpack2<Bfloat>(codes), s = unpack2<Half>(scales);
    return pack2<Bfloat>(c.x * s.x, c.y * s.y);
}
