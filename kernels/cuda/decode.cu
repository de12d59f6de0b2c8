// y = x W^T for few tokens (M <= TOKENS): bound by reading the weight, so every byte of it is read once, 16 at a time.
//
// A block owns 64 rows and a share of K, cut into one run of tiles per warp. Codes meet x on the tensor cores as
// integers (exact in 16 bits); for per_oc groups scale and zero point are applied to the sums of a group, in float32:
//     sum over the group of (code - zero) scale x = scale (sum (code - MID) x - (zero - MID) sum x)
// where the sums of x come from a row of ones. per_ic scales change with every input and go onto the weights.
//
// Needs what tile.cuh needs, and TOKENS (8, 16) and WARPS.
#include "finish.cuh"
#include "tile.cuh"

constexpr int COLUMNS = TOKENS / 8;

struct Stage {
    TileCodes codes;
    TileScales scales;
};

struct Sums {
    float acc[4][COLUMNS][4];    // finished
    float group[4][COLUMNS][4];  // of (code - MID) x in the running group
    float x[COLUMNS][4];         // of x in it: each row of the fragment the same

    INLINE void clear_group() {
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
            for (int d = 0; d < 4; ++d) {
                x[n][d] = 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) group[i][n][d] = 0;
            }
    }

    // h: the half of the tile in which the group ends.
    INLINE void close_group(const TileScales& scales, int h) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Scales& own = scales.quarter(2 * h + i / 2);
            const float2 scale = unpack2<Half>(own.scale[i % 2]);
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
                for (int d = 0; d < 4; ++d) {
                    float sum = group[i][n][d];
                    if (!SYMMETRIC) sum -= own.zero_above_mid(i % 2 * 2 + d / 2) * x[n][d];
                    acc[i][n][d] += (d / 2 ? scale.y : scale.x) * sum;
                }
        }
        clear_group();
    }
};

// B fragments of half a tile's inputs, from input k on: steps 2 h and 2 h + 1. Zeros past M and K.
INLINE void read_x(u32 (&b)[2][COLUMNS][2], const u16* x, int k, int M, int K, int lane) {
    const int input = k + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
        const int token = 8 * n + lane / 4;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (token < M && input < K) v = *(const uint4*)(x + (size_t)token * K + input);
        b[0][n][0] = v.x, b[0][n][1] = v.y, b[1][n][0] = v.z, b[1][n][1] = v.w;
    }
}

INLINE void multiply_half(Sums& sums, const Stage& stage, const u32 (&b)[2][COLUMNS][2], int h) {
    using T = ELEMENT;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int t = 2 * h + i / 2;
        const Codes codes = stage.codes.quarter(t);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            u32 a[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const int p = i % 2 * 8 + 4 * s + q;
                a[q] = PER_IC ? weights(codes, stage.scales.quarter(t), p) : codes.centred(p);
            }
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) mma<T>(PER_IC ? sums.acc[i][n] : sums.group[i][n], a, b[s][n]);
        }
    }
    if (PER_IC || SYMMETRIC) return;
    const u32 ones[4] = {power<T>(0), power<T>(0), power<T>(0), power<T>(0)};
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) mma<T>(sums.x[n], ones, b[s][n]);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    decode(const uint4* tiles, const u16* scales, const u8* zeros, const u16* x, u16* y, const u16* bias,
           const u16* low_rank_b, const float* low_rank_t, float* partial, int* counters, int M, int N, int K,
           int tiles_k, int group, int groups, int rank) {
    __shared__ float parts[WARPS * TOKENS * TOKEN_STRIDE];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int strip = blockIdx.x, split = blockIdx.y, splits = gridDim.y;
    const int share = split * WARPS + warp, shares = splits * WARPS;
    const int first = (int)((long long)tiles_k * share / shares);
    const int end = (int)((long long)tiles_k * (share + 1) / shares);

    Sums sums;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
            for (int d = 0; d < 4; ++d) sums.acc[i][n][d] = 0;
    sums.clear_group();

    Stage next;
    const auto read = [&](int k) {
        next.codes.read(tiles + ((size_t)strip * tiles_k + k) * (BITS * 32), lane);
        next.scales.read(scales, zeros, strip, k, tiles_k, group, groups, lane);
    };
    if (first < end) read(first);
    for (int k = first; k < end; ++k) {
        const Stage stage = next;
        if (k + 1 < end) read(k + 1);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            u32 b[2][COLUMNS][2];
            read_x(b, x, k * TILE + 32 * h, M, K, lane);
            multiply_half(sums, stage, b, h);
            const int input = k * TILE + 32 * (h + 1);
            if (!PER_IC && (SETS == 2 || h == 1) && (input % group == 0 || input == end * TILE))
                sums.close_group(stage.scales, h);
        }
    }
    store_fragments<4>(parts + warp * TOKENS * TOKEN_STRIDE, sums.acc, 0, lane, false);
    const Output output = {y, bias, low_rank_b, low_rank_t, partial, counters, M, N, rank};
    finish<ELEMENT, WARPS, TILE>(parts, output, strip * TILE, 0, strip, split, splits);
}
