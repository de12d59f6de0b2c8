// bfloat16 activations: two inputs of 16 rows in an instruction. Codes of up to 8 bits less mid are exact in bfloat16
// and products in the float32 sums, so nothing is lost. Compiled as avx512.cpp, with -mavx512bf16.
#if defined(__x86_64__)
#define LANES 16
#include <immintrin.h>

#include "totals.h"

namespace {

// Two codes less mid of each row as bfloat16. Lanes of 16 bits: an index has 5 bits, or 6 with two registers.
template <int BITS>
struct Pairs {
  __m512i table[2];
  explicit Pairs(int mid) {
    for (int half = 0; half < 2; ++half) {
      uint16_t entries[32];
      for (int i = 0; i < 32; ++i) {
        entries[i] = to_bfloat16(static_cast<float>(((half * 32 + i) & ((1 << BITS) - 1)) - mid));
      }
      table[half] = _mm512_loadu_si512(entries);
    }
  }
  INLINE_MEMBER __m512i operator()(const Words& low, const Words& high, int low_at, int high_at) const {
    WordLanes index = low.part[0] >> low_at;
    if (high_width(BITS)) {
      constexpr uint32_t mask = 0x10001u * ((1u << low_width(BITS)) - 1);
      index = (index & mask) | (move_bit(high.part[0], high_at, low_width(BITS)) & ~mask);
    }
    if (BITS == 6) return _mm512_permutex2var_epi16(table[0], reinterpret_cast<__m512i>(index), table[1]);
    return _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(index), table[0]);
  }
};
template <>
struct Pairs<8> {
  IntLanes mid;
  explicit Pairs(int value) : mid(value - IntLanes{}) {}
  INLINE_MEMBER __m512i operator()(const Words& low, const Words&, int low_at, int) const {
    const IntLanes even = reinterpret_cast<IntLanes>(low.part[0] >> low_at & 0xff) - mid;
    const IntLanes odd = reinterpret_cast<IntLanes>(low.part[0] >> (low_at + 16) & 0xff) - mid;
    const __m512i evens = reinterpret_cast<__m512i>(__builtin_convertvector(even, FloatLanes));
    const __m512i odds = reinterpret_cast<__m512i>(__builtin_convertvector(odd, FloatLanes));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(evens, 16), odds);
  }
};

template <int BITS, int M>
void multiply_strips_bfloat16(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  constexpr int CHAINS = M == 1 ? 4 : M <= 4 ? 2 : 1;
  const Pairs<BITS> decode(w->mid);
  const uint16_t* rows = static_cast<const uint16_t*>(x.rows);
  for (int64_t strip = from; strip < to; ++strip) {
    const uint32_t* block = codes_of(w, strip);
    Totals<M> totals;
    for (int64_t g = 0; g < w->groups; ++g) {
      __m512 chains[CHAINS][M];
      for (auto& chain : chains)
        for (__m512& sum : chain) sum = _mm512_setzero_ps();
      for (int64_t b = blocks_before(w, g); b < blocks_before(w, g + 1); ++b, block += BITS * STRIP) {
        unrolled<BLOCK / 2>([&](auto pair) INLINE_LAMBDA {
          constexpr int k = 2 * pair;
          const Words low = load_words(block + low_vector(BITS, k) * STRIP);
          const Words high = high_width(BITS) ? load_words(block + high_vector(BITS, k) * STRIP) : Words{};
          const __m512i codes = decode(low, high, low_bit(BITS, k), high_bit(BITS, k));
          unrolled<M>([&](int m) INLINE_LAMBDA {
            int32_t two;
            __builtin_memcpy(&two, rows + m * x.stride + b * BLOCK + k, 4);
            __m512& sum = chains[pair % CHAINS][m];
            sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(codes),
                                   reinterpret_cast<__m512bh>(_mm512_set1_epi32(two)));
          });
        });
      }
      Floats products[M];
      for (int m = 0; m < M; ++m) {
        __m512 sum = chains[0][m];
        for (int c = 1; c < CHAINS; ++c) sum = _mm512_add_ps(sum, chains[c][m]);
        products[m] = {{sum}};
      }
      totals.add_group(w, x, strip, g, products);
    }
    totals.store(w, y, strip);
  }
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
  switch (w->bits) {
    case 2: return multiply_bits_bfloat16<2>(w, x, y, from, to);
    case 3: return multiply_bits_bfloat16<3>(w, x, y, from, to);
    case 4: return multiply_bits_bfloat16<4>(w, x, y, from, to);
    case 5: return multiply_bits_bfloat16<5>(w, x, y, from, to);
    case 6: return multiply_bits_bfloat16<6>(w, x, y, from, to);
    default: return multiply_bits_bfloat16<8>(w, x, y, from, to);
  }
}
#endif
