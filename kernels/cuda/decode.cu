// y = x W^T for few tokens (M <= TOKENS): bound by reading the weight, so every byte of it is read once, 16 at a time.
//
// A block owns 64 rows and a share of K, cut into one run of tiles per warp. Codes meet x on the tensor cores as
// integers (exact in 16 bits); for per_oc groups scale and zero point are applied to the sums of a group, in float32:
//     sum over the group of (code - zero) scale x = scale (sum (code - MID) x - (zero - MID) sum x)
// where the sums of x come from a row of ones. per_ic scales change with every input and go onto the weights.
//
// With ROTATED a block first rotates the part of x that it reads, in shared memory, while its first tiles are on their
// way: every block does that work again, and no second launch is needed.
//
// Needs what tile.cuh needs, and TOKENS (8, 16), WARPS and ROTATED (0, 1).
#include "finish.cuh"
#include "hadamard.cuh"
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

// The online rotation of a row of K inputs (see hadamard.cuh), null and zero without one.
struct Rotation {
    const u32* signs;
    const u32* base_signs;
    int base, rest_bits;
    float scale;
};

// Inputs [from, to) of x (M, K), `width` from one row to the next.
struct Rows {
    const u16* x;
    int M, from, to, width;

    // B fragments of half a tile's inputs, from input k on. Zeros past M and K.
    INLINE void read(u32 (&b)[2][COLUMNS][2], int k, int lane) const {
        const int input = k + lane % 4 * 8;
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
            const int token = 8 * n + lane / 4;
            uint4 v = make_uint4(0, 0, 0, 0);
            if (token < M && input < to) {
                const uint4* at = (const uint4*)(x + (size_t)token * width + input - from);
                v = ROTATED ? ld_shared(at) : *at;
            }
            b[0][n][0] = v.x, b[0][n][1] = v.y, b[1][n][0] = v.z, b[1][n][1] = v.w;
        }
    }
};

// Rows of x rotated into shared memory: whole Hadamard blocks around inputs [low, high). shared: M * 2 + 4 bytes for
// each of these inputs. All threads call it.
INLINE Rows rotate_rows(u8* shared, const u16* x, const Rotation& rotation, int M, int K, int low, int high) {
    using T = ELEMENT;
    constexpr int THREADS = WARPS * 32;
    const int order = rotation.base << rotation.rest_bits;
    const int from = low / order * order, to = min(K, (high + order - 1) / order * order), width = to - from;
    float* values = (float*)shared;
    u16* rotated = (u16*)(values + width);
    for (int m = 0; m < M; ++m) {
        for (int index = 2 * threadIdx.x; index < width; index += 2 * THREADS) {
            const float2 pair = unpack2<T>(*(const u32*)(x + (size_t)m * K + from + index));
            const float first = pair.x * rotation.scale, second = pair.y * rotation.scale;
            st_shared(values + index, is_negative(rotation.signs, from + index) ? -first : first);
            st_shared(values + index + 1, is_negative(rotation.signs, from + index + 1) ? -second : second);
        }
        sync_block();
        if (rotation.base > 1)
            base_shared<THREADS>(values, width, rotation.base, rotation.rest_bits, rotation.base_signs);
        sylvester_shared<THREADS>(values, width, 0, rotation.rest_bits);
        for (int index = 2 * threadIdx.x; index < width; index += 2 * THREADS) {
            const u32 pair = pack2<T>(ld_shared(values + index), ld_shared(values + index + 1));
            st_shared((u32*)(rotated + m * width + index), pair);
        }
        sync_block();
    }
    return {rotated, M, from, to, width};
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
           int tiles_k, int group, int groups, int rank, const u32* signs, const u32* base_signs, int base,
           int rest_bits, float scale) {
    DYNAMIC_SHARED(shared);
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
    Rows rows = {x, M, 0, K, K};
    if (ROTATED) {
        const int low = (int)((long long)tiles_k * split / splits), high = (int)((long long)tiles_k * (split + 1) / splits);
        const Rotation rotation = {signs, base_signs, base, rest_bits, scale};
        rows = rotate_rows(shared, x, rotation, M, K, low * TILE, high * TILE);
    }
    for (int k = first; k < end; ++k) {
        const Stage stage = next;
        if (k + 1 < end) read(k + 1);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            u32 b[2][COLUMNS][2];
            rows.read(b, k * TILE + 32 * h, lane);
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
