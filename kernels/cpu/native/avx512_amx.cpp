// Products with rows of bfloat16 in tiles: 16 x 16 outputs and 32 inputs in an instruction.
//
// A block of an image is a tile of weights as the processor wants it once its codes are pairs of bfloat16: 16 vectors,
// each two inputs of 16 outputs. Compiled as avx512_bf16.cpp, with -mamx-tile and -mamx-bf16 where the compiler has them.
#include "tiles.h"

#if defined(__x86_64__) && defined(__AMX_BF16__) && defined(__linux__)
#define LANES 16
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cpuid.h>

#include "inputs.h"
#include "tile_few.h"
#include "tile_many.h"

void load_for_tiles(const Image* w, const void* x, uint16_t* row, float* sums) {
  const uint16_t* from = static_cast<const uint16_t*>(x);
  order_blocks(w, row, [=](int64_t i) { return from[i]; });
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  if (!sums) return;
  const int64_t units = units_of_group(w);
  for (int64_t b = 0, unit = 0; b < w->blocks; ++unit) {
    const int64_t end = end_of_unit(w, unit / units, b);
    __m512 lanes = _mm512_setzero_ps();
    for (; b < end; ++b) lanes = _mm512_dpbf16_ps(lanes, (__m512bh)_mm512_loadu_si512(row + b * BLOCK), ones);
    sums[unit] = _mm512_reduce_add_ps(lanes);
  }
}

void multiply_tiles(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  multiply_few(w, x, y, from, to);
}

void multiply_rounded_tiles(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  multiply_many(w, x, y, from, to);
}

// The kernel keeps tiles of a process only once it has been asked for them.
bool tiles_run_here() {
  constexpr unsigned BFLOAT16 = 1u << 22, TILES = 1u << 24;
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BFLOAT16 | TILES)) != (BFLOAT16 | TILES)) return false;
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#else
void load_for_tiles(const Image*, const void*, uint16_t*, float*) {}
void multiply_tiles(const Image*, const Inputs&, const Outputs&, int64_t, int64_t) {}
void multiply_rounded_tiles(const Image*, const Inputs&, const Outputs&, int64_t, int64_t) {}
bool tiles_run_here() { return false; }
#endif
