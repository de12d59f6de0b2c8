// Products with tiles of trellis codes, which the loops read as they are stored. One row of x meets the integers as they are
// decoded; for more, a part of a tile is decoded to floats once, and all rows meet it while the first cache holds it.
// Included after wide.h, once for each instruction set.
#pragma once

#include "float_rows.h"
#include "trellis_lanes.h"

namespace {

constexpr float MIDDLE = static_cast<float>(trellis::MIDDLE);

INLINE Floats centred(const Floats& integers) { return CENTRED ? integers : add(integers, all(-MIDDLE)); }

INLINE int64_t first_of(const trellis::Stored* w, int64_t tile, int strip) { return tile * w->tile + strip * STRIP; }
INLINE int rows_from(const trellis::Stored* w, int64_t row) { return w->n - row < STRIP ? static_cast<int>(w->n - row) : STRIP; }

INLINE Floats scales_from(const trellis::Stored* w, int64_t row, int count) {
  if (count == STRIP) return load_float16(w->scales + row);
  uint16_t own[STRIP] = {};
  __builtin_memcpy(own, w->scales + row, static_cast<size_t>(2 * count));
  return load_float16(own);
}

// sums: [strip][rows][16], of x times integers; totals: of x, where these are not centred.
__attribute__((noinline)) void store_sums(const trellis::Stored* w, const Outputs& y, int64_t tile, const float* sums,
                                          const float* totals) {
  for (int s = 0; s < w->tile / STRIP && first_of(w, tile, s) < w->n; ++s) {
    const int64_t row = first_of(w, tile, s);
    const int count = rows_from(w, row);
    const Floats scales = scales_from(w, row, count);
    for (int m = 0; m < y.rows; ++m) {
      const Floats middle = all(totals ? -MIDDLE * totals[m] : 0);
      store_row(y, m, row, count, multiplied(add(load_floats(sums + (s * y.rows + m) * STRIP), middle), scales));
    }
  }
}

// sums [strip][16] of one row of x.
template <int BITS, int HEIGHT>
__attribute__((noinline)) void multiply_row(const trellis::Stored* w, const Inputs& x, int64_t tile, float* sums) {
  using W = Walk<BITS, HEIGHT>;
  const float* row = static_cast<const float*>(x.rows);
  const uint8_t* column = w->codes + tile * w->k * W::BYTES;
  Floats own[W::STRIPS];
  for (Floats& sum : own) sum = all(0);
  for (int64_t k = 0; k < w->k; ++k, column += W::BYTES)
    for_each_strip<BITS, HEIGHT, 1>(column, [&](auto s, const Words (&bytes)[1]) INLINE_LAMBDA {
      own[s] = multiply_add(integers_of(bytes[0]), row[k], own[s]);
    });
  unrolled<W::STRIPS>([&](auto s) INLINE_LAMBDA { store_floats(own[s], sums + s * STRIP); });
}

// Integers of columns [from, from + count) of a tile, centred where CENTRED: [strip][count][16].
template <int BITS, int HEIGHT>
__attribute__((noinline)) void decode(const trellis::Stored* w, int64_t tile, int64_t from, int64_t count, float* out) {
  using W = Walk<BITS, HEIGHT>;
  const uint8_t* column = w->codes + (tile * w->k + from) * W::BYTES;
  for (int64_t k = 0; k < count; ++k, column += W::BYTES)
    for_each_strip<BITS, HEIGHT, 1>(column, [&](auto s, const Words (&bytes)[1]) INLINE_LAMBDA {
      store_floats(integers_of(bytes[0]), out + (s * count + k) * STRIP);
    });
}

// Calls visit with the two constants of a weight: bits, and an eighth of the tile.
template <typename Visit>
INLINE void with_walk(const trellis::Stored* w, Visit visit) {
  unrolled<trellis::MOST_BITS>([&](auto bits) INLINE_LAMBDA {
    unrolled<5>([&](auto sixteens) INLINE_LAMBDA {
      constexpr int BITS = decltype(bits)::value + 1, HEIGHT = 4 + 2 * decltype(sixteens)::value;
      if (w->bits == BITS && w->tile == 8 * HEIGHT)
        visit(std::integral_constant<int, BITS>{}, std::integral_constant<int, HEIGHT>{});
    });
  });
}

void decode_part(const trellis::Stored* w, int64_t tile, int64_t from, int64_t count, float* out) {
  with_walk(w, [&](auto bits, auto height) INLINE_LAMBDA { decode<bits, height>(w, tile, from, count, out); });
}

void multiply_rows(const trellis::Stored* w, const Inputs& x, int64_t tile, float* integers, float* sums) {
  const int64_t strips = w->tile / STRIP, depth = trellis::PART_VALUES / w->tile, side = x.m * STRIP;
  for (int64_t k = 0; k < w->k; k += depth) {
    const int64_t count = w->k - k < depth ? w->k - k : depth;
    decode_part(w, tile, k, count, integers);
    for (int64_t s = 0; s < strips; ++s)
      add_all_rows(x.m, static_cast<const float*>(x.rows) + k, x.stride, integers + s * count * STRIP, count, sums + s * side, k == 0);
  }
}

void multiply_trellis(const trellis::Stored* w, const Inputs& x, const Outputs& y, int64_t tile, float* workspace) {
  float* sums = workspace + trellis::PART_VALUES;
  if (x.m > 1) multiply_rows(w, x, tile, workspace, sums);
  else with_walk(w, [&](auto bits, auto height) INLINE_LAMBDA { multiply_row<bits, height>(w, x, tile, sums); });
  store_sums(w, y, tile, sums, CENTRED ? nullptr : x.sums);
}

void unpack_trellis(const trellis::Stored* w, int64_t tile, char* out, Type type, int64_t stride, float* workspace) {
  const int64_t size = type == FLOAT32 ? 4 : 2, depth = trellis::PART_VALUES / w->tile;
  for (int64_t from = 0; from < w->k; from += depth) {
    const int64_t columns = w->k - from < depth ? w->k - from : depth;
    decode_part(w, tile, from, columns, workspace);
    for (int s = 0; s < w->tile / STRIP && first_of(w, tile, s) < w->n; ++s) {
      const int64_t row = first_of(w, tile, s);
      const int count = rows_from(w, row);
      const Floats scales = scales_from(w, row, count);
      for (int64_t k = 0; k < columns; ++k) {
        char rounded[4 * STRIP];
        char* to = out + ((from + k) * stride + s * STRIP) * size;
        const Floats integers = centred(load_floats(workspace + (s * columns + k) * STRIP));
        round_to(type, multiplied(integers, scales), count == STRIP ? to : rounded);
        if (count < STRIP) __builtin_memcpy(to, rounded, static_cast<size_t>(count * size));
      }
    }
  }
}

float load_plain(const void* x, Type type, int64_t k, float* row) {
  Floats sums = all(0);
  const char* from = static_cast<const char*>(x);
  const int64_t size = type == FLOAT32 ? 4 : 2;
  int64_t i = 0;
  for (; i + STRIP <= k; i += STRIP) {
    const Floats values = load_from(type, from + i * size);
    store_floats(values, row + i);
    sums = add(sums, values);
  }
  float lanes[STRIP], sum = 0;
  store_floats(sums, lanes);
  for (float lane : lanes) sum += lane;
  for (; i < k; ++i) sum += row[i] = load_as_float(x, type, i);
  return sum;
}

}  // namespace
