// y = x W^T for few tokens (M <= TOKENS), W in trellis codes with tiles of 64 rows: bound by the arithmetic that makes
// values of states, six instructions for a weight, alike for all widths.
//
// A block owns a tile and a share of K, cut into one run of chunks of 32 inputs for each warp. A chunk's walks come by
// asynchronous copies into slots of the warp's own. Row 8 m + r of a tile is at place 8 r + m of a walk, so that a lane,
// which has rows r = lane / 4 and 8 more in steps of 8 of the A fragments, has eight neighbouring places. Of the inputs it
// has 8 c to 8 c + 7, c = lane % 4: those of the 16 bytes of x that are its B fragments as they are.
//
// Values are whole numbers, exact in 16 bits; scales of rows multiply the sums, in float32. float32 activations are sums
// of three bfloat16 numbers, which multiply the same values one after the other.
//
// Needs what trellis.cuh needs, ELEMENT, TOKENS (8, 16), WARPS and STAGES.
#include "finish.cuh"
#include "trellis.cuh"

constexpr int TILE = 64, CHUNK = 32, COLUMNS = TOKENS / 8;
constexpr int COLUMN_BYTES = TILE / 8 * BITS, CHUNK_BYTES = CHUNK * COLUMN_BYTES;
constexpr int OWN_BYTES = 8 * COLUMN_BYTES, OWN_STRIDE = OWN_BYTES + 32;  // of a lane's inputs: four lanes in other banks
constexpr int SLOT_BYTES = CHUNK / 8 * OWN_STRIDE;

// T as the tensor cores take it: PIECES fragments of type, of two steps, for eight neighbouring inputs.
template <class T>
struct Operand {
    using type = T;
    static constexpr int PIECES = 1;

    static INLINE void read(u32 (&words)[PIECES][4], const u16* x, size_t index) {
        const uint4 v = *(const uint4*)(x + index);
        words[0][0] = v.x, words[0][1] = v.y, words[0][2] = v.z, words[0][3] = v.w;
    }
};

template <>
struct Operand<Float> {
    using type = Bfloat;
    static constexpr int PIECES = 3;

    static INLINE void read(u32 (&words)[PIECES][4], const u16* x, size_t index) {
        const float4* from = (const float4*)((const float*)x + index);
        const float4 low = from[0], high = from[1];
        split(words, 0, low.x, low.y);
        split(words, 1, low.z, low.w);
        split(words, 2, high.x, high.y);
        split(words, 3, high.z, high.w);
    }

    static INLINE void split(u32 (&words)[PIECES][4], int word, float first, float second) {
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
            words[piece][word] = pack2<Bfloat>(first, second);
            const float2 taken = unpack2<Bfloat>(words[piece][word]);
            first -= taken.x, second -= taken.y;
        }
    }
};

using X = Operand<ELEMENT>;

struct Fragments {
    u32 words[COLUMNS][X::PIECES][4];

    // Of the chunk that begins at input `from`; zeros past M and K.
    INLINE void read(const u16* x, int M, int K, int from, int lane) {
        const int input = from + lane % 4 * 8;
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
            const int token = 8 * n + lane / 4;
#pragma unroll
            for (int piece = 0; piece < X::PIECES; ++piece)
#pragma unroll
                for (int word = 0; word < 4; ++word) words[n][piece][word] = 0;
            if (token < M && input < K) X::read(words[n], x, (size_t)token * K + input);
        }
    }
};

// Where a lane finds its places in the walk of a column: in which of its words, around it, and from which bit of the
// first on: 0 for 4 bits, at most 24 for others.
struct Places {
    static constexpr int WORDS = (Stretch<8>::NEEDED + (BITS == 4 ? 0 : 24) + 31) / 32;
    int bytes[WORDS], shift;

    INLINE explicit Places(int lane) : shift(lane / 4 * BITS % 4 * 8) {
#pragma unroll
        for (int w = 0; w < WORDS; ++w)
            bytes[w] = (lane / 4 * BITS / 4 + w) % (2 * BITS) * 4 + lane % 4 * OWN_STRIDE;
    }

