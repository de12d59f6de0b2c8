// y = x W^T for few tokens, W a weight with dropped groups: bound by reading the groups that stay, and for more tokens
// by fetching the inputs that they meet.
//
// Work is split by kept groups, not by rows (as in GQSA, arXiv:2412.17560): every warp takes `share` steps, one after
// the other and whichever octets they belong to. What a warp has of an octet is a piece. Pieces go to memory, and who
// completes an octet adds them up in their order: the same bits whoever that is.
//
// x lies in shared memory, whole rows of it, since nobody knows which inputs come next. With ROTATED each block rotates
// its row first, while its first steps are on their way.
//
// Needs what kept.cuh needs, and TOKENS (1, 8), WARPS and ROTATED (0, 1; for one token).
#include "hadamard.cuh"
#include "kept.cuh"
#include "output.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int PIECE = OCTET * TOKENS;  // floats
constexpr int AHEAD = 3;               // steps on their way: 2 KB for a warp with 4 bits, 37 KB on a multiprocessor

// Where pieces lie in Output::partial (pieces, TOKENS, 8). Along the steps each piece is of the next octet, of the next
// warp, or of both: the sum of their numbers tells pieces apart. counters (octets).
INLINE size_t piece_at(int octet, int worker) { return (size_t)(octet + worker) * PIECE; }

// x (M, K) into shared memory; zeros past K and M. Two tokens change places every two inputs, so that 16 bytes are what
// a lane needs of both: rows (pairs of tokens, width / 2, 2, 2), or (width,) of one.
INLINE void load_rows(u16* rows, const u16* x, int M, int K, int width) {
    const uint4 none = make_uint4(0, 0, 0, 0);
    for (int m = 0; m < M; m += 2)
        for (int k = threadIdx.x * 8; k < width; k += THREADS * 8) {
            const uint4 even = k < K ? *(const uint4*)(x + (size_t)m * K + k) : none;
            if (TOKENS == 1) {
                st_shared((uint4*)(rows + k), even);
                continue;
            }
            const uint4 odd = m + 1 < M && k < K ? *(const uint4*)(x + (size_t)(m + 1) * K + k) : none;
            uint4* to = (uint4*)(rows + m * width + 2 * k);
            st_shared(to, make_uint4(even.x, odd.x, even.y, odd.y));
            st_shared(to + 1, make_uint4(even.z, odd.z, even.w, odd.w));
        }
    sync_block();
}

// A row of K inputs in shared memory, in place; values: room for K floats.
INLINE void rotate_row(u16* row, float* values, int K, const Rotation& rotation) {
    using T = ELEMENT;
    for (int k = threadIdx.x * 2; k < K; k += THREADS * 2) {
        const float2 pair = unpack2<T>(ld_shared((const u32*)(row + k)));
        st_shared(values + k, pair.x);
        st_shared(values + k + 1, pair.y);
    }
    sync_block();
    hadamard_shared<THREADS>(values, K, rotation.base, rotation.rest_bits, rotation.signs, rotation.base_signs,
                             rotation.scale);
    for (int k = threadIdx.x * 2; k < K; k += THREADS * 2)
        st_shared((u32*)(row + k), pack2<T>(ld_shared(values + k), ld_shared(values + k + 1)));
    sync_block();
}

// Of an octet: fragments of which only the diagonal counts. A product has room for 16 times 8 runs of inputs, two for
// each row: what two tokens have there, or for one token the weights of two slots, of which each product uses its own.
struct Sums {
    float d[TOKENS == 1 ? 2 : TOKENS / 2][4];

    INLINE void clear() {
#pragma unroll
        for (auto& fragment : d)
#pragma unroll
            for (float& value : fragment) value = 0;
    }

    // own: of the lane's inputs, in slots that begin at input 0.
    INLINE void add(const Step& step, const Offsets& offsets, const u16* own, int M, int width) {
#pragma unroll
        for (int s = 0; s < SLOTS; s += 2) {
            u32 even[2], odd[2];
            step.weights(even, s, offsets);
            step.weights(odd, s + 1, offsets);
            const int even_input = step.slot_input(s), odd_input = step.slot_input(s + 1);
            if (TOKENS == 1) {
                const u32 a[4] = {even[0], odd[0], even[1], odd[1]};
                multiply_one(d[0], a, own + even_input);
                multiply_one(d[1], a, own + odd_input);
                continue;
            }
#pragma unroll
            for (int t = 0; t < TOKENS / 2; ++t) {
                if (2 * t >= M) continue;
                multiply_two(d[t], own + 2 * (t * width + even_input), even);
                multiply_two(d[t], own + 2 * (t * width + odd_input), odd);
            }
        }
    }

