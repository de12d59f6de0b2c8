// From a column of trellis codes to the integers of its rows, sixteen rows at a time: to the four bytes whose sum, less
// MIDDLE, is the integer, and to that sum.
//
// Row 8 j + i of a tile, lane i of register j, has the 12 bits from bit BITS (HEIGHT i + j) on of a column's cycle of
// BITS HEIGHT bytes (HEIGHT: tile / 8, even). So a lane reads a stretch of the cycle: a word of 32 bits from the byte on
// where the stretch starts, as many registers as fit it, and another word further on. All places are constants.
// Included after wide.h, once for each instruction set.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "trellis.h"
#include "wide.h"

namespace {

template <int BITS, int HEIGHT>
struct Walk {
  static constexpr int BYTES = BITS * HEIGHT;  // of a column
  static constexpr int STRIPS = HEIGHT / 2;
  static constexpr bool WHOLE = BYTES % 8 == 0;  // whether lanes start at whole bytes
  static constexpr int MOST_SHIFT = WHOLE ? 0 : 6;

  static constexpr int byte_of(int lane) { return BYTES * lane / 8; }
  static constexpr int shift_of(int lane) { return BYTES * lane % 8; }
  // Byte of a lane's stretch from which the word for `together` registers from j on, an even multiple of it, is read. The
  // last word ends with the last state where it can: a shift alone then takes the state out.
  static constexpr int start_of(int j, int together) {
    constexpr int END = BITS * (HEIGHT - 1) + trellis::STATE_BITS;
    int start = 0;
    for (int i = 0; i <= j; i += together)
      if (BITS * (i + together - 1) - 8 * start + MOST_SHIFT + trellis::STATE_BITS > 32) {
        const int first = BITS * i / 8, last = (END - 32) / 8;
        start = WHOLE && END % 8 == 0 && last > start && last < first ? last : first;
      }
    return start;
  }
  static constexpr bool starts_word(int j, int together) {
    return j == 0 || start_of(j, together) != start_of(j - together, together);
  }
};

// Whether integers come with their middle taken off: dot products start from minus it, others would need one step more.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool CENTRED = true;
#else
constexpr bool CENTRED = false;
#endif

#if LANES >= 8 && defined(__AVX2__)

template <int COUNT>
struct Bytes {
  alignas(64) int8_t of[COUNT];
};
template <int COUNT>
struct Shifts {
  alignas(64) int32_t of[COUNT];
};

// Bytes [start, start + 16) of the cycle, for cycles of 17 bytes or more; no byte outside the column is read.
template <int CYCLE, int START>
INLINE __m128i sixteen_from(const uint8_t* column) {
  const auto load = [&](int at) INLINE_LAMBDA { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(column + at)); };
  constexpr int LAST = CYCLE - 16;
  if constexpr (START >= CYCLE) return load(START - CYCLE);
  else if constexpr (START <= LAST) return load(START);
  else return _mm_alignr_epi8(load(0), load(LAST), START - LAST);
}

// All bytes of a cycle of up to 16: two pieces, which overlap where it is not twice as long as they are.
template <int CYCLE>
struct Short {
  static constexpr int PIECE = CYCLE < 8 ? 4 : 8;
  static constexpr int place_of(int byte) { return byte < PIECE ? byte : byte - (CYCLE - PIECE) + PIECE; }
  static INLINE_MEMBER __m128i load(const uint8_t* column) {
    if constexpr (CYCLE == 16) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(column));
    } else if constexpr (PIECE == 8) {
      int64_t low, high;
      __builtin_memcpy(&low, column, 8);
      __builtin_memcpy(&high, column + CYCLE - 8, 8);
      return _mm_set_epi64x(high, low);
    } else {
      int32_t low, high;
      __builtin_memcpy(&low, column, 4);
      __builtin_memcpy(&high, column + CYCLE - 4, 4);
      return _mm_set_epi32(0, 0, high, low);
    }
  }
};

