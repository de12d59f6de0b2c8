// Little-endian bit fields, as the file format stores codes and zeros.
#pragma once

#include <cstdint>

// Number i of a row of fields; reads no byte past the row's last field.
inline unsigned field(const uint8_t* row, int bits, int64_t i) {
  const int64_t bit = i * bits;
  const int shift = static_cast<int>(bit % 8);
  unsigned value = row[bit / 8] >> shift;
  if (shift + bits > 8) value |= static_cast<unsigned>(row[bit / 8 + 1]) << (8 - shift);
  return value & ((1u << bits) - 1);
}

// A row's fields as bytes: eight fields at a time are `bits` whole bytes.
inline void unpack_row(const uint8_t* row, int bits, int64_t count, uint8_t* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8, row += bits) {
    uint64_t word = 0;
    for (int b = 0; b < bits; ++b) word |= static_cast<uint64_t>(row[b]) << (8 * b);
    for (int j = 0; j < 8; ++j) out[i + j] = static_cast<uint8_t>(word >> (bits * j) & ((1u << bits) - 1));
  }
  for (int64_t j = 0; i + j < count; ++j) out[i + j] = static_cast<uint8_t>(field(row, bits, j));
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
