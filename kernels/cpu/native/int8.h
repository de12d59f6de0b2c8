// The product with int8 activations in plain loops: the oracle of the VNNI kernel, and its stand-in.
#pragma once

#include "strips.h"

namespace {

template <int BITS>
void multiply_int8_plain(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  const int8_t* rows = static_cast<const int8_t*>(x.rows);
  const int64_t groups = w->per_ic ? 1 : w->groups;
  for (int64_t strip = from; strip < to; ++strip)
    for (int m = 0; m < x.m && m < y.rows; ++m) {
      const uint32_t* block = codes_of(w, strip);
      Totals<1> totals;
      const Inputs row{nullptr, x.sums + m * x.sums_stride, nullptr, 0, x.sums_stride, 1};
      for (int64_t g = 0; g < groups; ++g) {
        float sums[STRIP] = {};
        const int64_t end = w->per_ic ? w->blocks : blocks_before(w, g + 1);
        for (int64_t b = blocks_before(w, g); b < end; ++b, block += BITS * STRIP)
          for (int r = 0; r < STRIP; ++r) {
            int dot = 0;
            for (int i = 0; i < BLOCK; ++i) {
              const int k = quad_input(BITS, i / 4, i % 4);
              uint32_t code = block[low_vector(BITS, k) * STRIP + r] >> low_bit(BITS, k) & ((1u << low_width(BITS)) - 1);
              if (high_width(BITS)) {
                const uint32_t high = block[high_vector(BITS, k) * STRIP + r] >> high_bit(BITS, k);
                code |= (high & ((1u << high_width(BITS)) - 1)) << low_width(BITS);
              }
              dot += static_cast<int>(code) * rows[m * x.stride + b * BLOCK + i];
            }
            sums[r] += x.scales[m * w->blocks + b] * static_cast<float>(dot);
          }
        Floats products[1];
        __builtin_memcpy(products, sums, sizeof sums);
        totals.add_int8_group(w, row, strip, g, products);
      }
      const void* bias = static_cast<const char*>(y.bias) + 4 * m * y.bias_stride;
      const Outputs one{static_cast<char*>(y.y) + m * y.n * (y.type == FLOAT32 ? 4 : 2), bias, y.type, y.bias_type, y.n, 1};
      totals.store(w, one, strip);
    }
}

void multiply_int8(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  with_bits(w->bits, [&](auto bits) { multiply_int8_plain<bits>(w, x, y, from, to); });
}

}  // namespace
