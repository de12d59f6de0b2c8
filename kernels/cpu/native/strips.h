// The product of strips with float activations, and their unpacking. A Decoder says how codes become floats.
#pragma once

#include "inputs.h"
#include "totals.h"

namespace {

// Codes less mid as floats, by conversion. low_at and high_at: the bits of this code in the two planes' words.
template <int BITS>
struct Converter {
  IntLanes mid;
  explicit Converter(int value) : mid(value - IntLanes{}) {}
  INLINE_MEMBER Floats operator()(const Words& low, const Words& high, int low_at, int high_at) const {
    constexpr uint32_t low_mask = (1u << low_width(BITS)) - 1;
    constexpr uint32_t high_mask = ((1u << high_width(BITS)) - 1) << low_width(BITS);
    Floats out;
    for (int p = 0; p < PARTS; ++p) {
      WordLanes code = low.part[p] >> low_at & low_mask;
      if (high_mask) code |= move_bit(high.part[p], high_at, low_width(BITS)) & high_mask;
      out.part[p] = __builtin_convertvector(reinterpret_cast<IntLanes>(code) - mid, FloatLanes);
    }
    return out;
  }
};

// Calls visit(k, codes less mid of input k) for the inputs of a block in order; k is a constant.
template <int BITS, typename Decoder, typename Visit>
INLINE void for_each_input(const uint32_t* block, const Decoder& decode, Visit visit) {
  const auto step = [&](int k) INLINE_LAMBDA {
    const Words low = load_words(block + low_vector(BITS, k) * STRIP);
    const Words high = high_width(BITS) ? load_words(block + high_vector(BITS, k) * STRIP) : Words{};
    visit(k, decode(low, high, low_bit(BITS, k), high_bit(BITS, k)));
  };
  unrolled<BLOCK>(step);
}

template <template <int> class Decoder, int BITS, int M>
void multiply_strips(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  constexpr int CHAINS = M == 1 ? 4 : M == 2 ? 2 : 1;  // independent sums: an addition takes 4 cycles, two start in one
  const Decoder<BITS> decode(w->mid);
  const float* rows = static_cast<const float*>(x.rows);
  const int64_t groups = w->per_ic ? 1 : w->groups;
  for (int64_t strip = from; strip < to; ++strip) {
    const uint32_t* block = codes_of(w, strip);
    Totals<M> totals;
    for (int64_t g = 0; g < groups; ++g) {
      Floats chains[CHAINS][M];
      for (auto& chain : chains)
        for (Floats& sum : chain) sum = all(0);
      const int64_t end = w->per_ic ? w->blocks : blocks_before(w, g + 1);
      for (int64_t b = blocks_before(w, g); b < end; ++b, block += BITS * STRIP) {
        const float* inputs = rows + b * BLOCK;
        for_each_input<BITS>(block, decode, [&](int k, const Floats& codes) INLINE_LAMBDA {
          unrolled<M>([&](int m) INLINE_LAMBDA {
            chains[k % CHAINS][m] = multiply_add(codes, inputs[m * x.stride + k], chains[k % CHAINS][m]);
          });
        });
      }
      for (int c = 1; c < CHAINS; ++c)
        for (int m = 0; m < M; ++m) chains[0][m] = add(chains[0][m], chains[c][m]);
      totals.add_group(w, x, strip, g, chains[0], w->mid);
    }
    totals.store(w, y, strip);
  }
}

template <template <int> class Decoder, int BITS>
void multiply_bits(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  if (x.m == 1) return multiply_strips<Decoder, BITS, 1>(w, x, y, from, to);
  if constexpr (LARGEST_TILE >= 4) {
    if (x.m == 2) return multiply_strips<Decoder, BITS, 2>(w, x, y, from, to);
    if (x.m == 4) return multiply_strips<Decoder, BITS, 4>(w, x, y, from, to);
  }
  if constexpr (LARGEST_TILE >= 8) return multiply_strips<Decoder, BITS, 8>(w, x, y, from, to);
}

template <template <int> class Decoder>
void multiply(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  with_bits(w->bits, [&](auto bits) { multiply_bits<Decoder, bits>(w, x, y, from, to); });
}

// (code - zero) * scale of one strip, rounded once to the output's type: the reference's arithmetic.
template <template <int> class Decoder, int BITS>
void unpack_strip(const Image* w, int64_t strip, void* out, Type type, int64_t stride) {
  const Decoder<BITS> decode(w->mid);
  const uint32_t* block = codes_of(w, strip);
  const int count = rows_in(w, strip);
  const int64_t padded = w->blocks * BLOCK, ic_group = strip / w->group_strips;
  for (int64_t b = 0; b < w->blocks; ++b, block += BITS * STRIP) {
    const int64_t first = first_input(w, b);
    const int inputs = inputs_in(w, b);
    const int64_t at = (strip * w->groups + b / w->group_blocks) * STRIP;
    Floats scales{}, offsets = all(0);
    if (!w->per_ic) {
      scales = load_float16(scales_of(w) + at);
      if (!w->symmetric) offsets = load_offsets(zeros_of(w) + at, w->mid);
    }
    Floats weights[BLOCK];
    for_each_input<BITS>(block, decode, [&](int k, const Floats& codes) INLINE_LAMBDA { weights[k] = codes; });
    for (int k = 0; k < inputs; ++k) {
      if (w->per_ic) {
        const int64_t place = ic_group * padded + b * BLOCK + k;
        scales = all(from_float16(scales_of(w)[place]));
        if (!w->symmetric) offsets = all(static_cast<float>(w->mid - zeros_of(w)[place]));
      }
      weights[k] = add(weights[k], offsets);
      for (int p = 0; p < PARTS; ++p) weights[k].part[p] *= scales.part[p];
      store_row(Outputs{out, nullptr, type, FLOAT32, stride, 1}, static_cast<int>(first + k), 0, count, weights[k]);
    }
  }
}

template <template <int> class Decoder>
void unpack(const Image* w, int64_t from, int64_t to, void* out, Type type, int64_t stride) {
  const int size = type == FLOAT32 ? 4 : 2;
  for (int64_t strip = from; strip < to; ++strip) {
    void* column = static_cast<char*>(out) + (first_row(w, strip) - first_row(w, from)) * size;
    with_bits(w->bits, [&](auto bits) { unpack_strip<Decoder, bits>(w, strip, column, type, stride); });
  }
}

}  // namespace