// Bytes that a shuffle takes for the words of eight lanes. place(lane, byte): of a word's byte within the lane's sixteen.
template <int COUNT, typename Place>
constexpr Bytes<COUNT> shuffle_of(Place place) {
  Bytes<COUNT> found{};
  for (int i = 0; i < COUNT; ++i) found.of[i] = static_cast<int8_t>(place(i / 4 % 8, i % 4));
  return found;
}

#if LANES == 8
INLINE __m256i side_by_side(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
INLINE __m256i whole_column(const uint8_t* column) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(column)); }
INLINE __m256i shuffled(__m128i low, __m128i high, const Bytes<32>& order) {
  return _mm256_shuffle_epi8(side_by_side(low, high), _mm256_load_si256(reinterpret_cast<const __m256i*>(order.of)));
}
INLINE __m256i either(__m256i a, __m256i b) { return _mm256_or_si256(a, b); }
#else
INLINE __m512i side_by_side(__m128i low, __m128i high) {
  return _mm512_broadcast_i64x4(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
}
INLINE __m512i whole_column(const uint8_t* column) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(column)));
}
INLINE __m512i shuffled(__m128i low, __m128i high, const Bytes<64>& order) {
  return _mm512_shuffle_epi8(side_by_side(low, high), _mm512_load_si512(order.of));
}
INLINE __m512i either(__m512i a, __m512i b) { return _mm512_or_si512(a, b); }
#endif

// The words of eight lanes from byte START of their stretches on; with 16 lanes twice.
template <int BITS, int HEIGHT, int START>
INLINE auto words_of(const uint8_t* column) {
  using W = Walk<BITS, HEIGHT>;
  constexpr int CYCLE = W::BYTES, COUNT = 4 * LANES;
  if constexpr (CYCLE <= 16) {
    static constexpr auto order = shuffle_of<COUNT>([](int lane, int byte) {
      return Short<CYCLE>::place_of((W::byte_of(lane) + START + byte) % CYCLE);
    });
    const __m128i all_bytes = Short<CYCLE>::load(column);
    return shuffled(all_bytes, all_bytes, order);
  } else if constexpr (CYCLE == 32 && START == 0) {
    return whole_column(column);
  } else if constexpr (W::byte_of(3) + 4 <= 16) {  // four lanes read within sixteen bytes, of several words if they can
    constexpr int FROM = W::byte_of(3) + 4 + START <= 16 ? 0 : START;
    static constexpr auto order = shuffle_of<COUNT>([](int lane, int byte) { return W::byte_of(lane % 4) + byte + START - FROM; });
    const __m128i low = sixteen_from<CYCLE, FROM>(column), high = sixteen_from<CYCLE, FROM + W::byte_of(4)>(column);
    if constexpr (CYCLE == 32) return side_by_side(low, high);
    else return shuffled(low, high, order);
  } else {  // two do
    constexpr int FROM = W::byte_of(3) - W::byte_of(2) + 4 + START <= 16 ? 0 : START;
    static constexpr auto even = shuffle_of<COUNT>([](int lane, int byte) {
      return lane % 4 < 2 ? W::byte_of(lane % 4) + byte + START - FROM : -1;
    });
    static constexpr auto odd = shuffle_of<COUNT>([](int lane, int byte) {
      return lane % 4 < 2 ? -1 : W::byte_of(lane % 4) - W::byte_of(2) + byte + START - FROM;
    });
    const auto load = [&](auto lane) INLINE_LAMBDA { return sixteen_from<CYCLE, FROM + W::byte_of(decltype(lane)::value)>(column); };
    using std::integral_constant;
    return either(shuffled(load(integral_constant<int, 0>{}), load(integral_constant<int, 4>{}), even),
                  shuffled(load(integral_constant<int, 2>{}), load(integral_constant<int, 6>{}), odd));
  }
}

