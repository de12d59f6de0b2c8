// From a block's partial sums in shared memory to y: over the block's parts, over the splits of K, in a fixed order.
// With splits > 1 through Output's partial (blocks, splits, TOKENS, ROWS) and counters (blocks).
//
// Needs TOKENS.
#pragma once

#include "output.cuh"

constexpr int TOKEN_STRIDE = 68;  // floats from one token to the next: 64 rows, and no two lanes of a fragment in a bank

INLINE int sum_index(int row, int token) {
    return (row / 64 * TOKENS + token) * TOKEN_STRIDE + row % 64;
}

// A warp's fragments for ROW_TILES times 16 rows from `row` on and all tokens.
template <int ROW_TILES>
INLINE void store_fragments(float* sums, const float (&acc)[ROW_TILES][TOKENS / 8][4], int row, int lane, bool add) {
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
        for (int n = 0; n < TOKENS / 8; ++n)
#pragma unroll
            for (int d = 0; d < 4; ++d) {
                float* to = sums + sum_index(row + 16 * i + d / 2 * 8 + lane / 4, 8 * n + lane % 4 * 2 + d % 2);
                st_shared(to, add ? ld_shared(to) + acc[i][n][d] : acc[i][n][d]);
            }
}

// y for the block's ROWS rows from `row` on and TOKENS tokens from `token` on. parts: in shared memory, PARTS copies of
// ROWS / 64 * TOKENS * TOKEN_STRIDE floats. block, split: this block's number in `partial`. All threads call it.
template <class T, int PARTS, int ROWS>
INLINE void finish(const float* parts, const Output& o, int row, int token, int block, int split, int splits) {
    __shared__ int is_last;
    constexpr int SIZE = ROWS * TOKENS, COPY = ROWS / 64 * TOKENS * TOKEN_STRIDE;
    const int threads = blockDim.x;
    float* own = o.partial + ((size_t)block * splits + split) * SIZE;
    sync_block();
    for (int index = threadIdx.x; index < SIZE; index += threads) {
        const int n = index % ROWS, m = index / ROWS;
        if (token + m >= o.M || row + n >= o.N) continue;
        float value = 0;
        for (int part = 0; part < PARTS; ++part) value += ld_shared(parts + part * COPY + sum_index(n, m));
        if (splits == 1)
            write_output<T>(o, token + m, row + n, value);
        else
            own[index] = value;
    }
    if (splits == 1) return;
    memory_fence();
    sync_block();
    if (threadIdx.x == 0) st_shared(&is_last, (int)(atomic_increment(o.counters + block) == splits - 1));
    sync_block();
    if (!ld_shared(&is_last)) return;
    memory_fence();
    const float* all = o.partial + (size_t)block * splits * SIZE;
    for (int index = threadIdx.x; index < SIZE; index += threads) {
        const int n = index % ROWS, m = index / ROWS;
        if (token + m >= o.M || row + n >= o.N) continue;
        float value = 0;
#pragma unroll 4
        for (int s = 0; s < splits; ++s) value += load_fresh(all + (size_t)s * SIZE + index);
        write_output<T>(o, token + m, row + n, value);
    }
    if (threadIdx.x == 0) o.counters[block] = 0;
}
