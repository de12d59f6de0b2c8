// The groups that stay of a weight with dropped groups, as 16-bit floats in their places in a weight (N, K) of zeros.
//
// A warp per step: a lane has four neighbouring inputs of a row in every slot, 8 bytes.
//
// Needs what kept.cuh needs, and WARPS.
#include "kept.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    kept_dequantize(const u32* codes,  // as kept.cuh says, and the next four too
                    const u32* groups, const u8* zeros, const int* owners, const int* rows,
                    u16* weight,       // (N, K)
                    int N, int K, int steps) {
    const int lane = threadIdx.x % 32, number = blockIdx.x * WARPS + threadIdx.x / 32;
    if (number >= steps) return;
    Step step;
    step.read(codes, groups, zeros, owners, number, lane);
    const Offsets offsets((u32)N >> 31);
    const int row = rows[step.octet() * OCTET + lane / 4];
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
        u32 pairs[2];
        step.weights(pairs, s, offsets);
        const int input = step.slot_input(s) + Step::lane_input(lane);
        if (row < N && input < K) *(uint2*)(weight + (size_t)row * K + input) = make_uint2(pairs[0], pairs[1]);
    }
}
