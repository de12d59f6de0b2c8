// How a weight lies in memory once it is prepared (layout.py writes it).
//
// A tile is 64 output rows (N) by 64 inputs (K); a quarter t = 2 h + z of it is 32 rows by 32 inputs. With r = lane / 4
// and c = lane % 4, a lane holds 16 pairs of codes of each quarter: pair p = 8 i + 4 s + q (i, s < 2, q < 4) is register
// q of the A fragment of mma.m16n8k16 for the quarter's rows 16 i and step s:
//
//     row = 32 z + 16 i + 8 (q % 2) + r,    inputs = 32 h + 8 c + 4 s + 2 (q / 2) + {0, 1}
//
// so that the 16 bytes of x at inputs 32 h + 8 c are this lane's B fragments of both steps as they lie. codes.cuh says how
// pairs fill words. A lane's part of a quarter is LOW + HIGH = BITS words, of a tile BITS times 16 bytes: the lower plane
// of all quarters, then the upper.
//
// Scales and zero points come in sets of 64 float16 and 64 bytes. A tile has SETS of them. per_oc: one for each row, in
// the order of z, r, i, q % 2, so that a lane reads four at once; two sets where a group ends at input 32. per_ic: one
// for each input, in their order; two or four sets where a group has 32 or 16 rows.
//
// Needs what codes.cuh needs, PER_IC, SYMMETRIC (1: no zero points, all are MID) and SETS.
#pragma once

#include "codes.cuh"

constexpr int TILE = 64;

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