    INLINE static void multiply_one(float (&d)[4], const u32 (&weights)[4], const u16* x) {
        const uint2 v = ld_shared((const uint2*)x);
        const u32 b[2] = {v.x, v.y};
        mma<ELEMENT>(d, weights, b);
    }

    INLINE static void multiply_two(float (&d)[4], const u16* x, const u32 (&weights)[2]) {
        const uint4 v = ld_shared((const uint4*)x);
        const u32 a[4] = {v.x, v.y, v.z, v.w};
        mma<ELEMENT>(d, a, weights);
    }

    // piece (TOKENS, 8)
    INLINE void store(float* piece, int M, int lane) const {
        const int row = lane / 4, odd = row % 2;
        if (lane % 4 != row / 2) return;
        if (TOKENS == 1) {
            piece[row] = odd ? d[0][1] + d[1][3] : d[0][0] + d[1][2];
            return;
        }
#pragma unroll
        for (int m = 0; m < TOKENS; ++m)
            if (m < M) piece[m * OCTET + row] = odd ? d[m / 2][m % 2 * 2 + 1] : d[m / 2][m % 2 * 2];
    }
};

// A lane's octets among those of a warp, and whether all of their pieces are there now.
INLINE bool completes(const int* starts, int* counters, int octet, int share) {
    const int pieces = (starts[octet + 1] - 1) / share - starts[octet] / share + 1;
    return atomic_increment(counters + octet) == pieces - 1;
}

// The sums of an octet's pieces as y. All lanes call it.
INLINE void write_octet(const Output& o, const int* starts, const int* rows, int octet, int share, int lane) {
    const int first = starts[octet] / share, last = (starts[octet + 1] - 1) / share;
    memory_fence();  // by the one who has counted, before the others read
    sync_warp();
    for (int index = lane; index < OCTET * o.M; index += 32) {
        float value = 0;
        for (int worker = first; worker <= last; ++worker)
            value += load_fresh(o.partial + piece_at(octet, worker) + index);
        const int row = rows[octet * OCTET + index % OCTET];
        if (row < o.N) write_output<ELEMENT>(o, index / OCTET, row, value);
    }
    if (lane == 0) o.counters[octet] = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    kept_decode(const u32* codes,    // as kept.cuh says, and the next five too
                const u32* groups, const u8* zeros, const int* owners, const int* starts, const int* rows,
                const u16* x,        // (M, K)
                u16* y,              // (M, N)
                const u16* bias,     // as Output says, and the next four too
                const u16* low_rank_b, const float* low_rank_t, float* partial, int* counters,
                int M, int N, int K, int rank,
                int width,           // K in whole groups, and a group more
                int steps, int share,
                const u32* signs, const u32* base_signs, int base, int rest_bits, float scale) {
    DYNAMIC_SHARED(shared);
    u16* const inputs = (u16*)shared;
    const int lane = threadIdx.x % 32, worker = blockIdx.x * WARPS + threadIdx.x / 32;
    const int first = worker * share, end = min(steps, first + share);

    Step ahead[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a)
        if (first + a < end) ahead[a].read(codes, groups, zeros, owners, first + a, lane);
    load_rows(inputs, x, M, K, width);
    if (ROTATED) rotate_row(inputs, (float*)(inputs + width), K, {signs, base_signs, base, rest_bits, scale});
    if (first >= end) return;

    const Offsets offsets((u32)M >> 31);
    const u16* own = inputs + (TOKENS == 1 ? 1 : 2) * Step::lane_input(lane);
    const int first_octet = ahead[0].octet();
    int octet = first_octet;
    Sums sums;
    sums.clear();
    for (int step = first; step < end; step += AHEAD)
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            if (step + a >= end) continue;
            sums.add(ahead[a], offsets, own, M, width);
            octet = ahead[a].octet();
            if (ahead[a].ends_octet() || step + a == end - 1) {
                sums.store(partial + piece_at(octet, worker), M, lane);
                sums.clear();
            }
            if (step + a + AHEAD < end) ahead[a].read(codes, groups, zeros, owners, step + a + AHEAD, lane);
        }
    sync_warp();
    memory_fence();  // by those who count: of all pieces that their warp has written

    const Output output = {y, bias, low_rank_b, low_rank_t, partial, counters, M, N, rank};
    for (int from = first_octet; from <= octet; from += 32) {
        const bool complete = from + lane <= octet && completes(starts, counters, from + lane, share);
        for (int index = 0; index < 32 && from + index <= octet; ++index)
            if (shuffle((int)complete, index)) write_octet(output, starts, rows, from + index, share, lane);
    }
}
