// Little-endian bit fields, as the file format stores codes and zeros.
#pragma once

#include <cstdint>
#include <cstring>

// Number i of a row of fields; reads no byte past the row's last field.
inline unsigned field(const uint8_t* row, int bits, int64_t i) {
  const int64_t bit = i * bits;
  const int shift = static_cast<int>(bit % 8);
  unsigned value = row[bit / 8] >> shift;
  if (shift + bits > 8) value |= static_cast<unsigned>(row[bit / 8 + 1]) << (8 - shift);
  return value & ((1u << bits) - 1);
}

// Eight fields, the lowest first, as the bytes of a word: halves move apart, then their halves, then theirs.
template <int BITS>
inline uint64_t in_bytes(uint64_t fields) {
  constexpr uint64_t FOUR = (uint64_t{1} << 4 * BITS) - 1, TWO = ((uint64_t{1} << 2 * BITS) - 1) * 0x0000000100000001u;
  constexpr uint64_t ONE = ((uint64_t{1} << BITS) - 1) * 0x0001000100010001u;
  fields = (fields & FOUR) | (fields >> 4 * BITS & FOUR) << 32;
  fields = (fields & TWO) | (fields >> 2 * BITS & TWO) << 16;
  return (fields & ONE) | (fields >> BITS & ONE) << 8;
}

template <int BITS>
inline void unpack_eights(const uint8_t* row, int64_t eights, uint8_t* out) {
  for (int64_t i = 0; i < eights; ++i) {
    uint64_t word = 0;
    std::memcpy(&word, row + i * BITS, BITS);
    word = in_bytes<BITS>(word);
    std::memcpy(out + 8 * i, &word, sizeof word);
  }
}

// A row's fields as bytes: eight fields at a time are `bits` whole bytes.
inline void unpack_row(const uint8_t* row, int bits, int64_t count, uint8_t* out) {
  const int64_t eights = count / 8;
  switch (bits) {
    case 2: unpack_eights<2>(row, eights, out); break;
    case 3: unpack_eights<3>(row, eights, out); break;
    case 4: unpack_eights<4>(row, eights, out); break;
    case 5: unpack_eights<5>(row, eights, out); break;
    case 6: unpack_eights<6>(row, eights, out); break;
    case 7: unpack_eights<7>(row, eights, out); break;
    default: std::memcpy(out, row, static_cast<size_t>(8 * eights));
  }
  for (int64_t i = 8 * eights; i < count; ++i) out[i] = static_cast<uint8_t>(field(row, bits, i));
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
