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
  if constexpr (WORDS == 1) {
    uint32_t word;
    __builtin_memcpy(&word, at, 4);
    for (WordLanes& part : out.part) part = word - WordLanes{};
  } else if constexpr (WORDS == 2) {
    typedef uint64_t Pairs __attribute__((vector_size(4 * LANES)));
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

// Scales of a run of slots, and what they add to a code times its scale: (code - zero) * scale is exact in float32.
// Widened long before they are used: a load that meets a store on its way, in another size, waits for it.
constexpr int64_t RUN = 256;
template <int BYTES>
struct Grids {
  float scales[RUN], offsets[RUN];
  INLINE_MEMBER void load(const Image* w, int64_t from, int64_t to) {
    for (int64_t slot = from; slot < to; slot += UNIT) {
      fetch_slots<BYTES>(w, slot, bytes_of_group(w));
      const Floats wide = load_float16(at_offset<uint16_t>(w, w->scales) + slot);
      Floats shifts = load_offsets(w, slot, 0);
      for (int p = 0; p < PARTS; ++p) shifts.part[p] *= wide.part[p];
      __builtin_memcpy(scales + (slot - from), &wide, sizeof wide);
      __builtin_memcpy(offsets + (slot - from), &shifts, sizeof shifts);
    }
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

// Rows of four that are summed at once: as many as the registers hold, with M rows of x.
constexpr int rows_at_once(int m) { return LANES == 16 && m > 4 ? 2 : LANES == 16 || m == 1 ? 4 : m > 4 ? 1 : 4 / m; }

// Sums of ROWS of four rows, from row `place` of them on, for M rows of x: to[m][row within the strip].
template <template <int> class Decoder, int BITS, int M, int UNITS, int ROWS>
INLINE void sum_rows(const Image* w, const UnitDecoder<Decoder, BITS>& codes, const Inputs& x, int64_t four, int place,
                     float (*to)[STRIP]) {
  const int64_t from = starts_of_fours(w)[four], end = starts_of_fours(w)[four + 1], bytes = bytes_of_group(w);
  const char* inputs = static_cast<const char*>(x.rows);
  const int64_t stride = x.stride;
  const uint8_t* at = kept_codes(w) + (from + place) * bytes;
  Floats sums[ROWS][M];
  unrolled<ROWS * M>([&](int i) INLINE_LAMBDA { sums[i / M][i % M] = all(0); });
  Grids<2 * BITS * UNITS> grids;
  for (int64_t run = from; run < end; run += RUN) {
    const int64_t run_end = run + RUN < end ? run + RUN : end;
    grids.load(w, run, run_end);
    const uint16_t* places = places_of(w) + run + place;
    const float *scales = grids.scales + place, *offsets = grids.offsets + place;
    for (int64_t i = 0; i < run_end - run; i += FOUR, at += FOUR * bytes) {
      unrolled<ROWS>([&](int r) INLINE_LAMBDA {
        const float* own = reinterpret_cast<const float*>(inputs + static_cast<int64_t>(places[i + r]) * PLACE);
        unrolled<UNITS>([&](int u) INLINE_LAMBDA {
          const Floats values = codes(at + r * bytes + u * (bytes / UNITS));
          const Floats weights = multiply_add(values, scales[i + r], all(offsets[i + r]));
          unrolled<M>([&](int m) INLINE_LAMBDA {
            sums[r][m] = multiply_add(weights, load_floats(own + m * stride + u * UNIT), sums[r][m]);
          });
        });
      });
    }
  }
  const uint8_t* order = row_order(w) + four * FOUR + place;
  unrolled<ROWS * M>([&](int i) INLINE_LAMBDA { to[i % M][order[i / M]] = sum_of_lanes(sums[i / M][i % M]); });
}

template <template <int> class Decoder, int BITS, int M, int UNITS>
void multiply_rows(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  constexpr int ROWS = rows_at_once(M);
  const UnitDecoder<Decoder, BITS> codes(w);
  const int64_t last = first_row(w, to);
  for (int64_t first = first_row(w, from); first < last; first += STRIP) {
    float totals[M][STRIP];
    for (int64_t four = first / FOUR; four < (first + STRIP) / FOUR; ++four)
      for (int place = 0; place < FOUR; place += ROWS)
        sum_rows<Decoder, BITS, M, UNITS, ROWS>(w, codes, x, four, place, totals);
    const int count = last - first < STRIP ? static_cast<int>(last - first) : STRIP;
    for (int m = 0; m < M && m < y.rows; ++m) store_row(y, m, first, count, load_floats(totals[m]));
  }
}

template <template <int> class Decoder, int BITS, int UNITS>
void multiply_units(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  if (x.m == 1) return multiply_rows<Decoder, BITS, 1, UNITS>(w, x, y, from, to);
  if (x.m == 2) return multiply_rows<Decoder, BITS, 2, UNITS>(w, x, y, from, to);
  if constexpr (LARGEST_TILE >= 4)
    if (x.m == 4) return multiply_rows<Decoder, BITS, 4, UNITS>(w, x, y, from, to);
  if constexpr (LARGEST_TILE > 4) return multiply_rows<Decoder, BITS, LARGEST_TILE, UNITS>(w, x, y, from, to);
}

// The weights of one slot's unit, rounded once to the output's type, to their place in a row of W.
template <int BITS>
INLINE void place_unit(const Image* w, int64_t column, int64_t u, const Floats& weights, char* row, Type type) {
  const int64_t size = type == FLOAT32 ? 4 : 2, start = column * w->group, first = start + u * UNIT;
  const int64_t end = start + w->group < w->k ? start + w->group : w->k;
  float lanes[UNIT], ordered[UNIT];
  store_floats(weights, lanes);
  for (int i = 0; i < UNIT; ++i) ordered[input_of_lane(BITS, i)] = lanes[i];
  char rounded[4 * UNIT];
  round_to(type, load_floats(ordered), rounded);
  const int64_t left = end - first < UNIT ? end - first : UNIT;
  if (left > 0) __builtin_memcpy(row + first * size, rounded, static_cast<size_t>(left * size));
}

// (code - zero) * scale of the strip from a row on, and zero where groups are dropped.
template <template <int> class Decoder, int BITS>
void unpack_strip_of(const Image* w, int64_t row, char* out, Type type) {
  const UnitDecoder<Decoder, BITS> codes(w);
  const int64_t row_bytes = w->k * (type == FLOAT32 ? 4 : 2), bytes = bytes_of_group(w), units = w->kept.units;
  const int64_t count = w->n - row < STRIP ? w->n - row : STRIP;
  __builtin_memset(out, 0, static_cast<size_t>(count * row_bytes));
  for (int64_t four = row / FOUR; four < (row + STRIP) / FOUR; ++four) {
    const int64_t from = starts_of_fours(w)[four], end = starts_of_fours(w)[four + 1];
    Grids<2 * BITS> grids;
    for (int64_t slot = from; slot < end; ++slot) {
      const int64_t in_run = (slot - from) % RUN;
      if (!in_run) grids.load(w, slot, slot + RUN < end ? slot + RUN : end);
      const int64_t column = places_of(w)[slot] / places_of_group(w);
      if (column == w->groups) continue;
      char* to = out + row_order(w)[four * FOUR + (slot - from) % FOUR] * row_bytes;
      for (int64_t u = 0; u < units; ++u) {
        const Floats values = codes(kept_codes(w) + slot * bytes + u * (bytes / units));
        const Floats weights = multiply_add(values, grids.scales[in_run], all(grids.offsets[in_run]));
        place_unit<BITS>(w, column, u, weights, to, type);
      }
    }
  }
}

template <int WORDS, typename Convert>
INLINE void order_units(const Image* w, float* row, Convert value) {
  const int64_t in_group = w->kept.units * UNIT;
  for (int64_t g = 0; g <= w->groups; ++g) {  // after the last: zeros, for empty slots
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

template <template <int> class Decoder>
void multiply_kept(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  with_bits(w->bits, [&](auto bits) {
    if (w->kept.units == 1) return multiply_units<Decoder, bits, 1>(w, x, y, from, to);
    multiply_units<Decoder, bits, 2>(w, x, y, from, to);
  });
}

template <template <int> class Decoder>
void unpack_kept(const Image* w, int64_t row, void* out, Type type) {
  with_bits(w->bits, [&](auto bits) { unpack_strip_of<Decoder, bits>(w, row, static_cast<char*>(out), type); });
}

}  // namespace
