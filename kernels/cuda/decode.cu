// y = x W^T for few tokens (M <= TOKENS): bound by reading the weight, so every byte of it is read once, 16 at a time.
//
// A block owns 64 rows and a share of K, cut into one run of tiles per warp. Codes meet x on the tensor cores as whole
// numbers (exact in 16 bits), each with an offset that makes it cheap to unpack; for per_oc groups offset, zero point and
// scale are applied to the sums of a group, in float32:
//     sum over the group of (code - zero) scale x = scale (sum (code + offset) x - sum offset x - zero sum x)
// where the last two sums are rows of one more product. Offsets are at most 1024: what float32 sums lose to them is a
// tenth of what float16 weights would lose. per_ic scales change with every input and go onto the weights.
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
    bool closes[SETS];  // per_oc: whether a group, or this warp's part of it, ends with the set's inputs
};

// A warp's run of tiles [first, end), one after the other.
struct Reader {
    const uint4* next;
    const u16* scales;
    const u8* zeros;
    int left, lane;
    int per_group, within, set;  // per_oc: a group's length in parts of TILE / SETS inputs, where in it, its number
    int sets[SETS];              // per_ic: of the next tile

    INLINE Reader(const uint4* tiles, const u16* scales, const u8* zeros, int strip, int first, int end, int tiles_k,
                  int group, int groups, int lane)
        : next(tiles + ((size_t)strip * tiles_k + first) * (BITS * 32) + lane),
          scales(scales),
          zeros(zeros),
          left(end - first),
          lane(lane),
          per_group(group / (TILE / SETS)),
          within(first * SETS % per_group),
          set(strip * groups + first * SETS / per_group) {
#pragma unroll
        for (int index = 0; index < SETS; ++index)
            sets[index] = set_number(strip, first, index, tiles_k, group, groups);
    }

    // Nothing where no tile is left.
    INLINE void read(Stage& stage) {
        if (left <= 0) return;
        --left;
        stage.codes.read(next);
        next += BITS * 32;
#pragma unroll
        for (int index = 0; index < SETS; ++index) {
            if (PER_IC) continue;
            sets[index] = set;
            stage.closes[index] = ++within == per_group || (left == 0 && index == SETS - 1);
            if (within == per_group) within = 0, ++set;
        }
        stage.scales.read(scales, zeros, sets, lane);
        if (!PER_IC) return;
#pragma unroll
        for (int index = 0; index < SETS; ++index) ++sets[index];
    }
};

struct Sums {
    float acc[4][COLUMNS][4];    // finished
    float group[4][COLUMNS][4];  // of (code + offset) x in the running group
    float x[COLUMNS][4];         // of x in it (two tokens), and of offset x

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
                    const float zero = own.zero_point(i % 2 * 2 + d / 2);
                    const float sum = (group[i][n][d] - x[n][2 + d % 2]) - zero * x[n][d % 2];
                    acc[i][n][d] += (d / 2 ? scale.y : scale.x) * sum;
                }
        }
        clear_group();
    }
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

INLINE void multiply_half(Sums& sums, const Stage& stage, const Offsets& offsets, const u32 (&b)[2][COLUMNS][2], int h) {
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
                a[q] = PER_IC ? weights(codes, stage.scales.quarter(t), p) : codes.shifted(p, offsets.pair[p % 8 / 2]);
            }
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) mma<T>(PER_IC ? sums.acc[i][n] : sums.group[i][n], a, b[s][n]);
        }
    }
    if (PER_IC) return;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const u32 a[4] = {power<T>(0), offsets.pair[2 * s], power<T>(0), offsets.pair[2 * s + 1]};
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) mma<T>(sums.x[n], a, b[s][n]);
    }
}

INLINE void multiply_tile(Sums& sums, const Stage& stage, const Offsets& offsets, const Rows& rows, int k, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        u32 b[2][COLUMNS][2];
        rows.read(b, k * TILE + 32 * h, lane);
        multiply_half(sums, stage, offsets, b, h);
        if (!PER_IC && (SETS == 2 || h == 1) && stage.closes[h * (SETS - 1)]) sums.close_group(stage.scales, h);
    }
}

// Blocks that share a multiprocessor. Where the compiler is not told it aims at two, and spills for it.
constexpr int BLOCKS = TOKENS == 8 && BITS <= 4 && !PER_IC && SETS == 1 ? 2 : 1;
// Whether a tile is read while the one before is multiplied: two of them must fit into registers.
constexpr bool AHEAD = !PER_IC || SETS < 4 || TOKENS == 8;

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
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

    Reader reader(tiles, scales, zeros, strip, first, end, tiles_k, group, groups, lane);
    Stage even, odd;  // tiles take turns, so that no registers are copied
    if (AHEAD) reader.read(even);
    Rows rows = {x, M, 0, K, K};
    if (ROTATED) {
        const int low = (int)((long long)tiles_k * split / splits), high = (int)((long long)tiles_k * (split + 1) / splits);
        const Rotation rotation = {signs, base_signs, base, rest_bits, scale};
        rows = rotate_rows(shared, x, rotation, M, K, low * TILE, high * TILE);
    }
    const Offsets offsets((u32)M >> 31);
    for (int k = first; !AHEAD && k < end; ++k) {
        reader.read(even);
        multiply_tile(sums, even, offsets, rows, k, lane);
    }
    for (int k = first; AHEAD && k < end; k += 2) {
        const bool more = k + 1 < end;
        if (more) reader.read(odd);
        multiply_tile(sums, even, offsets, rows, k, lane);
        if (!more) break;
        if (k + 2 < end) reader.read(even);
        multiply_tile(sums, odd, offsets, rows, k + 1, lane);
    }
    store_fragments<4>(parts + warp * TOKENS * TOKEN_STRIDE, sums.acc, 0, lane, false);
    const Output output = {y, bias, low_rank_b, low_rank_t, partial, counters, M, N, rank};
    finish<ELEMENT, WARPS, TILE>(parts, output, strip * TILE, 0, strip, split, splits);
}
