// Two registers of 8 rows. Compiled with -mavx2 -mfma -mf16c.
#if defined(__x86_64__)
#define LANES 8
#include "few_fields.h"
#include "hadamard.h"
#include "int8_pairs.h"
#include "kept_rows.h"
#include "low_rank.h"
#include "many_floats.h"
#include "strips.h"
#include "trellis_int8.h"
#include "trellis_search.h"

const Level LEVEL_AVX2 = {
    "avx2",
    [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
    LARGEST_TILE, round_tile, load_plain, multiply_trellis, unpack_trellis, round_plain, load_float, load_bfloat16, load_int8, fit_fields, scale_inputs, rotate, times_a, add_times_b,
    multiply_fields, nullptr, multiply_int8, unpack<Converter>,
    load_kept, multiply_kept<Converter>, unpack_kept<Converter>, nullptr, nullptr, nullptr, nullptr, 0,
    multiply_many, MANY_FROM, nullptr, multiply_trellis_int8,
};
#endif
