// Compiled as avx512.cpp, with -mavx512vnni.
#if defined(__x86_64__)
#define LANES 16
#include "int8_quads.h"
#include "trellis_int8.h"

void multiply_vnni(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  multiply_quads(w, x, y, from, to);
}

void multiply_trellis_vnni(const trellis::Stored* w, const Inputs& x, const Outputs& y, int64_t tile, float* workspace) {
  multiply_trellis(w, x, y, tile, workspace);
}

void multiply_trellis_int8_vnni(const trellis::Stored* w, const Inputs& x, const Outputs& y, int64_t tile, float* workspace) {
  multiply_trellis_int8(w, x, y, tile, workspace);
}
#endif
