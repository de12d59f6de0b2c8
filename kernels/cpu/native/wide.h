// Sixteen rows side by side in PARTS registers of LANES lanes. Each instruction set compiles its own copy: all of it
// is in an anonymous namespace, or the linker could give AVX-512 code to a processor without.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "image.h"
#include "level.h"

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

constexpr int PARTS = STRIP / LANES;
#if defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = LANES == 16 ? 32 : 16;
#endif
// Rows of x at once: what the registers hold.
constexpr int LARGEST_TILE = LANES == 16 ? 8 : LANES == 8 ? 6 : REGISTERS / 8;
constexpr bool WHOLE_CODES = LANES != 16;  // whether products of floats are of codes, or of codes less mid
typedef float FloatLanes __attribute__((vector_size(4 * LANES)));
typedef int32_t IntLanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t WordLanes __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfLanes __attribute__((vector_size(2 * LANES)));
struct Floats { FloatLanes part[PARTS]; };
struct Words { WordLanes part[PARTS]; };

template <typename Step, int... I>
INLINE void in_sequence(Step step, std::integer_sequence<int, I...>) {
  (step(std::integral_constant<int, I>{}), ...);
}
// step(0), ..., step(COUNT - 1), each with a constant: shifts by constants are what the layout is made for.
template <int COUNT, typename Step>
INLINE void unrolled(Step step) {
  in_sequence(step, std::make_integer_sequence<int, COUNT>{});
}

INLINE float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
INLINE float from_bfloat16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }
template <typename Bits>  // uint32_t or a vector of them
INLINE Bits round_to_bfloat16(Bits bits) {  // to nearest, ties to even
  const Bits rounded = bits + 0x7fff + (bits >> 16 & 1);
  return ((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded) >> 16;
}
INLINE uint16_t to_bfloat16(float value) { return static_cast<uint16_t>(round_to_bfloat16(to_bits(value))); }
#if defined(__aarch64__)
INLINE float from_float16(uint16_t bits) {
  __fp16 half;
  __builtin_memcpy(&half, &bits, 2);
  return half;
}
INLINE uint16_t to_float16(float value) {
  const __fp16 half = value;
  uint16_t bits;
  __builtin_memcpy(&bits, &half, 2);
  return bits;
}
#elif defined(__F16C__)
INLINE float from_float16(uint16_t bits) { return _cvtsh_ss(bits); }
INLINE uint16_t to_float16(float value) { return _cvtss_sh(value, 0); }
#else
// Moving the exponent by a multiplication also turns float16's subnormals into normal numbers.
INLINE float from_float16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}
INLINE uint16_t to_float16(float value) {  // to nearest, ties to even
  const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves multiples of 2^-24 in the last bits, rounded
    return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}
#endif
INLINE float load_as_float(const void* values, Type type, int64_t i) {
  if (type == FLOAT32) return static_cast<const float*>(values)[i];
  const uint16_t bits = static_cast<const uint16_t*>(values)[i];
  return type == FLOAT16 ? from_float16(bits) : from_bfloat16(bits);
}

// Register by register: a copy of all of them at once goes through memory in smaller pieces than it is read back in, and
// waits for them. With 8 lanes that took three quarters of a product's time.
INLINE Words load_words(const uint32_t* at) {
  Words words;
  for (int p = 0; p < PARTS; ++p) __builtin_memcpy(&words.part[p], at + p * LANES, sizeof words.part[p]);
  return words;
}
INLINE Floats load_floats(const void* at) {
  Floats values;
  for (int p = 0; p < PARTS; ++p)
    __builtin_memcpy(&values.part[p], static_cast<const char*>(at) + p * sizeof values.part[p], sizeof values.part[p]);
  return values;
}
INLINE void store_floats(const Floats& values, void* at) {
  for (int p = 0; p < PARTS; ++p)
    __builtin_memcpy(static_cast<char*>(at) + p * sizeof values.part[p], &values.part[p], sizeof values.part[p]);
}
INLINE Floats all(float value) {
  Floats out;
  for (int p = 0; p < PARTS; ++p) out.part[p] = value - FloatLanes{};
  return out;
}
INLINE Floats add(Floats a, const Floats& b) {
  for (int p = 0; p < PARTS; ++p) a.part[p] += b.part[p];
  return a;
}
INLINE Floats multiply_add(const Floats& a, const Floats& b, Floats sum) {
  for (int p = 0; p < PARTS; ++p) sum.part[p] += a.part[p] * b.part[p];
  return sum;
}
INLINE Floats multiply_add(const Floats& a, float b, Floats sum) {
  for (int p = 0; p < PARTS; ++p) {
    sum.part[p] += a.part[p] * b;
#if LANES == 4 && defined(__SSE2__)
    __asm__("" : "+x"(sum.part[p]));  // or GCC 12 adds up one register after the other, each waiting for itself
#endif
  }
  return sum;
}
INLINE Floats load_float16(const uint16_t* at) {
#if LANES == 16
  return {{_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))}};
