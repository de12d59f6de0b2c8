// The whole weight (N, K) from trellis codes, for matrix products that the vendor's own is the fastest for, and for the
// tiles and numbers of inputs that trellis_decode.cu does not take.
//
// A warp's lanes have neighbouring inputs, so that rows are written side by side; warp r of a block has rows r, r + 8, ...
// of a tile, neighbouring places of the walks. Walks are read in steps of two bytes, of which every one has a whole number.
//
// Needs what trellis.cuh needs, ELEMENT and TILE (a multiple of 16).
#include "output.cuh"
#include "trellis.cuh"

constexpr int WARPS = 8, PLACES = TILE / WARPS;
constexpr int UNITS = TILE * BITS / 16;                            // of a walk
constexpr int READ = (Stretch<PLACES>::NEEDED + 15 + 15) / 16;     // units that hold a stretch wherever it begins
constexpr int WORDS = (READ + 1) / 2;

// The places from `first` on of a walk.
INLINE Stretch<PLACES> read_stretch(const u16* walk, int first) {
    const int bit = first * BITS;
    u32 words[WORDS] = {};
#pragma unroll
    for (int unit = 0; unit < READ; ++unit) words[unit / 2] |= (u32)walk[(bit / 16 + unit) % UNITS] << unit % 2 * 16;
    Stretch<PLACES> stretch;
    stretch.set(words, bit % 16);
    return stretch;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    trellis_dequantize(const u16* walks,   // (tiles, K, UNITS)
                       const u16* scales,  // (N,), float16
                       u16* weight,        // (N, K)
                       int N, int K) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = blockIdx.y;
    const int input = blockIdx.x * 32 + lane;
    if (input >= K) return;
    const Stretch<PLACES> stretch = read_stretch(walks + ((size_t)tile * K + input) * UNITS, warp * PLACES);
#pragma unroll
    for (int place = 0; place < PLACES; ++place) {
        const int row = tile * TILE + place * WARPS + warp;
        if (row >= N) continue;
        const float value = value_of(stretch.state(place)) * unpack2<Half>(scales[row]).x;
        store_element<ELEMENT>(weight, (size_t)row * K + input, value);
    }
}
