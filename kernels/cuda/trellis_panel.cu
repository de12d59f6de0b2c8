// Rounds columns of a weight to trellis codes, the rows of each tile together; with a factor the error of each column is
// fed into those after it, as in gptq.cu, in float32.
//
// A block owns a tile and some columns, one after the other. For the search a thread has 16 states; before and after it
// the first `tile` threads have a row each, of which nobody else reads or writes anything: feeding back needs no barrier.
//
// Needs what trellis.cuh needs.
#include "trellis_search.cuh"

// What a thread knows of its row; pointers are those of the block's first column.
struct Row {
    float* left;
    u16* codes;
    float* errors;
    float unit, scale;
    int stride;  // from one column to the next
    bool exists;

    INLINE float number(int column) const {
        return exists && unit != 0 ? left[(size_t)column * stride] / unit : 0.0f;
    }

    INLINE void round(int column, int state) const {
        if (exists) codes[(size_t)column * stride] = (u16)state;
    }

    // factor: U (column, column), U (column, column + 1), ... up to the panel's last, `step` apart.
    INLINE void feed(int column, int count, int state, const float* factor, int step) const {
        if (!exists) return;
        const size_t at = (size_t)column * stride;
        const float error = (left[at] - value_of(state) * scale) / *factor;  // the product is exact: scales have 11 bits
        errors[at] = error;
#pragma unroll 4
        for (int after = 1; after < count - column; ++after)
            left[at + (size_t)after * stride] -= factor[(size_t)after * step] * error;
    }
};

// The row of a tile that step `step` of a search is about: see numerics/trellis/code.py; a search begins at the last place.
INLINE int row_of_step(int step, int tile) {
    const int place = tile - 1 - step;
    return place % (tile / 8) * 8 + place / (tile / 8);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    trellis_panel(float* left,          // (columns, N); columns after one are changed where there is a factor
                  const float* unit,    // (N,), by which numbers are divided
                  const float* scales,  // (N,)
                  const float* upper,   // the factor from the first column on, in the two steps given below, or null
                  u16* codes,           // (columns, N), states
                  float* errors,        // (columns, N), over their pivots; null without a factor
                  const int* values,    // (STATES,), as path_values says
                  int N, int tile, int row_step, int column_step,
                  int count) {          // columns of a block
    DYNAMIC_SHARED(shared);
    Search search(shared, tile, values);
    const int n = blockIdx.y * tile + row_of_step(threadIdx.x, tile);
    const bool exists = threadIdx.x < tile && n < N;
    const size_t at = (size_t)blockIdx.x * count * N + (exists ? n : 0);
    const Row row = {left + at, codes + at, upper ? errors + at : errors, exists ? unit[n] : 0.0f,
                     exists ? scales[n] : 0.0f, N, exists};
    for (int column = 0; column < count; ++column) {
        if (threadIdx.x < tile) st_shared(search.memory->inputs + threadIdx.x, input_of(row.number(column)));
        const int state = search.find();
        row.round(column, state);
        const size_t diagonal = (size_t)column * row_step + (size_t)column * column_step;
        if (upper) row.feed(column, count, state, upper + diagonal, column_step);
    }
}
