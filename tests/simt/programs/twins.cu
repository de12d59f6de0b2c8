// The twins one by one: arguments in, results out, for test_twins.py to compare.
#include "ptx.cuh"

// pairs: n words of two float32 each; packed: their 16-bit forms; unpacked: those as float32 again.
template <class T>
INLINE void convert(const float2* pairs, u32* packed, float2* unpacked, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    packed[i] = pack2<T>(pairs[i].x, pairs[i].y);
    unpacked[i] = unpack2<T>(packed[i]);
}
extern "C" __global__ void convert_half(const float2* pairs, u32* packed, float2* unpacked, int n) {
    convert<Half>(pairs, packed, unpacked, n);
}
extern "C" __global__ void convert_bfloat(const float2* pairs, u32* packed, float2* unpacked, int n) {
    convert<Bfloat>(pairs, packed, unpacked, n);
}

template <class T>
INLINE void fused(const u32* a, const u32* b, const u32* c, u32* d, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) d[i] = fma2<T>(a[i], b[i], c[i]);
}
extern "C" __global__ void fused_half(const u32* a, const u32* b, const u32* c, u32* d, int n) {
    fused<Half>(a, b, c, d, n);
}
extern "C" __global__ void fused_bfloat(const u32* a, const u32* b, const u32* c, u32* d, int n) {
    fused<Bfloat>(a, b, c, d, n);
}

// words: 3 of 32 bits. results: lop3 with four tables, then popc, ffs, clz, brev of the first, the float of the second and
// back, and the halves of the second, each twice.
extern "C" __global__ void integers(const u32* words, u32* results) {
    const u32 a = words[0], b = words[1], c = words[2];
    results[0] = lop3<0xea>(a, b, c);
    results[1] = lop3<0x96>(a, b, c);
    results[2] = lop3<0x01>(a, b, c);
    results[3] = lop3<0xd8>(a, b, c);
    results[4] = __popc(a);
    results[5] = __ffs((int)a);
    results[6] = __clz((int)a);
    results[7] = __brev(a);
    results[8] = __float_as_uint(__uint_as_float(b));
    results[9] = lower_twice(b);
    results[10] = upper_twice(b);
}

// a: 16 x 16 row major, b: 16 x 8 row major, both 16-bit; d: 16 x 8 float32, added to.
template <class T>
INLINE void multiply(const u16* a, const u16* b, float* d) {
    const int r = threadIdx.x / 4, c = threadIdx.x % 4 * 2;
    auto pair = [](u16 low, u16 high) { return (u32)low | (u32)high << 16; };
    auto a_at = [&](int row, int column) { return pair(a[row * 16 + column], a[row * 16 + column + 1]); };
    auto b_at = [&](int row) { return pair(b[row * 8 + r], b[(row + 1) * 8 + r]); };
    const u32 a_fragment[4] = {a_at(r, c), a_at(r + 8, c), a_at(r, c + 8), a_at(r + 8, c + 8)};
    const u32 b_fragment[2] = {b_at(c), b_at(c + 8)};
    float* places[4] = {d + r * 8 + c, d + r * 8 + c + 1, d + (r + 8) * 8 + c, d + (r + 8) * 8 + c + 1};
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = *places[i];
    mma<T>(sums, a_fragment, b_fragment);
    for (int i = 0; i < 4; ++i) *places[i] = sums[i];
}
extern "C" __global__ void multiply_half(const u16* a, const u16* b, float* d) { multiply<Half>(a, b, d); }
extern "C" __global__ void multiply_bfloat(const u16* a, const u16* b, float* d) { multiply<Bfloat>(a, b, d); }

// matrices: four 8 x 8 of 16 bits. results: 32 lanes x 4 words. copied: the same by cp_async16, two groups.
extern "C" __global__ void transpose(const u16* matrices, u32* results) {
    DYNAMIC_SHARED(rows);
    const int lane = threadIdx.x;
    u8* row = rows + lane * 16;
    cp_async16(row, matrices, false);
    cp_async_commit();
    cp_async_wait<0>();
    cp_async16(row, matrices + lane * 8, true);
    cp_async_commit();
    cp_async_commit();
    cp_async_wait<1>();
    sync_warp();
    u32 fragment[4];
    ldmatrix_trans(fragment, row);
    for (int i = 0; i < 4; ++i) results[lane * 4 + i] = fragment[i];
}

// values: 64; sums: of each warp's 32, by shuffle_xor; rotated: each lane's right neighbour's.
extern "C" __global__ void shuffles(const float* values, float* sums, int* rotated) {
    const int self = threadIdx.x;
    float sum = values[self];
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    sums[self] = sum;
    rotated[self] = shuffle(self, self + 1);
}

// values: gridDim.x x 64, summed over blocks into sums (64) by the block that comes last; counter: 0 before and after.
extern "C" __global__ void split_sum(const float* values, float* partial, float* sums, int* counter) {
    __shared__ int is_last;
    const int self = threadIdx.x, blocks = gridDim.x;
    partial[blockIdx.x * 64 + self] = values[blockIdx.x * 64 + self];
    memory_fence();
    sync_block();
    if (self == 0) st_shared(&is_last, (int)(atomic_increment(counter) == blocks - 1));
    sync_block();
    if (!ld_shared(&is_last)) return;
    float sum = 0;
    for (int b = 0; b < blocks; ++b) sum += partial[b * 64 + self];
    sums[self] = sum;
    if (self == 0) *counter = 0;
}

// The arguments as they arrive; first and second may be one tensor or two views of one.
extern "C" __global__ void arguments(const int* first, int* second, const int* none, int number, float real,
                                     float* out) {
    const int self = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    if (blockIdx.x || blockIdx.y || blockIdx.z || self) return;
    second[0] = 7;
    out[0] = (float)first[0];
    out[1] = none ? 1.0f : 0.0f;
    out[2] = (float)number;
    out[3] = real;
    out[4] = (float)(gridDim.x * 100 + gridDim.y * 10 + gridDim.z);
    out[5] = (float)(blockDim.x * 100 + blockDim.y * 10 + blockDim.z);
}

// A number from every thread of every block, in the order in which they run.
extern "C" __global__ void order(int* places, int* counter) {
    places[blockIdx.x * blockDim.x + threadIdx.x] = atomic_increment(counter);
}

// rounds shuffles, barriers and shared accesses: for the clock.
extern "C" __global__ void busy(float* values, int rounds) {
    DYNAMIC_SHARED(memory);
    float4* mine = (float4*)memory + threadIdx.x;
    float sum = values[threadIdx.x];
    for (int i = 0; i < rounds; ++i) {
        sum = shuffle_xor(sum, 1);
        st_shared(mine, make_float4(sum, sum, sum, sum));
        if (i % 16 == 0) sync_block();
        sum = ld_shared(mine).w;
    }
    values[threadIdx.x] = sum;
}
