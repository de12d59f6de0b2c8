// One register of 16 rows. Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c.
#if defined(__x86_64__)
#define LANES 16
#include "hadamard.h"
#include "lookup.h"
#include "kept_rows.h"
#include "low_rank.h"
#include "trellis_search.h"
#include "trellis_tiles.h"

static bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

const Level LEVEL_AVX512 = {
    "avx512", runs_here, LARGEST_TILE, round_tile, load_plain, multiply_trellis, unpack_trellis, round_plain, load_float, load_bfloat16, load_int8, nullptr, scale_inputs, rotate, times_a, add_times_b,
    multiply<Lookup>, nullptr, nullptr, unpack<Lookup>,
    load_kept, multiply_kept<Lookup>, unpack_kept<Lookup>, nullptr, nullptr, nullptr,
};
#endif
