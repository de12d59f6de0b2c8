// What host.h asks of the runtime. The runtime is compiled once and without the sanitizers: what it touches on behalf
// of a kernel it checks itself.
#pragma once

#include <cstddef>

struct uint3 {
    u32 x, y, z;
};

// Of the thread that runs now.
inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

// Where the kernel's source calls one of the twins: as a default argument it is the caller's line.
struct Site {
    const char* file;
    int line;
    Site(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
};

// Report and exit.
[[noreturn]] void fail(const char* format, ...);
[[noreturn]] void fail_at(Site site, const char* format, ...);

// half.cpp, for Half and Bfloat: bits to value and back, rounding once.
template <class T>
double decode(u32 bits);
template <class T>
u32 encode(double value);
template <class T>
u32 fma_bits(u32 a, u32 b, u32 c);

// fiber.cpp, warp.cpp: these return when the other threads of the block or the warp have arrived.
int current_lane();
void meet_block(Site site);
void meet_warp(Site site);
u64 exchange(const char* operation, u64 bits, int from_lane, Site site);
template <class T>
void multiply(float* d, const u32* a, const u32* b, Site site);
void load_rows_transposed(u32* result, const void* row, Site site);

// shadow.cpp: shared memory.
u8* dynamic_memory();
void load(void* value, const void* shared, size_t size, size_t alignment, Site site);
void store(void* shared, const void* value, size_t size, size_t alignment, Site site);
void queue_copy(void* shared, const void* value, bool at_once, Site site);
void commit_copies();
void wait_for_copies(int pending);

}  // namespace simt
