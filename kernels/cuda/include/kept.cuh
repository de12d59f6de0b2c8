// How a weight with dropped groups lies in memory once it is prepared: the groups that stay (kept_layout.py writes it).
//
// Rows are put in order of how many groups they keep, and go eight at a time, an octet: each row's groups one after the
// other, filled up with empty ones to as many as the fullest keeps and to whole steps. The rows of an octet are alike,
// so that what fills up is half a step for each octet and hardly more.
//
// A step is 128 inputs of each of the eight rows: slot s of 8 is 16 of them, one product of the tensor cores. Rows keep
// other groups and so meet other inputs: one operand holds 16 weights of each row, the other what each row meets, and
// of their product only the diagonal counts. With r = lane / 4 and c = lane % 4, a lane holds inputs 4 c to 4 c + 3 of
// row r in every slot: pairs 2 s and 2 s + 1 of codes.cuh.
//
// codes  u32 [steps][BITS / VECTOR][32][VECTOR]: a lane's words
// groups u32 [steps][8][HALVES][WORDS]: float16 scale below, column above. Groups of 8: half h has groups 2 s + h
// zeros  u8, in the order of groups. With codes of up to 4 bits there are none: they are the lowest 4 bits of columns
// owners int32 [steps]: twice the number of the octet, plus 1 where it ends
// starts int32 [octets + 1]: first step of each octet, and the number of steps
// rows   int32 [octets][8]: which row of W each is; N where there is none
//
// The column of an empty group is the first that the weight does not have: x must be 0 there.
//
// Needs what codes.cuh needs, and GROUP (8, 16, 32).
#pragma once

#include "codes.cuh"

constexpr int OCTET = 8;
constexpr int SLOTS = 8;
constexpr int SLOT = 16;  // inputs of a row
constexpr int VECTOR = BITS % 4 == 0 ? 4 : BITS % 2 == 0 ? 2 : 1;  // words of one plane
constexpr int HALVES = GROUP == 8 ? 2 : 1;
constexpr int WORDS = GROUP == 32 ? 4 : 8;
constexpr bool ZEROS_APART = BITS > 4;

template <int COUNT>
INLINE void read_words(u32* to, const u32* from) {
    if constexpr (COUNT == 4) {
        const uint4 v = load_once((const uint4*)from);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else if constexpr (COUNT == 2) {
        const uint2 v = *(const uint2*)from;
        to[0] = v.x, to[1] = v.y;
    } else {
        to[0] = *from;
    }
}

// What a lane holds of a step, in registers.
struct Step {
    Codes codes;
    u32 groups[WORDS];
    u32 zeros[WORDS / 4];
    int owner;

    INLINE void read(const u32* all_codes, const u32* all_groups, const u8* all_zeros, const int* owners, int step,
                     int lane) {
        const u32* from = all_codes + (size_t)step * BITS * 32 + lane * VECTOR;
#pragma unroll
        for (int w = 0; w < LOW; w += VECTOR) read_words<VECTOR>(codes.low + w, from + w * 32);
#pragma unroll
        for (int w = 0; w < HIGH; w += VECTOR) read_words<VECTOR>(codes.high + w, from + (LOW + w) * 32);
        const int half = HALVES == 2 ? lane % 4 / 2 : 0;
        const size_t at = ((size_t)(step * OCTET + lane / 4) * HALVES + half) * WORDS;
#pragma unroll
        for (int v = 0; v < WORDS / 4; ++v) read_words<4>(groups + v * 4, all_groups + at + v * 4);
        if (ZEROS_APART) read_words<WORDS / 4>(zeros, (const u32*)(all_zeros + at));
        owner = owners[step];
    }

    INLINE int octet() const { return owner / 2; }
    INLINE bool ends_octet() const { return owner % 2; }

    INLINE static int group_of(int s) { return s * WORDS / SLOTS; }

    // First of the 16 inputs of a slot, of which the lane meets four from lane_input on; with groups of 8: of its 8.
    INLINE int slot_input(int s) const {
        const int column = groups[group_of(s)] >> (ZEROS_APART ? 16 : 20);
        return column * GROUP + (GROUP == 32 ? s % 2 * SLOT : 0);
    }
    INLINE static int lane_input(int lane) { return lane % (GROUP == 8 ? 2 : 4) * 4; }

    // The lane's four weights of a slot, (code - zero) * scale, rounded once.
    INLINE void weights(u32 (&pairs)[2], int s, const Offsets& offsets) const {
        using T = ELEMENT;
        const u32 scale = lower_twice(groups[group_of(s)]), minus_one = power<T>(0) | 0x80008000u;
        const u32 offset = offsets.pair[s % 4];
        const u32 zero = TOO_WIDE ? pack2<T>(zero_point(s) - MID, zero_point(s) - MID)
                                  : zero_twice(s) << place_of(2 * s) | offset;  // shifted like the codes
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const u32 number = fma2<T>(zero, minus_one, codes.shifted(2 * s + h, offset));
            pairs[h] = times_scale<T>(number, scale);
        }
    }

   private:
    // Where zero points are apart.
    INLINE int zero_point(int s) const { return zeros[group_of(s) / 4] >> (group_of(s) % 4 * 8) & 0xffu; }
    INLINE u32 zero_twice(int s) const {
        return ZEROS_APART ? twice(zero_point(s)) : upper_twice(groups[group_of(s)]) & 0x000f000fu;
    }
};
