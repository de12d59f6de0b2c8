// The online rotation y = x diag(signs) blockdiag(H_m (x) S_rest, ...) / sqrt(m rest), summed in float32.
//
// The two factors of a block commute. The dense one goes first, so that a thread block needs no more than what its own
// OUTPUTS of the m rows of H_m make of its columns: they are summed in registers while x streams by, and only they go
// through shared memory for the fast transform. Other thread blocks read the same x for other outputs, from the
// second-level cache. A block of 28672 then takes 32 KB, and few rows still fill many multiprocessors.
//
// Columns: a row holds K / (m rest) blocks, each of m lines of `rest` values; a column is what lies below each other.
// Those of all rows and blocks are numbered through.
//
// Defined from outside: TYPE (Half, Bfloat or float), VALUES (columns of a thread: 8, or 1 where rest is less), OUTPUTS
// (1, 2, 4 or 8).
#include "hadamard.cuh"

constexpr int THREADS = 128;
constexpr int VALUE_BITS = VALUES == 8 ? 3 : 0;

template <class T>
struct Storage {
    typedef u16 Element;
};
template <>
struct Storage<float> {
    typedef float Element;
};
template <class T>
constexpr bool IS_FLOAT = false;
template <>
constexpr bool IS_FLOAT<float> = true;

typedef Storage<TYPE>::Element Element;

// What one load or store moves, aligned to be one.
template <class E, int COUNT>
struct alignas(sizeof(E) * COUNT < 16 ? sizeof(E) * COUNT : 16) Bundle {
    E e[COUNT];
};

template <class T, int V>
INLINE void load_values(float (&v)[V], const typename Storage<T>::Element* from) {
    if constexpr (IS_FLOAT<T>) {
        const Bundle<float, V> bundle = *(const Bundle<float, V>*)from;
        for (int k = 0; k < V; ++k) v[k] = bundle.e[k];
    } else if constexpr (V == 1) {
        v[0] = unpack2<T>(*from).x;
    } else {
        const Bundle<u32, V / 2> bundle = *(const Bundle<u32, V / 2>*)from;
        for (int k = 0; k < V; k += 2) {
            const float2 pair = unpack2<T>(bundle.e[k / 2]);
            v[k] = pair.x;
            v[k + 1] = pair.y;
        }
    }
}

template <class T, int V>
INLINE void store_values(typename Storage<T>::Element* to, const float (&v)[V]) {
    if constexpr (IS_FLOAT<T>) {
        Bundle<float, V> bundle;
        for (int k = 0; k < V; ++k) bundle.e[k] = v[k];
        *(Bundle<float, V>*)to = bundle;
    } else if constexpr (V == 1) {
        *to = (u16)pack2<T>(v[0], 0.0f);
    } else {
        Bundle<u32, V / 2> bundle;
        for (int k = 0; k < V; k += 2) bundle.e[k / 2] = pack2<T>(v[k], v[k + 1]);
        *(Bundle<u32, V / 2>*)to = bundle;
    }
}

template <int V>
INLINE void to_shared(float* to, const float (&v)[V]) {
    Bundle<float, V> bundle;
    for (int k = 0; k < V; ++k) bundle.e[k] = v[k];
    constexpr int PART = V < 4 ? V : 4;
    for (int k = 0; k < V; k += PART) st_shared((Bundle<float, PART>*)(to + k), *(Bundle<float, PART>*)(bundle.e + k));
}

// Signed lines of VALUES columns, summed with the signs of OUTPUTS columns of H_m from `first` on.
//
// lines: x at these columns of line 0. index: where that is in its row.
INLINE void combine(float (&sums)[OUTPUTS][VALUES], const Element* lines, int index, const u32* signs,
                    const u32* base_signs, int base, int rest_bits, int first) {
    const int words = (base + 31) / 32;
#pragma unroll 2
    for (int i = 0; i < base; ++i) {
        float v[VALUES];
        load_values<TYPE>(v, lines + (i << rest_bits));
        const int at = index + (i << rest_bits);
        const u32 flipped = signs[at >> 5] >> (at & 31);
        const u32 negative = base_signs[i * words + first / 32] >> first % 32;
        for (int k = 0; k < VALUES; ++k) v[k] = flipped >> k & 1 ? -v[k] : v[k];
        for (int j = 0; j < OUTPUTS; ++j) {
            const float sign = negative >> j & 1 ? -1.0f : 1.0f;
            for (int k = 0; k < VALUES; ++k) sums[j][k] += sign * v[k];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) hadamard(
    const Element* x,       // (M, K)
    Element* y,             // (M, K), nowhere that of x
    const u32* signs,       // (ceil(K / 32),), bit i % 32 of word i / 32 set where sign i is -1
    const u32* base_signs,  // (m, ceil(m / 32)), bit j % 32 of word (i, j / 32) set where H_m (i, j) is -1
    int M, int K,
    int base,       // m
    int rest_bits,  // log2 of rest
    float scale) {  // 1 / sqrt(m rest)
    DYNAMIC_SHARED(memory);
    float* values = (float*)memory;  // (OUTPUTS, span)
    const int rest = 1 << rest_bits, order = base << rest_bits;
    const int span = rest > THREADS * VALUES ? rest : THREADS * VALUES;
    const int groups = (base + OUTPUTS - 1) / OUTPUTS;
    const int first = blockIdx.x % groups * OUTPUTS;  // neighbours read the same x
    const u64 start = (u64)(blockIdx.x / groups) * span, columns = (u64)M * (K / base);

    for (int column = threadIdx.x * VALUES; column < span; column += THREADS * VALUES) {
        const u64 block = start + column >> rest_bits;
        const int within = column & (rest - 1);
        float sums[OUTPUTS][VALUES] = {};
        if (start + column < columns)
            combine(sums, x + block * order + within, (int)(block % (K / order)) * order + within, signs, base_signs,
                    base, rest_bits, first);
        for (int j = 0; j < OUTPUTS; ++j) {
            butterflies<VALUES>(sums[j], 0);
            to_shared(values + j * span + column, sums[j]);
        }
    }
    sync_block();
    sylvester_shared<THREADS>(values, OUTPUTS * span, VALUE_BITS, rest_bits);

    for (int column = threadIdx.x * VALUES; column < span && start + column < columns; column += THREADS * VALUES) {
        const u64 block = start + column >> rest_bits;
        const int within = column & (rest - 1);
        for (int j = 0; j < OUTPUTS && first + j < base; ++j) {
            float v[VALUES];
            for (int k = 0; k < VALUES; ++k) v[k] = ld_shared(values + j * span + column + k) * scale;
            store_values<TYPE>(y + block * order + (first + j << rest_bits) + within, v);
        }
    }
}
