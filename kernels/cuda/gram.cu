// H += X^T X in the upper triangle, from 16-bit X by tensor cores, summed in float32.
//
// A thread block makes one tile (TILE, TILE) of H that is not below the diagonal, over all rows of X, and adds it to
// what is there: no atomics, always the same sum. Each of its warps makes (TILE / 2, 32) of it. Both operands are bands
// of TILE columns of X; the fragments of X^T and of X are one layout, that of ldmatrix_trans.
//
// Defined from outside: TYPE (Half or Bfloat), TILE (64 or 128).
#include "ptx.cuh"

constexpr int STEP = 32;                  // rows of X in shared memory at a time, twice
constexpr int WARPS_ACROSS = TILE / 32;
constexpr int THREADS = 2 * WARPS_ACROSS * 32;
constexpr int CHUNKS = TILE / 8;          // of 16 bytes, in a row of a band
constexpr int BAND = STEP * TILE;         // values
constexpr int TALL = TILE / 2 / 16;       // fragments of a warp: (16, 16) of X^T
constexpr int WIDE = 32 / 16;             // pairs of (16, 8) of X

// Chunks of eight rows at the same place in X lie in different banks.
INLINE int place(int row, int chunk) { return row * TILE + (chunk ^ (row & 7)) * 8; }

// Starts the copy of rows [row, row + STEP) of the band of columns from `column` on; zeros past the ends of X.
INLINE void copy_band(u16* band, const u16* x, int M, int K, int row, int column) {
#pragma unroll
    for (int index = threadIdx.x; index < STEP * CHUNKS; index += THREADS) {
        const int r = index / CHUNKS, chunk = index % CHUNKS;
        const bool valid = row + r < M && column + chunk * 8 < K;
        cp_async16(band + place(r, chunk), valid ? x + (u64)(row + r) * K + column + chunk * 8 : x, valid);
    }
}

// The four (8, 8) matrices of 16 rows from `row` on and 16 columns from chunk `chunk` on, transposed. The second is
// 8 columns on where ACROSS, as a fragment of X^T wants it, else 8 rows on, as two fragments of X do.
template <bool ACROSS>
INLINE void load_fragment(u32 (&fragment)[4], const u16* band, int row, int chunk) {
    const int lane = threadIdx.x % 32, second = lane / 8 & 1, third = lane / 16;
    const int down = ACROSS ? third : second, right = ACROSS ? second : third;
    ldmatrix_trans(fragment, band + place(row + down * 8 + lane % 8, chunk + right));
}

INLINE void multiply(float (&sums)[TALL][2 * WIDE][4], const u16* left, const u16* right, int left_chunk,
                     int right_chunk) {
#pragma unroll
    for (int row = 0; row < STEP; row += 16) {
        u32 b[WIDE][4];
#pragma unroll
        for (int j = 0; j < WIDE; ++j) load_fragment<false>(b[j], right, row, right_chunk + 2 * j);
#pragma unroll
        for (int i = 0; i < TALL; ++i) {
            u32 a[4];
            load_fragment<true>(a, left, row, left_chunk + 2 * i);
#pragma unroll
            for (int j = 0; j < 2 * WIDE; ++j) {
                const u32 half[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                mma<TYPE>(sums[i][j], a, half);
            }
        }
    }
}

// Adds a warp's sums to H from (row, column) on.
INLINE void add_sums(float* h, const float (&sums)[TALL][2 * WIDE][4], int K, int row, int column) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < TALL; ++i)
#pragma unroll
        for (int j = 0; j < 2 * WIDE; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int r = row + i * 16 + half * 8 + lane / 4, c = column + j * 8 + lane % 4 * 2;
                if (r >= K || c >= K) continue;
                float2* target = (float2*)(h + (u64)r * K + c);
                const float2 before = *target;
                *target = make_float2(before.x + sums[i][j][2 * half], before.y + sums[i][j][2 * half + 1]);
            }
}

extern "C" __global__ void __launch_bounds__(THREADS) gram(
    const u16* x,  // (M, K), 16-byte aligned
    float* h,      // (K, K), tiles on and above the diagonal are added to
    int M, int K) {  // K a multiple of 8
    DYNAMIC_SHARED(memory);
    u16* bands = (u16*)memory;  // (2, 2, STEP, TILE): turn, left or right
    const int tiles = (K + TILE - 1) / TILE;
    int tile_row = 0, tile_column = blockIdx.x;
    for (; tile_column >= tiles - tile_row; ++tile_row) tile_column -= tiles - tile_row;
    tile_column += tile_row;

    const int warp = threadIdx.x / 32;
    const int down = warp / WARPS_ACROSS * (TILE / 2), across = warp % WARPS_ACROSS * 32;
    float sums[TALL][2 * WIDE][4] = {};
    for (int row = -STEP, turn = 1; row < M; row += STEP, turn ^= 1) {
        if (row + STEP < M) {
            u16* next = bands + (turn ^ 1) * 2 * BAND;
            copy_band(next, x, M, K, row + STEP, tile_row * TILE);
            copy_band(next + BAND, x, M, K, row + STEP, tile_column * TILE);
        }
        cp_async_commit();
        if (row >= 0) {
            const u16* now = bands + turn * 2 * BAND;
            multiply(sums, now, now + BAND, down / 8, across / 8);
        }
        cp_async_wait<0>();
        sync_block();
    }
    add_sums(h, sums, K, tile_row * TILE + down, tile_column * TILE + across);
}
