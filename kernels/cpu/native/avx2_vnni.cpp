// VNNI of processors without AVX-512. Compiled as avx2.cpp, with -mavxvnni where the compiler has it.
#if defined(__x86_64__) && defined(__AVXVNNI__)
#define LANES 8
#include <cpuid.h>

#include "int8_quads.h"
#include "trellis_int8.h"

void multiply_avx_vnni(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  multiply_quads(w, x, y, from, to);
}

void multiply_trellis_avx_vnni(const trellis::Stored* w, const Inputs& x, const Outputs& y, int64_t tile, float* workspace) {
  multiply_trellis(w, x, y, tile, workspace);
}

void multiply_trellis_int8_avx_vnni(const trellis::Stored* w, const Inputs& x, const Outputs& y, int64_t tile, float* workspace) {
  multiply_trellis_int8(w, x, y, tile, workspace);
}

bool avx_vnni_runs_here() {
  constexpr unsigned AVX_VNNI = 1u << 4;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & AVX_VNNI);
}
#elif defined(__x86_64__)
#include "level.h"

void multiply_avx_vnni(const Image*, const Inputs&, const Outputs&, int64_t, int64_t) {}
void multiply_trellis_avx_vnni(const trellis::Stored*, const Inputs&, const Outputs&, int64_t, float*) {}
void multiply_trellis_int8_avx_vnni(const trellis::Stored*, const Inputs&, const Outputs&, int64_t, float*) {}
bool avx_vnni_runs_here() { return false; }
#endif
