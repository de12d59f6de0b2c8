// Everything the kernels ask of the hardware, one inline function each.
//
// Kernels use these and plain C++, nothing else: no CUDA header is included, so that NVRTC needs no toolkit. Compiled
// with QUANTC_HOST the same sources run on a CPU: tests/simt/host.h holds a twin of every function below.
//
// Shared memory is touched through ld_shared, st_shared, cp_async16 and ldmatrix_trans only: the host twins keep a
// record of who wrote which byte.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Half {};    // IEEE binary16
struct Bfloat {};  // bfloat16
struct Float {};   // IEEE binary32

#ifdef QUANTC_HOST
#include "host.h"
#else

#define INLINE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]

#if __CUDA_ARCH__ >= 800
#define QUANTC_AMPERE 1
#else
#define QUANTC_AMPERE 0
#endif

// --- integers ---------------------------------------------------------------------------------------------------

// Bitwise function of three words; bit (a << 2 | b << 1 | c) of TABLE is its value.
template <int TABLE>
INLINE u32 lop3(u32 a, u32 b, u32 c) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
    return result;
}

// A word's lower or upper half, twice.
INLINE u32 lower_twice(u32 word) {
    u32 result;
    asm("prmt.b32 %0, %1, %1, 0x1010;" : "=r"(result) : "r"(word));
    return result;
}
INLINE u32 upper_twice(u32 word) {
    u32 result;
    asm("prmt.b32 %0, %1, %1, 0x3232;" : "=r"(result) : "r"(word));
    return result;
}

// The lower halves of two words, or their upper ones, the first word's first.
INLINE u32 lower_halves(u32 first, u32 second) {
    u32 result;
    asm("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(result) : "r"(first), "r"(second));
    return result;
}
INLINE u32 upper_halves(u32 first, u32 second) {
    u32 result;
    asm("prmt.b32 %0, %1, %2, 0x7632;" : "=r"(result) : "r"(first), "r"(second));
    return result;
}

// The lower word of 64 bits from bit `shift` (0 to 31) on.
INLINE u32 funnel_right(u32 low, u32 high, int shift) {
    u32 result;
    asm("shf.r.wrap.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(shift));
    return result;
}

// The sum of a word's bytes and start.
INLINE u32 sum_bytes(u32 bytes, u32 start) {
    u32 result;
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(bytes), "r"(0x01010101), "r"(start));
    return result;
}

// --- pairs of 16-bit floats in one word, the lower half first ------------------------------------------------------

// a * b + c, rounded once.
template <class T>
INLINE u32 fma2(u32 a, u32 b, u32 c);

template <>
INLINE u32 fma2<Half>(u32 a, u32 b, u32 c) {
    u32 result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

template <>
INLINE u32 fma2<Bfloat>(u32 a, u32 b, u32 c) {
    u32 result = 0;
#if QUANTC_AMPERE
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
#endif
    return result;
}

// Two floats rounded to nearest, even.
template <class T>
INLINE u32 pack2(float low, float high);

template <>
INLINE u32 pack2<Half>(float low, float high) {
    u32 result;
#if QUANTC_AMPERE
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#else
    asm("{.reg .f16 a, b;\n cvt.rn.f16.f32 a, %1;\n cvt.rn.f16.f32 b, %2;\n mov.b32 %0, {a, b};}"
        : "=r"(result)
        : "f"(low), "f"(high));
#endif
    return result;
}

template <>
INLINE u32 pack2<Bfloat>(float low, float high) {
    u32 result = 0;
#if QUANTC_AMPERE
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#endif
    return result;
}

template <class T>
INLINE float2 unpack2(u32 pair);

template <>
INLINE float2 unpack2<Half>(u32 pair) {
    float2 result;
    asm("{.reg .f16 a, b;\n mov.b32 {a, b}, %2;\n cvt.f32.f16 %0, a;\n cvt.f32.f16 %1, b;}"
        : "=f"(result.x), "=f"(result.y)
        : "r"(pair));
    return result;
}

template <>
INLINE float2 unpack2<Bfloat>(u32 pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// --- tensor cores -------------------------------------------------------------------------------------------------

// d (16 x 8, float32) += a (16 x 16, row major) b (16 x 8, column major), in the fragments of mma.m16n8k16: with
// r = lane / 4 and c = lane % 4 * 2, a holds (r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8) and each one's right
// neighbour, b holds rows c, c + 1 and c + 8, c + 9 of column r, d holds (r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1).
template <class T>
INLINE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);

template <>
INLINE void mma<Half>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if QUANTC_AMPERE
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; ++half)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

template <>
INLINE void mma<Bfloat>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if QUANTC_AMPERE
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

INLINE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// Four 8 x 8 matrices of 16-bit values, each transposed; lane i gives the 16-byte row i % 8 of matrix i / 8.
INLINE void ldmatrix_trans(u32 (&result)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// --- memory -------------------------------------------------------------------------------------------------------

// 16 bytes that nobody reads again: past the first-level cache.
INLINE uint4 load_once(const uint4* pointer) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(pointer));
    return v;
}

// What another block may have written during this launch: past the first-level cache, which knows nothing of it.
INLINE float load_fresh(const float* pointer) {
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(pointer) : "memory");
    return value;
}

template <class V>
INLINE V ld_shared(const V* pointer) {
    return *pointer;
}

template <class V>
INLINE void st_shared(V* pointer, V value) {
    *pointer = value;
}

// 16 bytes from global to shared memory, zeros where not valid; there after cp_async_wait and a barrier.
INLINE void cp_async16(void* shared, const void* global, bool valid) {
#if QUANTC_AMPERE
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
#else
    *(uint4*)shared = valid ? *(const uint4*)global : make_uint4(0, 0, 0, 0);
#endif
}

INLINE void cp_async_commit() {
#if QUANTC_AMPERE
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most PENDING of this thread's groups are on their way.
template <int PENDING>
INLINE void cp_async_wait() {
#if QUANTC_AMPERE
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// --- threads ------------------------------------------------------------------------------------------------------

INLINE void sync_block() { __syncthreads(); }
INLINE void sync_warp() { __syncwarp(); }

// All 32 lanes take part in a shuffle.
template <class V>
INLINE V shuffle_xor(V value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <class V>
INLINE V shuffle(V value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

// The least value of a warp's lanes, which all take part.
INLINE int least_of_warp(int value) {
#if QUANTC_AMPERE
    int result;
    asm volatile("redux.sync.min.s32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(value));
    return result;
#else
    for (int mask = 16; mask > 0; mask /= 2) value = min(value, shuffle_xor(value, mask));
    return value;
#endif
}

// What this thread wrote before is seen by whoever sees what it writes after.
INLINE void memory_fence() { __threadfence(); }

// Adds one; returns what was there.
INLINE int atomic_increment(int* counter) { return atomicAdd(counter, 1); }

#endif
