// The whole weight (N, K) as 16-bit floats, for matrix products large enough that the vendor's own is the fastest.
//
// A warp per tile: a lane's fragments of half a tile are eight neighbouring inputs of a row, 16 bytes.
//
// Needs what tile.cuh needs, and WARPS.
#include "tile.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    dequantize(const uint4* tiles, const u16* scales, const u8* zeros, u16* weight, int N, int K, int tiles_k, int group,
               int groups) {
    const int lane = threadIdx.x % 32, k = blockIdx.x * WARPS + threadIdx.x / 32, strip = blockIdx.y;
    if (k >= tiles_k) return;
    TileCodes codes;
    codes.read(tiles + ((size_t)strip * tiles_k + k) * (BITS * 32) + lane);
    TileScales tile_scales;
    int sets[SETS];
#pragma unroll
    for (int index = 0; index < SETS; ++index) sets[index] = set_number(strip, k, index, tiles_k, group, groups);
    tile_scales.read(scales, zeros, sets, lane);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        const Codes own = codes.quarter(t);
        const Scales& own_scales = tile_scales.quarter(t);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int q = 0; q < 2; ++q) {
                const int row = strip * TILE + t % 2 * 32 + 16 * i + 8 * q + lane / 4;
                const int input = k * TILE + t / 2 * 32 + lane % 4 * 8;
                const int p = 8 * i + q;  // q + 2: the next two inputs; p + 4: the next step
                const uint4 v = make_uint4(weights(own, own_scales, p), weights(own, own_scales, p + 2),
                                           weights(own, own_scales, p + 4), weights(own, own_scales, p + 6));
                if (row < N && input < K) *(uint4*)(weight + (size_t)row * K + input) = v;
            }
    }
}
