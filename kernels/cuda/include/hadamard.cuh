// Hadamard transforms of floats in shared memory, in place, by a whole thread block.
#pragma once
#include "ptx.cuh"

// The online rotation of a row of K inputs, as hadamard_shared takes it; null and zero without one.
struct Rotation {
    const u32* signs;
    const u32* base_signs;
    int base, rest_bits;
    float scale;
};

struct alignas(16) Quad {
    float f[4];
};

// Sylvester transform, not scaled, of R values in registers: v[k] is value k ^ flips. A flipped bit changes places of
// the sum and the difference, which costs nothing in a multiply-add by +-1.
template <int R>
INLINE void butterflies(float (&v)[R], int flips) {
#pragma unroll
    for (int bit = 1; bit < R; bit *= 2) {
        const float turn = flips & bit ? -1.0f : 1.0f;
#pragma unroll
        for (int k = 0; k < R; ++k) {
            if (k & bit) continue;
            const float low = v[k], high = v[k | bit];
            v[k] = turn * low + high;
            v[k | bit] = low - turn * high;
        }
    }
}

// One pass over count values: the log2(R) bits of their index from `bits` on.
//
// Lanes next to each other take values next to each other, which meets no bank twice from a stride of 32 on. For
// shorter strides the lanes that would meet take the R values in other orders.
template <int THREADS, int R>
INLINE void sylvester_pass(float* values, int count, int bits) {
    const int span = R << bits;
    for (int unit = threadIdx.x; unit < count / R; unit += THREADS) {
        const int low = unit & ((1 << bits) - 1), high = unit >> bits;
        const int flips = (span < 32 ? high * span / 32 : high) & (R - 1);
        float* first = values + high * span + low;
        float v[R];
#pragma unroll
        for (int k = 0; k < R; ++k) v[k] = ld_shared(first + ((k ^ flips) << bits));
        butterflies<R>(v, flips);
#pragma unroll
        for (int k = 0; k < R; ++k) st_shared(first + ((k ^ flips) << bits), v[k]);
    }
    sync_block();
}

// Index bits [from, to) of count values; count is a multiple of 2^to. Ends with a barrier where it does anything.
//
// Radix 8: a load and a store for three bits, where shuffles, which pass at the rate of loads, would take three.
template <int THREADS>
INLINE void sylvester_shared(float* values, int count, int from, int to) {
    int bits = from;
    for (; to - bits >= 3; bits += 3) sylvester_pass<THREADS, 8>(values, count, bits);
    if (to - bits == 2) sylvester_pass<THREADS, 4>(values, count, bits);
    if (to - bits == 1) sylvester_pass<THREADS, 2>(values, count, bits);
}

// Whether bit `index` of a packed table is set: the sign is then -1.
INLINE bool is_negative(const u32* signs, int index) { return signs[index >> 5] >> (index & 31) & 1; }

// H_m (x) identity, in place: value i of a column goes to the sum over i of H (i, j) value i, for j in [0, m).
//
// As many columns at a time as one sum of BASE_OUTPUTS per thread covers: all are read before any is written.
constexpr int BASE_OUTPUTS = 8;

template <int THREADS>
INLINE void base_shared(float* values, int width, int base, int rest_bits, const u32* base_signs) {
    const int words = (base + 31) / 32, groups = (base + BASE_OUTPUTS - 1) / BASE_OUTPUTS;
    const int columns = width / base, at_once = THREADS / groups;
    const int group = threadIdx.x / at_once, first = group * BASE_OUTPUTS;
    for (int start = 0; start < columns; start += at_once) {
        const int column = start + threadIdx.x % at_once;
        const bool mine = group < groups && column < columns;
        float* top = values + ((column >> rest_bits) * base << rest_bits) + (column & ((1 << rest_bits) - 1));
        float sums[BASE_OUTPUTS] = {};
        for (int i = 0; mine && i < base; ++i) {
            const float value = ld_shared(top + (i << rest_bits));
            const u32 negative = base_signs[i * words + first / 32] >> first % 32;
#pragma unroll
            for (int j = 0; j < BASE_OUTPUTS; ++j) sums[j] += negative >> j & 1 ? -value : value;
        }
        sync_block();
#pragma unroll
        for (int j = 0; j < BASE_OUTPUTS; ++j)
            if (mine && first + j < base) st_shared(top + (first + j << rest_bits), sums[j]);
    }
    sync_block();
}

// The online rotation of one row: values (width,) times diag(signs) blockdiag(H_m (x) S_rest, ...) times scale.
//
// values: in shared memory, 4-byte aligned; every thread of the block calls, after a barrier behind the last write, and
// may read all of it on return. width: a multiple of base << rest_bits, the order of one Hadamard block, of which
// scale is 1 / sqrt. signs: global, (ceil(width / 32),), bit i % 32 of word i / 32 set where sign i is -1. base_signs:
// global, (base, ceil(base / 32)), laid out likewise along the columns of H_m; not read for base 1. THREADS is the
// size of the block, a multiple of 32, at least base / 8. Costs `base + rest_bits` additions per value.
template <int THREADS>
INLINE void hadamard_shared(float* values, int width, int base, int rest_bits, const u32* signs, const u32* base_signs,
                            float scale) {
    for (int index = threadIdx.x; index < width; index += THREADS) {
        const float value = ld_shared(values + index) * scale;
        st_shared(values + index, is_negative(signs, index) ? -value : value);
    }
    sync_block();
    if (base > 1) base_shared<THREADS>(values, width, base, rest_bits, base_signs);
    sylvester_shared<THREADS>(values, width, 0, rest_bits);
}
