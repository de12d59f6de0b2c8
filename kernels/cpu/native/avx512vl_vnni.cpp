// The same by the other encoding of the same instruction: processors with AVX-512 run, and so prove, what is made for
// those without. Compiled as avx512_vnni.cpp.
#if defined(__x86_64__)
#define LANES 8
#include "int8_quads.h"
#include "trellis_int8.h"

void multiply_avx512vl_vnni(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  multiply_quads(w, x, y, from, to);
}

void multiply_trellis_avx512vl_vnni(const trellis::Stored* w, const Inputs& x, const Outputs& y, int64_t tile,
                                    float* workspace) {
  multiply_trellis(w, x, y, tile, workspace);
}

void multiply_trellis_int8_avx512vl_vnni(const trellis::Stored* w, const Inputs& x, const Outputs& y, int64_t tile, float* workspace) {
  multiply_trellis_int8(w, x, y, tile, workspace);
}
#endif
