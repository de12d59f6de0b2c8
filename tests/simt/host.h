// The twins of what ptx.cuh asks of a GPU, on a CPU: the same names and meanings, and a report where a GPU would give
// wrong numbers or stop.
//
// What a kernel's source must keep to: every lane of a warp reaches a warp operation, and every thread a barrier, at
// the same line; one thread alone writes a byte of shared memory between barriers, even if all would write the same.
// Not seen here: races on global memory, a missing memory_fence, a block that waits for another one (it never ends).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#include "runtime.h"

#define __global__
#define __device__
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(n) alignas(n)

#define INLINE inline
#define DYNAMIC_SHARED(name) u8* const name = simt::dynamic_memory()

#ifndef QUANTC_AMPERE
#define QUANTC_AMPERE 1
#endif

using std::max;
using std::min;

INLINE u32 __float_as_uint(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
INLINE float __uint_as_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
INLINE int __float_as_int(float value) { return (int)__float_as_uint(value); }
INLINE float __int_as_float(int bits) { return __uint_as_float((u32)bits); }

INLINE int __popc(u32 word) { return __builtin_popcount(word); }
INLINE int __ffs(int word) { return __builtin_ffs(word); }
INLINE int __clz(int word) { return word ? __builtin_clz((u32)word) : 32; }
INLINE u32 __brev(u32 word) {
    u32 result = 0;
    for (int i = 0; i < 32; ++i) result |= (word >> i & 1) << (31 - i);
    return result;
}

// --- integers and pairs of 16-bit floats --------------------------------------------------------------------------

template <int TABLE>
INLINE u32 lop3(u32 a, u32 b, u32 c) {
    u32 result = 0;
    for (int index = 0; index < 8; ++index)
        if (TABLE >> index & 1) result |= (index & 4 ? a : ~a) & (index & 2 ? b : ~b) & (index & 1 ? c : ~c);
    return result;
}

INLINE u32 lower_twice(u32 word) { return (word & 0xffffu) | word << 16; }
INLINE u32 upper_twice(u32 word) { return word >> 16 | (word & 0xffff0000u); }

INLINE u32 lower_halves(u32 first, u32 second) { return (first & 0xffffu) | second << 16; }
INLINE u32 upper_halves(u32 first, u32 second) { return first >> 16 | (second & 0xffff0000u); }
INLINE u32 funnel_right(u32 low, u32 high, int shift) { return (u32)(((u64)high << 32 | low) >> (shift & 31)); }
INLINE u32 sum_bytes(u32 bytes, u32 start) {
    for (int shift = 0; shift < 32; shift += 8) start += bytes >> shift & 0xff;
    return start;
}

namespace simt {
// On an older GPU the instruction does not exist: ptx.cuh gives zeros there, which nobody can mean.
template <class T>
void check_supported(const char* operation, Site site) {
    if (!QUANTC_AMPERE && std::is_same<T, Bfloat>::value)
        fail_at(site, "%s of bfloat16 needs an Ampere GPU", operation);
}
}  // namespace simt

template <class T>
INLINE u32 fma2(u32 a, u32 b, u32 c, simt::Site site = simt::Site()) {
    simt::check_supported<T>("fma2", site);
    return simt::fma_bits<T>(a & 0xffff, b & 0xffff, c & 0xffff) | simt::fma_bits<T>(a >> 16, b >> 16, c >> 16) << 16;
}

template <class T>
INLINE u32 pack2(float low, float high, simt::Site site = simt::Site()) {
    simt::check_supported<T>("pack2", site);
    return simt::encode<T>(low) | simt::encode<T>(high) << 16;
}

template <class T>
INLINE float2 unpack2(u32 pair) {
    return {(float)simt::decode<T>(pair & 0xffff), (float)simt::decode<T>(pair >> 16)};
}

// --- tensor cores -------------------------------------------------------------------------------------------------

template <class T>
INLINE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], simt::Site site = simt::Site()) {
    simt::check_supported<T>("mma", site);
    simt::multiply<T>(d, a, b, site);
}

INLINE void ldmatrix_trans(u32 (&result)[4], const void* row, simt::Site site = simt::Site()) {
    simt::load_rows_transposed(result, row, site);
}

// --- memory -------------------------------------------------------------------------------------------------------

INLINE uint4 load_once(const uint4* pointer, simt::Site site = simt::Site()) {
    if ((size_t)pointer % 16) simt::fail_at(site, "misaligned load_once: the address must be a multiple of 16");
    return *pointer;
}

INLINE float load_fresh(const float* pointer) { return *pointer; }

template <class V>
INLINE V ld_shared(const V* pointer, simt::Site site = simt::Site()) {
    V value;
    simt::load(&value, pointer, sizeof(V), alignof(V), site);
    return value;
}

template <class V>
INLINE void st_shared(V* pointer, V value, simt::Site site = simt::Site()) {
    simt::store(pointer, &value, sizeof(V), alignof(V), site);
}

// What is copied is taken now and arrives at the wait that covers its group; meanwhile nobody may touch the place.
INLINE void cp_async16(void* shared, const void* global, bool valid, simt::Site site = simt::Site()) {
    if ((size_t)global % 16) simt::fail_at(site, "misaligned cp_async16: the global address must be a multiple of 16");
    const uint4 value = valid ? *(const uint4*)global : make_uint4(0, 0, 0, 0);
    simt::queue_copy(shared, &value, !QUANTC_AMPERE, site);
}

INLINE void cp_async_commit() { simt::commit_copies(); }

template <int PENDING>
INLINE void cp_async_wait() {
    simt::wait_for_copies(PENDING);
}

// --- threads ------------------------------------------------------------------------------------------------------

INLINE void sync_block(simt::Site site = simt::Site()) { simt::meet_block(site); }
INLINE void sync_warp(simt::Site site = simt::Site()) { simt::meet_warp(site); }

namespace simt {
template <class V>
V shuffle_from(const char* operation, V value, int from_lane, Site site) {
    static_assert(std::is_arithmetic<V>::value && (sizeof(V) == 4 || sizeof(V) == 8), "what __shfl_sync takes");
    u64 bits = 0;
    std::memcpy(&bits, &value, sizeof(V));
    bits = exchange(operation, bits, from_lane, site);
    std::memcpy(&value, &bits, sizeof(V));
    return value;
}
}  // namespace simt

template <class V>
INLINE V shuffle_xor(V value, int mask, simt::Site site = simt::Site()) {
    const int self = simt::current_lane(), lane = self ^ mask;
    return simt::shuffle_from("shuffle_xor", value, lane >= 0 && lane < 32 ? lane : self, site);
}

template <class V>
INLINE V shuffle(V value, int lane, simt::Site site = simt::Site()) {
    return simt::shuffle_from("shuffle", value, lane & 31, site);
}

INLINE int least_of_warp(int value, simt::Site site = simt::Site()) {
    for (int mask = 16; mask > 0; mask /= 2) value = min(value, shuffle_xor(value, mask, site));
    return value;
}

// One CPU thread: what was written is seen.
INLINE void memory_fence() {}

INLINE int atomic_increment(int* counter) { return (*counter)++; }
