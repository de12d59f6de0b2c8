// A prepared weight: one block of bytes that starts with this header. docs: kernels/cpu/native.py.
//
// Output rows stand side by side in strips of 16, inputs run inside in blocks of 32. Every group of scales starts a
// block (per_oc) or a strip (per_ic) of its own: the kernels know no group that ends inside one. What this leaves
// empty meets an x of zero, or is not written to y.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

constexpr int STRIP = 16;   // output rows: float32 lanes of an AVX-512 register
constexpr int BLOCK = 32;   // inputs: then every plane of a block is a whole number of 64-byte vectors
constexpr int VECTOR = 64;  // bytes: a 32-bit word for each row of a strip
constexpr uint32_t MAGIC = 0x43504351;
constexpr uint32_t VERSION = 11;

// What the image of a weight with dropped groups has besides: kept.h. All zero in the others.
struct Kept {
  int64_t units, unit;                     // of a group, and inputs in a unit: 8 or 16
  int64_t slots;                           // for kept groups, the empty ones included
  int64_t places, order, starts, shares;   // offsets in bytes from the image's header
};

struct Image {
  uint32_t magic, version;
  int32_t bits;          // 2, 3, 4, 5, 6 or 8; a code of 7 bits takes 8
  int32_t mid;           // what the kernels subtract from a code: the zero point of symmetric codes
  int32_t per_ic, symmetric;
  int64_t n, k;          // the weight's true size
  int64_t strips, blocks;
  int64_t group, groups;               // inputs (per_oc) or outputs (per_ic) in a full group
  int64_t group_strips, group_blocks;  // of a full group; all of them along the side that is not grouped
  // Offsets in bytes from the header, multiples of VECTOR.
  int64_t codes;   // [strips][blocks][bits][16] uint32
  int64_t scales;  // float16: per_oc [strips][groups][16], per_ic [groups][blocks * 32]
  int64_t zeros;   // uint8, shaped as the scales; none if symmetric
  int64_t bytes;   // all of it
  Kept kept;       // of a weight with dropped groups, whose strips, blocks, codes, scales and zeros are those of kept.h
};

// Planes of a code. The lower plane has `bits` 2, 4 or 8, the upper one the 1 or 2 that are left.
constexpr int low_width(int bits) { return bits >= 8 ? 8 : bits >= 4 ? 4 : 2; }
constexpr int high_width(int bits) { return bits - low_width(bits); }

// The code of input k (0..31) is in the word of its row in vector low_vector, from bit low_bit on. Halves of a word
// are even and odd inputs, as bfloat16 dot products want them; bytes never share a code, as int8 ones want it.
constexpr int inputs_in_vector(int bits) { return 32 / low_width(bits); }
constexpr int low_vector(int bits, int k) { return k / inputs_in_vector(bits); }
constexpr int low_bit(int bits, int k) {
  return k % 2 * 16 + k % inputs_in_vector(bits) / 2 * low_width(bits);
}

// Where the planes of a code are joined (words.h), it is in a field of 2, 4 or 8 bits: words of the lower plane hold
// those of `joints` words, side by side.
constexpr int field_width(int bits) { return bits == 2 ? 2 : bits <= 4 ? 4 : 8; }
constexpr int joints(int bits) { return field_width(bits) / low_width(bits); }

// Its upper part is in the same field of another vector, so that one shift joins all fields (or bytes, or halves) at
// once.
constexpr int high_share(int bits) {  // vectors of the lower plane that share one of the upper
  return high_width(bits) ? low_width(bits) / high_width(bits) : 1;
}
constexpr int high_vector(int bits, int k) { return low_width(bits) + low_vector(bits, k) / high_share(bits); }
constexpr int high_bit(int bits, int k) {
  const int field = field_width(bits), joint = low_bit(bits, k) % field / low_width(bits);
  return low_bit(bits, k) / field * field + (low_vector(bits, k) % high_share(bits) * joints(bits) + joint) * high_width(bits);
}

// The int8 kernel multiplies four inputs of a row at once: those whose codes are at the same bit of the word's bytes.
constexpr int quad_input(int bits, int quad, int byte) {
  const int per_byte = 8 / low_width(bits);
  const int vector = quad / per_byte, place = quad % per_byte;
  return vector * 4 * per_byte + 2 * (byte % 2 * per_byte + place) + byte / 2;
}

namespace {  // a copy for each instruction set, as wide.h says
// step(a constant of the code width)
template <typename Step>
inline __attribute__((always_inline)) void with_bits(int bits, Step step) {
  switch (bits) {
    case 2: return step(std::integral_constant<int, 2>{});
    case 3: return step(std::integral_constant<int, 3>{});
    case 4: return step(std::integral_constant<int, 4>{});
    case 5: return step(std::integral_constant<int, 5>{});
    case 6: return step(std::integral_constant<int, 6>{});
    default: return step(std::integral_constant<int, 8>{});
  }
}
}  // namespace

// Whether w is an image of this version of as many bytes as its header says.
inline bool is_image(const Image* w, int64_t bytes) {
  return bytes >= static_cast<int64_t>(sizeof(Image)) && w->magic == MAGIC && w->version == VERSION && w->bytes == bytes;
}
inline bool is_sparse(const Image* w) { return w->kept.units > 0; }
inline const uint32_t* codes_of(const Image* w, int64_t strip) {
  const int64_t words = w->blocks * w->bits * STRIP;
  return reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(w) + w->codes) + strip * words;
}
inline const uint16_t* scales_of(const Image* w) {
  return reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(w) + w->scales);
}
inline const uint8_t* zeros_of(const Image* w) {
  return w->symmetric ? nullptr : reinterpret_cast<const uint8_t*>(w) + w->zeros;
}
inline int64_t blocks_before(const Image* w, int64_t group) {  // per_oc; the last group may be shorter
  const int64_t before = group * w->group_blocks;
  return before < w->blocks ? before : w->blocks;
}
inline const int32_t* shares_of(const Image* w) {
  return reinterpret_cast<const int32_t*>(reinterpret_cast<const char*>(w) + w->kept.shares);
}
inline int64_t first_row(const Image* w, int64_t strip) {
  if (is_sparse(w)) return shares_of(w)[strip];
  return strip / w->group_strips * (w->per_ic ? w->group : 0) + strip % w->group_strips * STRIP;
}
inline int rows_in(const Image* w, int64_t strip) {
  if (is_sparse(w)) return shares_of(w)[strip + 1] - shares_of(w)[strip];
  const int64_t group_end = w->per_ic ? (strip / w->group_strips + 1) * w->group : w->n;
  const int64_t end = group_end < w->n ? group_end : w->n;
  const int64_t left = end - first_row(w, strip);
  return left < STRIP ? static_cast<int>(left) : STRIP;
}
// Inputs of block b: from first_input on, inputs_in of them (the rest is padding).
inline int64_t first_input(const Image* w, int64_t b) {
  return b / w->group_blocks * (w->per_ic ? 0 : w->group) + b % w->group_blocks * BLOCK;
}
inline int inputs_in(const Image* w, int64_t b) {
  const int64_t group_end = w->per_ic ? w->k : (b / w->group_blocks + 1) * w->group;
  const int64_t end = group_end < w->k ? group_end : w->k;
  const int64_t left = end - first_input(w, b);
  return left < BLOCK ? static_cast<int>(left) : BLOCK;
}
