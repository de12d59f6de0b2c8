// Where sums become y: with the bias and the low-rank addition.
#pragma once

#include "ptx.cuh"

// Where y goes and what is added to it. y (M, N) and bias (N,) as ELEMENT; low_rank_b float16 (N, rank) and low_rank_t
// float32 (M, rank) add low_rank_t low_rank_b^T. partial and counters, zero before and after, are for sums that are cut:
// their shapes are the programs'.
struct Output {
    u16* y;
    const u16* bias;
    const u16* low_rank_b;
    const float* low_rank_t;
    float* partial;
    int* counters;
    int M, N, rank;
};

// Element `index` of a tensor of T.
template <class T>
INLINE float load_element(const u16* tensor, size_t index) {
    return unpack2<T>(tensor[index]).x;
}
template <>
INLINE float load_element<Float>(const u16* tensor, size_t index) {
    return ((const float*)tensor)[index];
}

template <class T>
INLINE void store_element(u16* tensor, size_t index, float value) {
    tensor[index] = (u16)pack2<T>(value, 0.0f);
}
template <>
INLINE void store_element<Float>(u16* tensor, size_t index, float value) {
    ((float*)tensor)[index] = value;
}

template <class T>
INLINE void write_output(const Output& o, int token, int row, float value) {
    if (o.bias) value += load_element<T>(o.bias, row);
#pragma unroll 1  // rare: not worth the code
    for (int r = 0; r < o.rank; ++r)
        value += o.low_rank_t[(size_t)token * o.rank + r] * unpack2<Half>(o.low_rank_b[(size_t)row * o.rank + r]).x;
    store_element<T>(o.y, (size_t)token * o.N + row, value);
}
