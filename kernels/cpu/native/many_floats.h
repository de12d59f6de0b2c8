// Products of many rows of float activations: codes become weights once, part by part, and meet all rows of a slab while the
// first cache holds them. Included after wide.h, once for each instruction set with up to 8 lanes.
#pragma once

#include "fields.h"
#include "float_rows.h"
#include "scratch.h"

namespace {

constexpr int64_t MANY_FROM = 17;  // rows: at 16, codes that are decoded for every six are level
constexpr int64_t MANY_DEPTH = 8;  // blocks of a part: 16 KB of weights, half of the smallest first cache
constexpr int64_t PART_FLOATS = MANY_DEPTH * BLOCK * STRIP;

thread_local Scratch many_scratch;

// Makes weights [inputs][16] of a strip's blocks.
template <int BITS>
class WeightMaker {
  static constexpr int WIDTH = field_width(BITS), PLACES = count_of_places(BITS);

 public:
  explicit WeightMaker(const Image* w) : w_(w) {}
  template <bool PER_IC>
  void make(int64_t strip, int64_t first, int64_t count, float* out) {
    const uint32_t* codes = codes_of(w_, strip) + first * BITS * STRIP;
    for (int64_t b = first; b < first + count; ++b, codes += BITS * STRIP, out += BLOCK * STRIP) {
      if (PER_IC) load_inputs(strip, b);
      else if (b == first || b % w_->group_blocks == 0) load_group(strip, b);
      const uint32_t* block[1] = {codes};
      for_each_field<BITS>(block, [&](int n, int k, int, const Floats& fields) INLINE_LAMBDA {
        const int place = place_of_field(BITS, n % fields_in_word(BITS)) / WIDTH;
        store_floats(PER_IC ? multiply_add(fields, input_scales_[k], all(input_offsets_[k]))
                            : multiply_add(fields, scales_[place], offsets_), out + k * STRIP);
      });
    }
  }

 private:
  // A code in its field times the scale of its place, plus the offset, is a weight.
  INLINE_MEMBER void load_group(int64_t strip, int64_t block) {
    const int64_t at = (strip * w_->groups + block / w_->group_blocks) * STRIP;
    const Floats own = load_float16(scales_of(w_) + at);
    offsets_ = load_offsets(w_, at, 0);
    for (int p = 0; p < PARTS; ++p) {
      offsets_.part[p] *= own.part[p];
      for (int i = 0; i < PLACES; ++i) scales_[i].part[p] = own.part[p] * (1.0f / static_cast<float>(1 << i * WIDTH));
    }
  }
  // Scales and zeros of inputs, and the same for all outputs of a strip.
  INLINE_MEMBER void load_inputs(int64_t strip, int64_t block) {
    const int64_t at = (strip / w_->group_strips * w_->blocks + block) * BLOCK;
    for (int k = 0; k < BLOCK; k += STRIP) {
      const Floats own = load_float16(scales_of(w_) + at + k);
      const Floats zeros = load_offsets(w_, at + k, 0);
      store_floats(multiplied(zeros, own), input_offsets_ + k);
      store_floats(multiplied(load_floats(factors_.of + k), own), input_scales_ + k);
    }
  }

  const Image* w_;
  const FieldFactors<BITS> factors_;
  Floats scales_[PLACES], offsets_;
  float input_scales_[BLOCK], input_offsets_[BLOCK];
};

template <int BITS>
void multiply_many_bits(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  const int64_t side = x.m * STRIP;
  float* weights = reinterpret_cast<float*>(many_scratch.at_least(static_cast<size_t>(4 * (PART_FLOATS + (to - from) * side))));
  float* sums = weights + PART_FLOATS;
  WeightMaker<BITS> maker(w);
  for (int64_t b = 0; b < w->blocks; b += MANY_DEPTH) {
    const int64_t count = b + MANY_DEPTH < w->blocks ? MANY_DEPTH : w->blocks - b;
    for (int64_t strip = from; strip < to; ++strip) {
      w->per_ic ? maker.template make<true>(strip, b, count, weights) : maker.template make<false>(strip, b, count, weights);
      add_all_rows(x.m, static_cast<const float*>(x.rows) + b * BLOCK, x.stride, weights, count * BLOCK,
                   sums + (strip - from) * side, b == 0);
    }
  }
  for (int64_t strip = from; strip < to; ++strip)
    for (int m = 0; m < y.rows; ++m)
      store_row(y, m, first_row(w, strip), rows_in(w, strip), load_floats(sums + (strip - from) * side + m * STRIP));
}

void multiply_many(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  with_bits(w->bits, [&](auto bits) { multiply_many_bits<bits>(w, x, y, from, to); });
}

}  // namespace