// By how much the words of registers j and (with 16 lanes) j + 1 are moved down.
template <int BITS, int HEIGHT, int J, int TOGETHER>
constexpr Shifts<8 * TOGETHER> shifts_of() {
  using W = Walk<BITS, HEIGHT>;
  Shifts<8 * TOGETHER> found{};
  for (int i = 0; i < 8 * TOGETHER; ++i)
    found.of[i] = BITS * (J + i / 8) - 8 * W::start_of(J, TOGETHER) + W::shift_of(i % 8);
  return found;
}

#if LANES == 8
template <int BITS, int HEIGHT, int J>
INLINE __m256i states_of(__m256i words) {
  static constexpr auto shifts = shifts_of<BITS, HEIGHT, J, 1>();
  const __m256i mask = _mm256_set1_epi32(trellis::STATES - 1);
  if constexpr (!Walk<BITS, HEIGHT>::WHOLE) {
    const __m256i each = _mm256_load_si256(reinterpret_cast<const __m256i*>(shifts.of));
    return _mm256_and_si256(_mm256_srlv_epi32(words, each), mask);
  } else {
    const __m256i moved = _mm256_srli_epi32(words, shifts.of[0]);
    return shifts.of[0] + trellis::STATE_BITS == 32 ? moved : _mm256_and_si256(moved, mask);
  }
}

INLINE __m256i bytes_of(__m256i states) {
  const __m256i words = _mm256_mullo_epi32(states, _mm256_set1_epi32(static_cast<int32_t>(trellis::MULTIPLIER)));
  return _mm256_and_si256(words, _mm256_set1_epi32(trellis::MASK));
}

// The integers of 8 words, less MIDDLE where CENTRED.
INLINE FloatLanes sums_of(WordLanes words) {
  const __m256i bytes = reinterpret_cast<__m256i>(words);
#if defined(__AVXVNNI__)
  const __m256i sums = _mm256_dpbusd_avx_epi32(_mm256_set1_epi32(-trellis::MIDDLE), bytes, _mm256_set1_epi8(1));
#elif defined(__AVX512VNNI__)
  const __m256i sums = _mm256_dpbusd_epi32(_mm256_set1_epi32(-trellis::MIDDLE), bytes, _mm256_set1_epi8(1));
#else
  const __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
#endif
  return reinterpret_cast<FloatLanes>(_mm256_cvtepi32_ps(sums));
}

// Calls visit(s, bytes of rows 16 s to 16 s + 15 in each of COLUMNS neighbouring columns) for the strips of a tile; s is a
// constant.
template <int BITS, int HEIGHT, int COLUMNS, typename Visit>
INLINE void for_each_strip(const uint8_t* column, Visit visit) {
  using W = Walk<BITS, HEIGHT>;
  __m256i words[COLUMNS];
  unrolled<W::STRIPS>([&](auto s) INLINE_LAMBDA {
    Words bytes[COLUMNS];
    unrolled<2 * COLUMNS>([&](auto i) INLINE_LAMBDA {
      constexpr int p = decltype(i)::value % 2, c = decltype(i)::value / 2, j = 2 * decltype(s)::value + p;
      if constexpr (W::starts_word(j, 1)) words[c] = words_of<BITS, HEIGHT, W::start_of(j, 1)>(column + c * W::BYTES);
      bytes[c].part[p] = reinterpret_cast<WordLanes>(bytes_of(states_of<BITS, HEIGHT, j>(words[c])));
    });
    visit(s, bytes);
  });
}
#else
INLINE __m512i bytes_of(__m512i windows) {
  const __m512i states = _mm512_and_si512(windows, _mm512_set1_epi32(trellis::STATES - 1));
  const __m512i words = _mm512_mullo_epi32(states, _mm512_set1_epi32(static_cast<int32_t>(trellis::MULTIPLIER)));
  return _mm512_and_si512(words, _mm512_set1_epi32(trellis::MASK));
}

