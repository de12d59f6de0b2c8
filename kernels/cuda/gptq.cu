// The GPTQ sweep over one panel of columns: each is rounded, and its error fed into those after it, in float32.
//
// A thread owns one output channel: its values stay in registers, nothing is exchanged, and with K before N every load
// and store is coalesced. The column to round is always in register 0: feeding the error back moves each value one
// register down, so that a short loop serves all columns. The loop shrinks every quarter of the panel.
//
// Defined from outside: PANEL (32, 64 or 128), the most columns of a panel.
#include "ptx.cuh"

constexpr int THREADS = 64;
constexpr int QUARTER = PANEL / 4;

struct alignas(16) Quad {
    float f[4];
};

struct Point {
    float scale, zero;
};

// One output channel's view of the panel; pointers are those of its column 0.
struct Channel {
    const float* scales;  // (R, N)
    const float* zeros;   // (R, N)
    const int* row_of;    // (PANEL,) rows of scales and zeros
    u8* codes;            // (PANEL, N)
    float* errors;        // (PANEL, N)
    const float* feed;    // shared, (PANEL, PANEL): see load_feed
    int N, count;
    float top;
};

INLINE Point load_point(const Channel& channel, int column) {
    const u64 at = (u64)channel.row_of[column] * channel.N;
    return {channel.scales[at], channel.zeros[at]};
}

// Row j of feed: U (j, j + 1), U (j, j + 2), ..., then zeros, and U (j, j) last, a place that is never needed otherwise.
INLINE void load_feed(float* feed, const float* upper, int row_step, int column_step, int count) {
    for (int index = threadIdx.x; index < count * PANEL; index += THREADS) {
        const int row = index / PANEL, place = index % PANEL;
        const int column = place == PANEL - 1 ? row : row + 1 + place;
        st_shared(feed + index, column < count ? upper[(u64)row * row_step + (u64)column * column_step] : 0.0f);
    }
}

// Rounds a column; returns its error, over the pivot.
INLINE float round_column(const Channel& channel, int column, float value, Point point) {
    float code = rintf(value / point.scale) + point.zero;
    code = code > 0.0f ? code < channel.top ? code : channel.top : 0.0f;
    const float pivot = ld_shared(channel.feed + column * PANEL + PANEL - 1);
    const float error = (value - (code - point.zero) * point.scale) / pivot;
    const u64 at = (u64)column * channel.N;
    channel.codes[at] = (u8)code;
    channel.errors[at] = error;
    return error;
}

// Columns from PANEL - LIVE on, whose values are values[0], values[1], ... values[LIVE - 1].
template <int LIVE>
INLINE void sweep(float (&values)[PANEL], const Channel& channel, Point point) {
    for (int column = PANEL - LIVE; column < PANEL - LIVE + QUARTER && column < channel.count; ++column) {
        const Point next = column + 1 < channel.count ? load_point(channel, column + 1) : point;
        const float error = round_column(channel, column, values[0], point);
        const Quad* line = (const Quad*)(channel.feed + column * PANEL);
#pragma unroll
        for (int k = 0; k < LIVE; k += 4) {
            const Quad factor = ld_shared(line + k / 4);
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (k + e + 1 < LIVE) values[k + e] = values[k + e + 1] - error * factor.f[e];
        }
        point = next;
    }
    if constexpr (LIVE > QUARTER) sweep<LIVE - QUARTER>(values, channel, point);
}

extern "C" __global__ void __launch_bounds__(THREADS) gptq_panel(
    const float* left,    // (K, N), rows in rounding order, the errors of all columns before `low` fed in
    const float* upper,   // (K, K), factor of the inverse Gram matrix, in the two steps given below
    const float* scales,  // (R, N)
    const float* zeros,   // (R, N)
    const int* row_of,    // (K,), the row of scales and zeros of each column
    u8* codes,            // (K, N), written in rows [low, low + count)
    float* errors,        // (K, N), likewise
    int N, int row_step, int column_step, int low, int count,
    float top) {  // the largest code
    DYNAMIC_SHARED(memory);
    float* feed = (float*)memory;
    load_feed(feed, upper + (u64)low * row_step + (u64)low * column_step, row_step, column_step, count);
    sync_block();
    const int n = blockIdx.x * THREADS + threadIdx.x;
    if (n >= N) return;
    const u64 at = (u64)low * N + n;
    const Channel channel = {scales + n, zeros + n, row_of + low, codes + at, errors + at, feed, N, count, top};
    float values[PANEL];
#pragma unroll
    for (int k = 0; k < PANEL; ++k) values[k] = k < count ? left[at + (u64)k * N] : 0.0f;
    sweep<PANEL>(values, channel, load_point(channel, 0));
}
