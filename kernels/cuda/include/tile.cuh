// How a weight lies in memory once it is prepared, and how its codes become numbers (layout.py writes it).
//
// A tile is 64 output rows (N) by 64 inputs (K); a quarter t = 2 h + z of it is 32 rows by 32 inputs. With r = lane / 4
// and c = lane % 4, a lane holds 16 pairs of codes of each quarter: pair p = 8 i + 4 s + q (i, s < 2, q < 4) is register
// q of the A fragment of mma.m16n8k16 for the quarter's rows 16 i and step s:
//
//     row = 32 z + 16 i + 8 (q % 2) + r,    inputs = 32 h + 8 c + 4 s + 2 (q / 2) + {0, 1}
//
// so that the 16 bytes of x at inputs 32 h + 8 c are this lane's B fragments of both steps as they lie. The two codes of
// a pair are in the lower and the upper half of a word, at the same place. Codes of 3, 5 and 6 bits are cut into planes
// of 2 + 1, 4 + 1 and 4 + 2 bits, so that codes fill words; a lane's part of a quarter is LOW + HIGH = BITS words, of a
// tile BITS times 16 bytes: the lower plane of all quarters, then the upper. low_bit and high_bit say where in its word
// a pair is: so that few words need be shifted before a mask cuts codes out where a float has its last bits.
//
// Scales and zero points come in sets of 64 float16 and 64 bytes. A tile has SETS of them. per_oc: one for each row, in
// the order of z, r, i, q % 2, so that a lane reads four at once; two sets where a group ends at input 32. per_ic: one
// for each input, in their order; two or four sets where a group has 32 or 16 rows.
//
// Needs BITS (2, 3, 4, 5, 6, 8), ELEMENT (Half, Bfloat), PER_IC, SYMMETRIC (1: no zero points, all are MID), SETS.
#pragma once

#include "ptx.cuh"

constexpr int TILE = 64;
constexpr int LOW = BITS == 3 ? 2 : BITS == 5 || BITS == 6 ? 4 : BITS;  // bits in the lower plane
constexpr int HIGH = BITS - LOW;
constexpr int UPPER = HIGH ? HIGH : 1;  // HIGH where it must not be zero
constexpr int MID = 1 << (BITS - 1);

// --- codes --------------------------------------------------------------------------------------------------------

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

// A lane's codes of a whole tile, in registers.
struct TileCodes {
    u32 words[4 * BITS];

    // own: the lane's first 16 bytes.
    INLINE void read(const uint4* own) {
#pragma unroll
        for (int u = 0; u < BITS; ++u) {
            const uint4 v = load_once(own + u * 32);
            words[4 * u] = v.x, words[4 * u + 1] = v.y, words[4 * u + 2] = v.z, words[4 * u + 3] = v.w;
        }
    }

    INLINE Codes quarter(int t) const {
        Codes codes;
#pragma unroll
        for (int w = 0; w < LOW; ++w) codes.low[w] = words[t * LOW + w];
#pragma unroll
        for (int w = 0; w < HIGH; ++w) codes.high[w] = words[4 * LOW + t * HIGH + w];
        return codes;
    }
};

// --- scales and zero points ---------------------------------------------------------------------------------------

// Number of set `index` of tile (strip, k), in the order of memory: per_oc (strips, groups), per_ic (groups, tiles_k).
INLINE int set_number(int strip, int k, int index, int tiles_k, int group, int groups) {
    const int within = index * (TILE / SETS);
    if (PER_IC) return (strip * TILE + within) / group * tiles_k + k;
    return strip * groups + (k * TILE + within) / group;
}

// A lane's scales and zero points of one quarter.
struct Scales {
    static constexpr int words = PER_IC ? 4 : 2;                // pairs of scales from one set
    static constexpr int sets = PER_IC && SETS == 4 ? 2 : 1;  // for i = 0, 1
    u32 scale[sets * words];
    u32 zero[sets * words / 2];

    // Set of the tile that holds those of quarter t, and, where it takes two, of rows 16 i.
    static INLINE int set(int t, int i) {
        if (SETS == 1) return 0;
        return PER_IC ? (SETS == 4 ? t % 2 * 2 + i : t % 2) : t / 2;
    }

    // Place of the lane's first value in its set.
    static INLINE int place(int t, int lane) {
        return PER_IC ? t / 2 * 32 + lane % 4 * 8 : t % 2 * 32 + lane / 4 * 4;
    }

    // `scales`, `zeros`: of set(t, i). load: from whichever memory it is.
    template <class LOAD>
    INLINE void read(int i, const u16* scales, const u8* zeros, int t, int lane, LOAD load) {
        const u16* from = scales + place(t, lane);
        const u8* zero_from = zeros + place(t, lane);
        if (PER_IC) {
            const uint4 v = load((const uint4*)from);
            scale[i * 4] = v.x, scale[i * 4 + 1] = v.y;
            scale[i * 4 + words - 2] = v.z, scale[i * 4 + words - 1] = v.w;
            if (SYMMETRIC) return;
            const uint2 z = load((const uint2*)zero_from);
            zero[i * 2] = z.x, zero[i * 2 + words / 2 - 1] = z.y;
        } else {
            const uint2 v = load((const uint2*)from);
            scale[0] = v.x, scale[1] = v.y;
            if (!SYMMETRIC) zero[0] = load((const u32*)zero_from);
        }
    }

    INLINE int zero_point(int index) const { return SYMMETRIC ? MID : zero[index / 4] >> (index % 4 * 8) & 0xff; }
};

// A tile's scales in registers: those of quarters that share them are there once.
struct TileScales {
    static constexpr int count = SETS == 1 ? 2 : 4;
    Scales distinct[count];

    static INLINE int index(int t) { return SETS > 1 ? t : PER_IC ? t / 2 : t % 2; }

    // From global memory; sets: the numbers of the tile's.
    INLINE void read(const u16* scales, const u8* zeros, const int (&sets)[SETS], int lane) {
#pragma unroll
        for (int d = 0; d < count; ++d) {
            const int t = PER_IC && SETS == 1 ? 2 * d : d;
#pragma unroll
            for (int i = 0; i < Scales::sets; ++i) {
                const size_t at = (size_t)sets[Scales::set(t, i)] * TILE;
                distinct[d].read(i, scales + at, zeros + at, t, lane, [](auto pointer) { return *pointer; });
            }
        }
    }

    INLINE const Scales& quarter(int t) const { return distinct[index(t)]; }
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

// Pair p of a quarter as weights (code - zero) * scale, rounded once.
INLINE u32 weights(const Codes& codes, const Scales& scales, int p) {
    using T = ELEMENT;
    const int i = p / 8, s = p % 8 / 4, q = p % 4;
    const int first = PER_IC ? (Scales::sets == 2 ? i * 8 : 0) + 4 * s + q / 2 * 2 : 2 * i + q % 2;
    const int second = PER_IC ? first + 1 : first;
    u32 numbers = codes.centred(p);
    if (!SYMMETRIC) {
        const float above_first = MID - scales.zero_point(first), above_second = MID - scales.zero_point(second);
        numbers = fma2<T>(numbers, power<T>(0), pack2<T>(above_first, above_second));
    }
    const u32 pair = scales.scale[first / 2];
    return times_scale<T>(numbers, PER_IC ? pair : twice(first % 2 ? pair >> 16 : pair & 0xffffu));
}