INLINE FloatLanes sums_of(WordLanes words) {
  const __m512i bytes = reinterpret_cast<__m512i>(words);
#if defined(__AVX512VNNI__)
  const __m512i sums = _mm512_dpbusd_epi32(_mm512_set1_epi32(-trellis::MIDDLE), bytes, _mm512_set1_epi8(1));
#else
  const __m512i sums = _mm512_madd_epi16(_mm512_maddubs_epi16(bytes, _mm512_set1_epi8(1)), _mm512_set1_epi16(1));
#endif
  return reinterpret_cast<FloatLanes>(_mm512_cvtepi32_ps(sums));
}

template <int BITS, int HEIGHT, int COLUMNS, typename Visit>
INLINE void for_each_strip(const uint8_t* column, Visit visit) {
  using W = Walk<BITS, HEIGHT>;
  __m512i words[COLUMNS];
  unrolled<W::STRIPS>([&](auto s) INLINE_LAMBDA {
    constexpr int j = 2 * decltype(s)::value;
    static constexpr auto shifts = shifts_of<BITS, HEIGHT, j, 2>();
    Words bytes[COLUMNS];
    unrolled<COLUMNS>([&](auto c) INLINE_LAMBDA {
      if constexpr (W::starts_word(j, 2)) words[c] = words_of<BITS, HEIGHT, W::start_of(j, 2)>(column + c * W::BYTES);
      const __m512i windows = _mm512_srlv_epi32(words[c], _mm512_load_si512(shifts.of));
      bytes[c].part[0] = reinterpret_cast<WordLanes>(bytes_of(windows));
    });
    visit(s, bytes);
  });
}
#endif

#else

// The word of a lane from a byte of the cycle on.
template <int CYCLE, int FROM>
INLINE uint32_t word_from(const uint8_t* column) {
  uint32_t word = 0;
  if constexpr (FROM + 4 <= CYCLE) __builtin_memcpy(&word, column + FROM, 4);
  else
    for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(column[(FROM + i) % CYCLE]) << 8 * i;
  return word;
}

INLINE WordLanes sums_of_bytes(WordLanes bytes) {
  const WordLanes pairs = (bytes & 0x00ff00ff) + (bytes >> 8 & 0x00ff00ff);
  return (pairs + (pairs >> 16)) & 0xffff;
}

INLINE FloatLanes sums_of(WordLanes bytes) {
  return __builtin_convertvector(reinterpret_cast<IntLanes>(sums_of_bytes(bytes)), FloatLanes);
}

template <int BITS, int HEIGHT, int COLUMNS, typename Visit>
INLINE void for_each_strip(const uint8_t* column, Visit visit) {
  using W = Walk<BITS, HEIGHT>;
  WordLanes words[COLUMNS][8 / LANES];
  unrolled<W::STRIPS>([&](auto s) INLINE_LAMBDA {
    Words bytes[COLUMNS];
    unrolled<2 * COLUMNS>([&](auto at) INLINE_LAMBDA {
      constexpr int p = decltype(at)::value % 2, c = decltype(at)::value / 2, j = 2 * decltype(s)::value + p;
      constexpr int start = W::start_of(j, 1), shift = BITS * j - 8 * start;
      if constexpr (W::starts_word(j, 1))
        unrolled<8>([&](auto i) INLINE_LAMBDA {
          const uint32_t word = word_from<W::BYTES, W::byte_of(decltype(i)::value) + start>(column + c * W::BYTES);
          words[c][i / LANES][i % LANES] = word >> W::shift_of(i);
        });
      for (int q = 0; q < 8 / LANES; ++q) {
        const WordLanes states = words[c][q] >> shift & static_cast<uint32_t>(trellis::STATES - 1);
        bytes[c].part[p * 8 / LANES + q] = states * trellis::MULTIPLIER & trellis::MASK;
      }
    });
    visit(s, bytes);
  });
}

#endif

// Less MIDDLE where CENTRED.
INLINE Floats integers_of(const Words& bytes) {
  Floats out;
  for (int p = 0; p < PARTS; ++p) out.part[p] = sums_of(bytes.part[p]);
  return out;
}

}  // namespace
