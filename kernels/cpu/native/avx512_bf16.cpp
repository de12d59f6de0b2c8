// bfloat16 activations: two inputs of 16 rows in an instruction. Codes of up to 8 bits less mid are exact in bfloat16
// and products in the float32 sums, so nothing is lost. Compiled as avx512.cpp, with -mavx512bf16 and
// -mavx512vnni, which processors with the one have too.
#if defined(__x86_64__)
#define LANES 16
#include <immintrin.h>

#include "kept_bfloat16.h"
#include "many_bfloat16.h"
#include "pairs.h"
#include "totals.h"
#include "trellis_pairs.h"

namespace {

INLINE void fetch(const uint32_t* words) { _mm_prefetch(reinterpret_cast<const char*>(words), _MM_HINT_T0); }

// SIDE strips at once share what is read of x, and give a dot product, which takes 6 cycles, others to run beside.
template <int BITS, int M, int SIDE>
INLINE void strips_side_by_side(const Pairs<BITS>& decode, const Image* w, const Inputs& x, const Outputs& y, int64_t strip) {
  constexpr int AHEAD = M == 1 ? 16 : 8;  // blocks; without, 4 and 8 rows take 1.3 times as long, 3 bits and one row 1.15
  constexpr int CHAINS = M == 1 ? 4 : M * SIDE >= 16 ? 1 : 2;
  const uint16_t* rows = static_cast<const uint16_t*>(x.rows);
  const uint32_t* block[SIDE];
  for (int s = 0; s < SIDE; ++s) block[s] = codes_of(w, strip + s);
  Totals<M> totals[SIDE];
  for (int64_t g = 0; g < w->groups; ++g) {
    __m512 chains[SIDE][CHAINS][M];
    for (auto& side : chains)
      for (auto& chain : side)
        for (__m512& sum : chain) sum = _mm512_setzero_ps();
    for (int64_t b = blocks_before(w, g); b < blocks_before(w, g + 1); ++b) {
      const uint16_t* inputs = rows + b * BLOCK;
      for (int s = 0; s < SIDE; ++s)
        for (int v = 0; v < BITS; ++v) fetch(block[s] + (AHEAD * BITS + v) * STRIP);
      unrolled<BLOCK / 2>([&](auto pair) INLINE_LAMBDA {
        constexpr int k = 2 * pair;
        __m512bh codes[SIDE];
        unrolled<SIDE>([&](int s) INLINE_LAMBDA {
          const Words low = load_words(block[s] + low_vector(BITS, k) * STRIP);
          const Words high = high_width(BITS) ? load_words(block[s] + high_vector(BITS, k) * STRIP) : Words{};
          codes[s] = reinterpret_cast<__m512bh>(decode(low, high, low_bit(BITS, k), high_bit(BITS, k)));
        });
        unrolled<M>([&](int m) INLINE_LAMBDA {
          int32_t two;
          __builtin_memcpy(&two, inputs + m * x.stride + k, 4);
          const __m512bh values = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
          unrolled<SIDE>([&](int s) INLINE_LAMBDA {
            __m512& sum = chains[s][pair % CHAINS][m];
            sum = _mm512_dpbf16_ps(sum, codes[s], values);
          });
        });
      });
      for (int s = 0; s < SIDE; ++s) block[s] += BITS * STRIP;
    }
    for (int s = 0; s < SIDE; ++s) {
      Floats products[M];
      for (int m = 0; m < M; ++m) {
        __m512 sum = chains[s][0][m];
        for (int c = 1; c < CHAINS; ++c) sum = _mm512_add_ps(sum, chains[s][c][m]);
        products[m] = {{sum}};
      }
      totals[s].add_group(w, x, strip + s, g, products, w->mid);
    }
  }
  for (int s = 0; s < SIDE; ++s) totals[s].store(w, y, strip + s);
}

template <int BITS, int M>
void multiply_strips_bfloat16(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  constexpr int SIDE = M == 4 ? 4 : M == 8 ? 2 : 1;
  const Pairs<BITS> decode(w->mid);
  int64_t strip = from;
  for (; strip + SIDE <= to; strip += SIDE) strips_side_by_side<BITS, M, SIDE>(decode, w, x, y, strip);
  for (; strip < to; ++strip) strips_side_by_side<BITS, M, 1>(decode, w, x, y, strip);
}

template <int BITS>
void multiply_bits_bfloat16(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  switch (x.m) {
    case 1: return multiply_strips_bfloat16<BITS, 1>(w, x, y, from, to);
    case 2: return multiply_strips_bfloat16<BITS, 2>(w, x, y, from, to);
    case 4: return multiply_strips_bfloat16<BITS, 4>(w, x, y, from, to);
    default: return multiply_strips_bfloat16<BITS, 8>(w, x, y, from, to);
  }
}

}  // namespace

void multiply_bfloat16(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  with_bits(w->bits, [&](auto bits) { multiply_bits_bfloat16<bits>(w, x, y, from, to); });
}

void multiply_rounded_bfloat16(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  with_bits(w->bits, [&](auto bits) { multiply_rounded_bits<bits>(w, x, y, from, to); });
}
#endif
