// The image of a weight of which whole groups are dropped: the groups that stay.
//
// The rows of a strip of 16 are put in order of how many groups they keep, and go four at a time: a slot for a group of
// each, then for the next group of each, until the fullest has no more. What is left over for the others are empty
// slots, which are few since the four are alike: their scale is 0, and they meet inputs after a row's last, which are 0.
// So four sums run beside each other, and rows end together.
//
// The image's `strips` are shares: runs of such strips with about as many slots each, so that no thread waits for one
// that was given the fuller rows. `blocks`: of a row of x, units side by side.
//
// A group is 1 or 2 units of 8 or 16 inputs, filled up where it is shorter. x must be 0 in those of a unit's 16 lanes
// that hold no input: then what is read there does not matter.
//
// codes   [slots][units][unit * bits / 8] bytes; read up to READ_BEYOND bytes past their end
// scales  float16 [slots], zeros uint8 [slots]: read up to 15 past their end
// places  uint16 [slots]: where its group of x starts, in steps of PLACE bytes: a load can take it as it is
// order   uint8 [fours][4]: which of its strip's 16 rows each is
// starts  int64 [fours + 1]: the first slot of each four rows
// shares  int32 [strips + 1]: the first row of each share
#pragma once

#include "image.h"

constexpr int UNIT = 16;  // lanes
constexpr int FOUR = 4;   // rows beside each other
constexpr int64_t READ_BEYOND = 64;
constexpr int64_t PLACE = 8;

// A unit's codes are two little-endian streams, of their low_width lower bits and of the rest. Its lanes take the
// 32-bit words of the lower stream in turns, so that all words repeated through a register meet their inputs after one
// shift: lane i holds this input.
constexpr int lower_words(int bits) { return low_width(bits) / 2; }
constexpr int input_of_lane(int bits, int i) {
  return i % lower_words(bits) * (UNIT / lower_words(bits)) + i / lower_words(bits);
}
// Whether two slots fill a register of 32 bfloat16 (kept_bfloat16.h).
inline bool fits_pairs(const Image* w) { return w->bits == 4 && w->group == UNIT; }
inline int64_t bytes_of_group(const Image* w) { return w->kept.units * w->kept.unit * w->bits / 8; }

template <typename T>
const T* at_offset(const Image* w, int64_t offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(w) + offset);
}
inline const uint8_t* kept_codes(const Image* w) { return at_offset<uint8_t>(w, w->codes); }
inline const uint16_t* places_of(const Image* w) { return at_offset<uint16_t>(w, w->kept.places); }
constexpr int64_t places_of_units(int64_t units) { return units * UNIT * 4 / PLACE; }
inline int64_t places_of_group(const Image* w) { return places_of_units(w->kept.units); }
inline const uint8_t* row_order(const Image* w) { return at_offset<uint8_t>(w, w->kept.order); }
inline const int64_t* starts_of_fours(const Image* w) { return at_offset<int64_t>(w, w->kept.starts); }

// Asks for the sixteen slots from here on, some while before they are read. Four streams, each short, are more than
// processors foresee: without, one row of bfloat16 and 11008 inputs takes 1.6 times as long. 512 slots are as good as
// 256 at 4096 inputs and better at 11008; 1024 take a tenth longer.
constexpr int64_t AHEAD = 512;
template <int BYTES>  // of a group, or more
inline __attribute__((always_inline)) void fetch_slots(const Image* w, int64_t slot, int64_t bytes) {
  const uint8_t* codes = kept_codes(w) + (slot + AHEAD) * bytes;
  for (int at = 0; at < UNIT * BYTES; at += VECTOR) __builtin_prefetch(codes + at);
  if (slot & UNIT) return;
  __builtin_prefetch(at_offset<uint16_t>(w, w->scales) + slot + AHEAD);
  __builtin_prefetch(places_of(w) + slot + AHEAD);
  if (!w->symmetric) __builtin_prefetch(zeros_of(w) + slot + AHEAD);
}
