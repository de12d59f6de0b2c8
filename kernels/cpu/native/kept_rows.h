// The product of kept groups (kept.h) with float activations: lanes along the inputs of a unit, summed once a row.
// Included after wide.h, once for each instruction set.
#pragma once

#include "kept.h"
#include "wide.h"

namespace {

// The 32-bit words of 4 * WORDS bytes, repeated: lane i of all parts takes word i % WORDS.
template <int WORDS>
INLINE Words repeated(const uint8_t* at) {
  Words out;
  if constexpr (LANES == 1) {
    for (int p = 0; p < PARTS; ++p) __builtin_memcpy(&out.part[p], at + 4 * (p % WORDS), 4);
  } else if constexpr (WORDS == 1) {
    uint32_t word;
    __builtin_memcpy(&word, at, 4);
    for (WordLanes& part : out.part) part = word - WordLanes{};
  } else if constexpr (WORDS == 2) {
    typedef uint64_t Pairs __attribute__((vector_size(LANES == 1 ? 8 : 4 * LANES)));
    uint64_t pair;
    __builtin_memcpy(&pair, at, 8);
    for (WordLanes& part : out.part) part = reinterpret_cast<WordLanes>(pair - Pairs{});
  } else {
#if LANES == 16
    out.part[0] = reinterpret_cast<WordLanes>(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#elif LANES == 8
    const __m256i four = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    for (WordLanes& part : out.part) part = reinterpret_cast<WordLanes>(four);
#else
    for (WordLanes& part : out.part) __builtin_memcpy(&part, at, sizeof part);
#endif
  }
  return out;
}

// The codes of a unit as floats. upper: where the upper stream starts, in bytes.
template <template <int> class Decoder, int BITS>
struct UnitDecoder {
  static constexpr int L = low_width(BITS), H = high_width(BITS);
  const Decoder<BITS> decode{0};
  const int upper;
  Words low_at, high_at;
  explicit UnitDecoder(const Image* w) : upper(static_cast<int>(w->kept.unit) * L / 8) {
    for (int i = 0; i < UNIT; ++i) {
      const int input = input_of_lane(BITS, i);
      low_at.part[i / LANES][i % LANES] = static_cast<uint32_t>(input % (32 / L) * L);
      high_at.part[i / LANES][i % LANES] = static_cast<uint32_t>(H == 1 ? 16 + input - L : 30 - 2 * input);
    }
  }
  INLINE_MEMBER Floats operator()(const uint8_t* at) const {
    Words low = repeated<lower_words(BITS)>(at), high{};
    for (int p = 0; p < PARTS; ++p) low.part[p] >>= low_at.part[p];
    if constexpr (H == 1) {  // a word that ends with the stream's 16 bits, so that all of them move to the right
      high = repeated<1>(at + upper - 2);
      for (int p = 0; p < PARTS; ++p) high.part[p] >>= high_at.part[p];
    } else if constexpr (H == 2) {
      high = repeated<1>(at + upper);
      for (int p = 0; p < PARTS; ++p) high.part[p] = high.part[p] << high_at.part[p] >> (30 - L);
    }
    return decode(low, high, 0, L);
  }
};

// Scales of sixteen groups, and what they add to a code times its scale: (code - zero) * scale is exact in float32.
struct Grids {
  float scales[UNIT], offsets[UNIT];
  INLINE_MEMBER void load(const Image* w, int64_t g) {
    const Floats wide = load_float16(at_offset<uint16_t>(w, w->scales) + g);
    Floats zeros = all(static_cast<float>(-w->mid));
    if (!w->symmetric) {
      typedef uint8_t Bytes __attribute__((vector_size(LANES)));
      Bytes stored[PARTS];
      __builtin_memcpy(stored, zeros_of(w) + g, sizeof stored);
      for (int p = 0; p < PARTS; ++p)
        zeros.part[p] = -__builtin_convertvector(__builtin_convertvector(stored[p], IntLanes), FloatLanes);
    }
    for (int p = 0; p < PARTS; ++p) zeros.part[p] *= wide.part[p];
    __builtin_memcpy(scales, &wide, sizeof scales);
    __builtin_memcpy(offsets, &zeros, sizeof offsets);
  }
};

INLINE float sum_of_lanes(const Floats& values) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight halves[2];
  __builtin_memcpy(halves, &values, sizeof halves);
  const Eight eight = halves[0] + halves[1];
  Four quarters[2];
  __builtin_memcpy(quarters, &eight, sizeof quarters);
  const Four four = quarters[0] + quarters[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Calls visit(group, place among CHAINS or 0, codes of unit u, u, scale, offset) for the kept groups [from, to).
template <typename UnitCodes, int CHAINS, int UNITS, typename Visit>
INLINE void for_each_kept(const Image* w, const UnitCodes& codes, int64_t from, int64_t to, Visit visit) {
  const int64_t bytes = bytes_of_group(w), unit_bytes = bytes / UNITS;
  const uint16_t* columns = kept_columns(w);
  const uint8_t* at = kept_codes(w) + from * bytes;
  for (int64_t g = from; g < to; g += UNIT) {
    Grids grids;
    grids.load(w, g);
    const int count = to - g < UNIT ? static_cast<int>(to - g) : UNIT;
    const auto step = [&](int i, int chain) INLINE_LAMBDA {
      unrolled<UNITS>([&](int u) INLINE_LAMBDA {
        visit(columns[g + i], chain, u, codes(at + u * unit_bytes), grids.scales[i], grids.offsets[i]);
      });
      at += bytes;
    };
    int i = 0;
    for (; i + CHAINS <= count; i += CHAINS) unrolled<CHAINS>([&](int c) INLINE_LAMBDA { step(i + c, c); });
    for (; i < count; ++i) step(i, 0);
  }
}

template <template <int> class Decoder, int BITS, int M, int UNITS>
void multiply_rows(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  constexpr int CHAINS = M == 1 ? 4 : M == 2 ? 2 : 1;
  const UnitDecoder<Decoder, BITS> codes(w);
  const float* inputs = static_cast<const float*>(x.rows);
  const int64_t* starts = row_starts(w);
  const int64_t last = first_row(w, to);
  for (int64_t first = first_row(w, from); first < last; first += STRIP) {
    const int count = last - first < STRIP ? static_cast<int>(last - first) : STRIP;
    float totals[M][STRIP];
    for (int r = 0; r < count; ++r) {
      Floats sums[CHAINS][M];
      for (auto& chain : sums)
        for (Floats& sum : chain) sum = all(0);
      for_each_kept<decltype(codes), CHAINS, UNITS>(w, codes, starts[first + r], starts[first + r + 1],
          [&](int64_t column, int chain, int u, const Floats& values, float scale, float offset) INLINE_LAMBDA {
            const Floats weights = multiply_add(values, scale, all(offset));
            const float* at = inputs + (column * UNITS + u) * UNIT;
            unrolled<M>([&](int m) INLINE_LAMBDA {
              Floats own;
              __builtin_memcpy(&own, at + m * x.stride, sizeof own);
              sums[chain][m] = multiply_add(weights, own, sums[chain][m]);
            });
          });
      for (int m = 0; m < M; ++m) {
        for (int c = 1; c < CHAINS; ++c) sums[0][m] = add(sums[0][m], sums[c][m]);
        totals[m][r] = sum_of_lanes(sums[0][m]);
      }
    }
    for (int m = 0; m < M && m < y.rows; ++m) {
      Floats outputs;
      __builtin_memcpy(&outputs, totals[m], sizeof outputs);
      store_row(y, m, first, count, outputs);
    }
  }
}

template <template <int> class Decoder, int BITS, int UNITS>
void multiply_units(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  if (x.m == 1) return multiply_rows<Decoder, BITS, 1, UNITS>(w, x, y, from, to);
  if constexpr (LARGEST_TILE >= 4) {
    if (x.m == 2) return multiply_rows<Decoder, BITS, 2, UNITS>(w, x, y, from, to);
    if (x.m == 4) return multiply_rows<Decoder, BITS, 4, UNITS>(w, x, y, from, to);
  }
  if constexpr (LARGEST_TILE >= 8) return multiply_rows<Decoder, BITS, 8, UNITS>(w, x, y, from, to);
}

// (code - zero) * scale of one row, rounded once to the output's type, and zero where groups are dropped.
template <template <int> class Decoder, int BITS, int UNITS>
void unpack_row_of(const Image* w, int64_t row, char* out, Type type) {
  const UnitDecoder<Decoder, BITS> codes(w);
  const int64_t size = type == FLOAT32 ? 4 : 2;
  __builtin_memset(out, 0, static_cast<size_t>(w->k * size));
  for_each_kept<decltype(codes), 1, UNITS>(w, codes, row_starts(w)[row], row_starts(w)[row + 1],
      [&](int64_t column, int, int u, const Floats& values, float scale, float offset) INLINE_LAMBDA {
        const Floats weights = multiply_add(values, scale, all(offset));
        float lanes[UNIT], ordered[UNIT];
        __builtin_memcpy(lanes, &weights, sizeof lanes);
        for (int i = 0; i < UNIT; ++i) ordered[input_of_lane(BITS, i)] = lanes[i];
        Floats in_order;
        __builtin_memcpy(&in_order, ordered, sizeof ordered);
        char rounded[4 * UNIT];
        round_to(type, in_order, rounded);
        const int64_t first = column * w->group + u * UNIT, end = column * w->group + w->group, stop = end < w->k ? end : w->k;
        const int64_t left = stop - first < w->kept.unit ? stop - first : w->kept.unit;
        if (left > 0) __builtin_memcpy(out + first * size, rounded, static_cast<size_t>(left * size));
      });
}

template <int WORDS, typename Convert>
INLINE void order_units(const Image* w, float* row, Convert value) {
  const int64_t in_group = w->kept.units * UNIT;
  for (int64_t g = 0; g < w->groups; ++g) {
    const int64_t first = g * w->group, left = w->k - first, count = left < w->group ? left : w->group;
    for (int64_t u = 0; u < w->kept.units; ++u) {
      float* to = row + g * in_group + u * UNIT;
      for (int i = 0; i < UNIT; ++i) {
        const int64_t input = u * UNIT + i % WORDS * (UNIT / WORDS) + i / WORDS;
        to[i] = input < count ? value(first + input) : 0;
      }
    }
  }
}

template <typename Convert>
INLINE void order_lanes(const Image* w, float* row, Convert value) {
  if (lower_words(w->bits) == 1) return order_units<1>(w, row, value);
  if (lower_words(w->bits) == 2) return order_units<2>(w, row, value);
  order_units<4>(w, row, value);
}

void load_kept(const Image* w, const void* x, Type type, float* row) {
  if (type == FLOAT32) {
    const float* from = static_cast<const float*>(x);
    return order_lanes(w, row, [=](int64_t i) { return from[i]; });
  }
  const uint16_t* from = static_cast<const uint16_t*>(x);
  if (type == BFLOAT16) return order_lanes(w, row, [=](int64_t i) { return from_bfloat16(from[i]); });
  order_lanes(w, row, [=](int64_t i) { return from_float16(from[i]); });
}

// step(a constant of the code width, one of the units of a group)
template <typename Step>
INLINE void with_sizes(const Image* w, Step step) {
  const auto with_units = [&](auto bits) INLINE_LAMBDA {
    if (w->kept.units == 1) return step(bits, std::integral_constant<int, 1>{});
    step(bits, std::integral_constant<int, 2>{});
  };
  switch (w->bits) {
    case 2: return with_units(std::integral_constant<int, 2>{});
    case 3: return with_units(std::integral_constant<int, 3>{});
    case 4: return with_units(std::integral_constant<int, 4>{});
    case 5: return with_units(std::integral_constant<int, 5>{});
    case 6: return with_units(std::integral_constant<int, 6>{});
    default: return with_units(std::integral_constant<int, 8>{});
  }
}

template <template <int> class Decoder>
void multiply_kept(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  with_sizes(w, [&](auto bits, auto units) { multiply_units<Decoder, bits, units>(w, x, y, from, to); });
}

template <template <int> class Decoder>
void unpack_kept(const Image* w, int64_t from, int64_t to, void* out, Type type) {
  const int64_t row_bytes = w->k * (type == FLOAT32 ? 4 : 2);
  for (int64_t row = from; row < to; ++row) {
    char* at = static_cast<char*>(out) + (row - from) * row_bytes;
    with_sizes(w, [&](auto bits, auto units) { unpack_row_of<Decoder, bits, units>(w, row, at, type); });
  }
}

}  // namespace
