// y = x W^T for more tokens than decode.cu takes: a pipeline of asynchronous copies feeds the tensor cores, codes become
// weights in registers.
//
// A block owns STRIPS strips of 64 rows and TOKENS tokens. Its 2 STRIPS SLICES warps each multiply half a strip (32 rows,
// so that sums and fragments of 64 tokens fit into registers) by every SLICES-th tile of the block's share of K. x lies
// in chunks of 16 bytes, which change places by halves in odd tokens: eight lanes that read fragments then meet all 32
// banks.
//
// Needs what tile.cuh needs, and TOKENS (a multiple of 8), STRIPS, SLICES, STAGES.
#include "finish.cuh"
#include "tile.cuh"

constexpr int WARPS = 2 * STRIPS * SLICES;
constexpr int COLUMNS = TOKENS / 8;
constexpr int CHUNKS = TILE / 8;  // in a token's part of a tile

// A stage in shared memory: weight tiles with their sets, one for each strip and slice, then x for each slice.
constexpr int SET_BYTES = TILE * 3;  // scales, then zero points
constexpr int CODE_BYTES = BITS * 512;
constexpr int TILE_BYTES = CODE_BYTES + SETS * SET_BYTES;
constexpr int X_BYTES = SLICES * TOKENS * TILE * 2;
constexpr int STAGE_BYTES = STRIPS * SLICES * TILE_BYTES + X_BYTES;

INLINE int x_offset(int slice, int m, int chunk) {
    return STRIPS * SLICES * TILE_BYTES + ((slice * TOKENS + m) * CHUNKS + (chunk ^ (m % 2 * 4))) * 16;
}

struct Work {
    const uint4* tiles;
    const u16* scales;
    const u8* zeros;
    const u16* x;
    int M, N, K, tiles_k, group, groups;
    int token, end;                         // first token of the block; end of its share in tiles
    int lane, z, strip, strip_slot, slice;  // what this warp multiplies

    // The tile that this warp multiplies in the round that starts at tile k.
    INLINE bool has_tile(int k) const { return strip * TILE < N && k + slice < end; }

    INLINE void copy_weight(u8* stage, int k) const {
        u8* own = stage + (slice * STRIPS + strip_slot) * TILE_BYTES;
        const uint4* from = tiles + ((size_t)strip * tiles_k + k) * (BITS * 32) + lane;
        for (int u = z; u < BITS; u += 2) cp_async16(own + (u * 32 + lane) * 16, from + u * 32, true);
        if (z == 0 && BITS > 1) return;  // the scales are the other warp's
#pragma unroll
        for (int index = 0; index < SETS; ++index) {
            u8* to = own + CODE_BYTES + index * SET_BYTES;
            const size_t at = (size_t)set_number(strip, k, index, tiles_k, group, groups) * TILE;
            if (lane < 8) cp_async16(to + lane * 16, scales + at + lane * 8, true);
            if (!SYMMETRIC && lane >= 8 && lane < 12) cp_async16(to + lane * 16, zeros + at + (lane - 8) * 16, true);
        }
    }

    INLINE void copy_x(u8* stage, int k) const {
        for (int index = threadIdx.x; index < SLICES * TOKENS * CHUNKS; index += WARPS * 32) {
            const int chunk = index % CHUNKS, m = index / CHUNKS % TOKENS, at = index / CHUNKS / TOKENS;
            const int input = (k + at) * TILE + chunk * 8;
            const bool valid = token + m < M && input < K && k + at < end;
            cp_async16(stage + x_offset(at, m, chunk), valid ? x + (size_t)(token + m) * K + input : x, valid);
        }
    }

    INLINE void copy(u8* stage, int k) const {
        if (k < end) {
            if (has_tile(k)) copy_weight(stage, k + slice);
            copy_x(stage, k);
        }
        cp_async_commit();
    }

