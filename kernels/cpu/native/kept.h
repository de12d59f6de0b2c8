// The image of a weight of which whole groups are dropped: the groups that stay, row by row.
//
// A group is 1 or 2 units of 8 or 16 inputs, filled up where it is shorter. The image's strips are shares: runs of rows
// that hold about as many kept groups each, so that no thread waits for one that was given the fuller rows. A row is
// never cut: it holds a thousandth of a weight at most where there is enough to share. blocks: of a row of x, units
// side by side. x must be 0 where nothing is kept of a unit's 16 lanes: then what is read there does not matter.
//
// codes   [kept][units][unit * bits / 8] bytes; read up to READ_BEYOND bytes past their end
// scales  float16 [kept], zeros uint8 [kept]: read up to 15 past their end
// columns uint16 [kept]: which of its row's groups each is
// starts  int64 [n + 1]: the first kept group of each row
// shares  int32 [strips + 1]: the first row of each share
#pragma once

#include "image.h"

constexpr int UNIT = 16;  // lanes
constexpr int64_t READ_BEYOND = 64;

// A unit's codes are two little-endian streams, of their low_width lower bits and of the rest. Its lanes take the
// 32-bit words of the lower stream in turns, so that all words repeated through a register meet their inputs after one
// shift: lane i holds this input.
constexpr int lower_words(int bits) { return low_width(bits) / 2; }
constexpr int input_of_lane(int bits, int i) {
  return i % lower_words(bits) * (UNIT / lower_words(bits)) + i / lower_words(bits);
}
inline int64_t bytes_of_group(const Image* w) { return w->kept.units * w->kept.unit * w->bits / 8; }

template <typename T>
const T* at_offset(const Image* w, int64_t offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(w) + offset);
}
inline const uint8_t* kept_codes(const Image* w) { return at_offset<uint8_t>(w, w->codes); }
inline const uint16_t* kept_columns(const Image* w) { return at_offset<uint16_t>(w, w->kept.columns); }
inline const int64_t* row_starts(const Image* w) { return at_offset<int64_t>(w, w->kept.starts); }