#elif LANES == 8
  const __m128i* halves = reinterpret_cast<const __m128i*>(at);
  return {{_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))}};
#else
  float values[STRIP];
  for (int r = 0; r < STRIP; ++r) values[r] = from_float16(at[r]);
  return load_floats(values);
#endif
}
// Sixteen floats of a type.
INLINE Floats load_from(Type type, const void* at) {
  if (type == FLOAT16) return load_float16(static_cast<const uint16_t*>(at));
  if (type == FLOAT32) return load_floats(at);
  Floats out;
  HalfLanes halves[PARTS];
  __builtin_memcpy(halves, at, sizeof halves);
  for (int p = 0; p < PARTS; ++p)
    out.part[p] = reinterpret_cast<FloatLanes>(__builtin_convertvector(halves[p], WordLanes) << 16);
  return out;
}
INLINE Floats multiplied(Floats a, const Floats& b) {
  for (int p = 0; p < PARTS; ++p) a.part[p] *= b.part[p];
  return a;
}
// What an asymmetric group adds to its codes less mid.
INLINE Floats load_offsets(const uint8_t* at, int mid) {
  float values[STRIP];
  for (int r = 0; r < STRIP; ++r) values[r] = static_cast<float>(mid - at[r]);
  return load_floats(values);
}

// The same for any weight: `at` counts in its zeros, of which a symmetric one has none.
INLINE Floats load_offsets(const Image* w, int64_t at, int base) {
  return w->symmetric ? all(static_cast<float>(base - w->mid)) : load_offsets(zeros_of(w) + at, base);
}

// The words of codes moved so that bit FROM becomes bit TO.
INLINE WordLanes move_bit(WordLanes words, int from, int to) {
  return from >= to ? words >> (from - to) : words << (to - from);
}

// Sixteen floats rounded to a type, in vectors where that is possible: a panel is unpacked through this.
INLINE void round_to(Type type, const Floats& sums, void* out) {
  if (type == FLOAT32) {
    // Not store_floats: GCC 12 then keeps totals in the registers that products need (six rows take a third longer).
    __builtin_memcpy(out, &sums, sizeof sums);
    return;
  }
#if LANES == 16
  if (type == FLOAT16) {
    _mm256_storeu_si256(static_cast<__m256i*>(out), _mm512_cvtps_ph(sums.part[0], _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
  if (type == BFLOAT16) {
    for (int p = 0; p < PARTS; ++p) {
      const WordLanes words = round_to_bfloat16(reinterpret_cast<WordLanes>(sums.part[p]));
      const HalfLanes halves = __builtin_convertvector(words, HalfLanes);
      __builtin_memcpy(static_cast<char*>(out) + p * sizeof halves, &halves, sizeof halves);
    }
    return;
  }
  float values[STRIP];
  uint16_t halves[STRIP];
  __builtin_memcpy(values, &sums, sizeof values);
  for (int r = 0; r < STRIP; ++r) halves[r] = to_float16(values[r]);
  __builtin_memcpy(out, halves, sizeof halves);
}

// Sixteen floats to the outputs' rows [first, first + count) of y's row m, with the bias.
INLINE void store_row(const Outputs& to, int m, int64_t first, int count, Floats sums) {
  if (to.bias) {
    float bias[STRIP] = {};
    for (int r = 0; r < count; ++r) bias[r] = load_as_float(to.bias, to.bias_type, m * to.bias_stride + first + r);
    sums = add(sums, load_floats(bias));
  }
  const size_t size = to.type == FLOAT32 ? 4 : 2;
  char* out = static_cast<char*>(to.y) + (m * to.n + first) * static_cast<int64_t>(size);
  if (count == STRIP) return round_to(to.type, sums, out);
  char rounded[4 * STRIP];
  round_to(to.type, sums, rounded);
  __builtin_memcpy(out, rounded, size * static_cast<size_t>(count));
}

}  // namespace
