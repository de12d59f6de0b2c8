// One row per thread block through hadamard_shared, as a kernel that rotates what it has loaded would do it.
#include "hadamard.cuh"

constexpr int THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS) hadamard_in_shared(
    const float* x,         // (M, K)
    float* y,               // (M, K)
    const u32* signs,       // as hadamard_shared takes them
    const u32* base_signs,  // likewise
    int K, int base, int rest_bits, float scale) {
    DYNAMIC_SHARED(memory);
    float* values = (float*)memory;  // (K,)
    const u64 row = (u64)blockIdx.x * K;
    for (int k = threadIdx.x; k < K; k += THREADS) st_shared(values + k, x[row + k]);
    sync_block();
    hadamard_shared<THREADS>(values, K, base, rest_bits, signs, base_signs, scale);
    for (int k = threadIdx.x; k < K; k += THREADS) y[row + k] = ld_shared(values + k);
}