    INLINE Codes read_codes(const u8* own, int t) const {
        Codes codes;
        const auto word = [&](int w) { return ld_shared((const u32*)own + (w / 4 * 32 + lane) * 4 + w % 4); };
        if (LOW % 4 == 0) {
#pragma unroll
            for (int u = 0; u < LOW / 4; ++u) {
                const uint4 v = ld_shared((const uint4*)own + (t * LOW / 4 + u) * 32 + lane);
                codes.low[4 * u] = v.x, codes.low[4 * u + 1] = v.y;
                codes.low[(4 * u + 2) % LOW] = v.z, codes.low[(4 * u + 3) % LOW] = v.w;
            }
        } else {
#pragma unroll
            for (int w = 0; w < LOW; ++w) codes.low[w] = word(t * LOW + w);
        }
#pragma unroll
        for (int w = 0; w < HIGH; ++w) codes.high[w] = word(4 * LOW + t * HIGH + w);
        return codes;
    }

    INLINE Scales read_scales(const u8* own, int t) const {
        Scales result;
#pragma unroll
        for (int i = 0; i < Scales::sets; ++i) {
            const u8* from = own + CODE_BYTES + Scales::set(t, i) * SET_BYTES;
            result.read(i, (const u16*)from, from + TILE * 2, t, lane, [](auto pointer) { return ld_shared(pointer); });
        }
        return result;
    }

    INLINE void multiply(float (&acc)[2][COLUMNS][4], const u8* stage) const {
        using T = ELEMENT;
        const u8* own = stage + (slice * STRIPS + strip_slot) * TILE_BYTES;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const Codes codes = read_codes(own, 2 * h + z);
            const Scales own_scales = read_scales(own, 2 * h + z);
            u32 b[2][COLUMNS][2];
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) {
                const uint4 v =
                    ld_shared((const uint4*)(stage + x_offset(slice, 8 * n + lane / 4, 4 * h + lane % 4)));
                b[0][n][0] = v.x, b[0][n][1] = v.y, b[1][n][0] = v.z, b[1][n][1] = v.w;
            }
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    u32 a[4];
#pragma unroll
                    for (int q = 0; q < 4; ++q) a[q] = weights(codes, own_scales, 8 * i + 4 * s + q);
#pragma unroll
                    for (int n = 0; n < COLUMNS; ++n) mma<T>(acc[i][n], a, b[s][n]);
                }
        }
    }
};

extern "C" __global__ void __launch_bounds__(STRIPS* SLICES * 64, 1)
    matmul(const uint4* tiles, const u16* scales, const u8* zeros, const u16* x, u16* y, const u16* bias,
           const u16* low_rank_b, const float* low_rank_t, float* partial, int* counters, int M, int N, int K,
           int tiles_k, int group, int groups, int rank) {
    DYNAMIC_SHARED(shared);
    const int warp = threadIdx.x / 32, split = blockIdx.y, splits = gridDim.y;
    const int first = (int)((long long)tiles_k * split / splits);
    const int end = (int)((long long)tiles_k * (split + 1) / splits);
    const int slot_of_strip = warp / 2 % STRIPS, slice = warp / 2 / STRIPS;
    const Work work = {tiles, scales, zeros, x, M, N, K, tiles_k, group, groups, (int)blockIdx.z * TOKENS, end,
                       (int)threadIdx.x % 32, warp % 2, (int)blockIdx.x * STRIPS + slot_of_strip, slot_of_strip, slice};
    float acc[2][COLUMNS][4] = {};

#pragma unroll
    for (int ahead = 0; ahead < STAGES - 1; ++ahead) work.copy(shared + ahead * STAGE_BYTES, first + ahead * SLICES);
    int slot = 0;
    for (int k = first; k < end; k += SLICES) {
        cp_async_wait<STAGES - 2>();
        sync_block();  // everybody's copies are there, and the slot filled next has been read by all
        work.copy(shared + (slot == 0 ? STAGES - 1 : slot - 1) * STAGE_BYTES, k + (STAGES - 1) * SLICES);
        if (work.has_tile(k)) work.multiply(acc, shared + slot * STAGE_BYTES);
        slot = slot == STAGES - 1 ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    float* sums = (float*)shared;
#pragma unroll
    for (int turn = 0; turn < SLICES; ++turn) {
        sync_block();
        if (slice == turn) store_fragments<2>(sums, acc, slot_of_strip * TILE + work.z * 32, work.lane, turn > 0);
    }
    const Output output = {y, bias, low_rank_b, low_rank_t, partial, counters, M, N, rank};
    const int block = blockIdx.z * gridDim.x + blockIdx.x;
    finish<ELEMENT, 1, STRIPS * TILE>(sums, output, blockIdx.x * STRIPS * TILE, work.token, block, split, splits);
}