    INLINE Stretch<8> read(const u8* slot, int column) const {
        u32 raw[WORDS];
#pragma unroll
        for (int w = 0; w < WORDS; ++w) raw[w] = ld_shared((const u32*)(slot + column * COLUMN_BYTES + bytes[w]));
        Stretch<8> stretch;
        stretch.set(raw, shift);
        return stretch;
    }
};

// A chunk of a tile's walks into a slot; zeros where fewer inputs are left.
INLINE void copy_chunk(u8* slot, const u8* from, int inputs, int lane) {
    for (int piece = lane; piece < CHUNK_BYTES / 16; piece += 32) {
        const bool valid = piece * 16 < inputs * COLUMN_BYTES;
        u8* to = slot + piece * 16 / OWN_BYTES * OWN_STRIDE + piece * 16 % OWN_BYTES;
        cp_async16(to, valid ? from + piece * 16 : from, valid);
    }
}

INLINE void multiply(float (&acc)[4][COLUMNS][4], const u8* slot, const Places& places, const Fragments& x) {
    using T = X::type;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        Stretch<8> columns[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) columns[c] = places.read(slot, 4 * s + c);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 a[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const int place = 2 * i + q % 2, first = q / 2 * 2;
                a[q] = pair_of_values<T>(columns[first].state(place), columns[first + 1].state(place));
            }
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
                for (int piece = 0; piece < X::PIECES; ++piece) {
                    const u32 b[2] = {x.words[n][piece][2 * s], x.words[n][piece][2 * s + 1]};
                    mma<T>(acc[i][n], a, b);
                }
        }
    }
}

// Sums times the scales of their rows, from `row` on.
INLINE void scale_rows(float (&acc)[4][COLUMNS][4], const u16* scales, int row, int N, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int d = 0; d < 4; ++d) {
            const int own = row + 16 * i + d / 2 * 8 + lane / 4;
            const float scale = own < N ? unpack2<Half>(scales[own]).x : 0.0f;
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) acc[i][n][d] *= scale;
        }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
    trellis_decode(const u8* walks,    // (tiles, K, COLUMN_BYTES)
                   const u16* scales,  // (N,), float16
                   const u16* x,       // (M, K)
                   u16* y,             // (M, N)
                   const u16* bias,    // as Output says, and the next four too
                   const u16* low_rank_b, const float* low_rank_t, float* partial, int* counters,
                   int M, int N, int K, int rank) {
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile = blockIdx.x, split = blockIdx.y, splits = gridDim.y;
    const int chunks = (K + CHUNK - 1) / CHUNK, share = split * WARPS + warp, shares = splits * WARPS;
    const int first = (int)((long long)chunks * share / shares);
    const int end = (int)((long long)chunks * (share + 1) / shares);
    const u8* own = walks + (size_t)tile * K * COLUMN_BYTES;
    u8* slots = shared + warp * STAGES * SLOT_BYTES;
    const auto copy = [&](int slot, int chunk) {
        const u8* from = own + (size_t)chunk * CHUNK_BYTES;
        if (chunk < end) copy_chunk(slots + slot * SLOT_BYTES, from, K - chunk * CHUNK, lane);
        cp_async_commit();
    };

    float acc[4][COLUMNS][4] = {};
    const Places places(lane);
#pragma unroll
    for (int ahead = 0; ahead < STAGES - 1; ++ahead) copy(ahead, first + ahead);
    int slot = 0;
    for (int chunk = first; chunk < end; ++chunk) {
        Fragments fragments;
        fragments.read(x, M, K, chunk * CHUNK, lane);
        cp_async_wait<STAGES - 2>();
        sync_warp();  // every lane's copies are there, and the slot filled next has been read by all
        copy(slot == 0 ? STAGES - 1 : slot - 1, chunk + STAGES - 1);
        multiply(acc, slots + slot * SLOT_BYTES, places, fragments);
        slot = slot == STAGES - 1 ? 0 : slot + 1;
    }
    scale_rows(acc, scales, tile * TILE, N, lane);
    cp_async_wait<0>();
    sync_block();
    float* parts = (float*)shared;
    store_fragments<4>(parts + warp * TOKENS * TOKEN_STRIDE, acc, 0, lane, false);
    const Output output = {y, bias, low_rank_b, low_rank_t, partial, counters, M, N, rank};
    finish<ELEMENT, WARPS, TILE>(parts, output, tile * TILE, 0, tile, split, splits);
}
