// Weights rounded to bfloat16, as torch's matmul would have them, in pairs: two inputs of 16 outputs in a vector, a tile of
// TILE_ROWS vectors for a block. Made once for all rows of a slab, part by part. Included with AVX-512 and its bfloat16.
#pragma once

#include "pairs.h"
#include "tiles.h"

namespace {

struct EvenOdd { __m512 even, odd; };

// Two codes of each row plus the base of `decode` as floats.
template <int BITS>
INLINE EvenOdd codes_of_pair(const RaisedPairs<BITS>& decode, const uint32_t* block, int k) {
  const Words low = load_words(block + low_vector(BITS, k) * STRIP);
  const int at = low_bit(BITS, k);
  if constexpr (BITS == 8) {
    const IntLanes even = reinterpret_cast<IntLanes>(low.part[0] >> at & 0xff), odd = reinterpret_cast<IntLanes>(low.part[0] >> (at + 16) & 0xff);
    return {__builtin_convertvector(even - decode.mid, FloatLanes), __builtin_convertvector(odd - decode.mid, FloatLanes)};
  } else {
    const Words high = high_width(BITS) ? load_words(block + high_vector(BITS, k) * STRIP) : Words{};
    const __m512i pair = decode(low, high, at, high_bit(BITS, k));
    const __m512i upper_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), _mm512_castsi512_ps(_mm512_and_si512(pair, upper_half))};
  }
}

// Blocks [from, from + blocks) of one or two strips: what is made into tiles and multiplied at once.
struct Part {
  int64_t strip, from, blocks;
  int side;
};
// Number `i` of the parts of strips [from, to): `depth` blocks of all strips before the next blocks of any.
inline Part part_of(const Image* w, int64_t from, int64_t to, int64_t depth, int64_t i) {
  const int64_t pairs = (to - from + 1) / 2, b = i / pairs * depth, strip = from + i % pairs * 2;
  return {strip, b, b + depth < w->blocks ? depth : w->blocks - b, strip + 1 < to ? 2 : 1};
}
inline int64_t parts_of(const Image* w, int64_t from, int64_t to, int64_t depth) {
  return (w->blocks + depth - 1) / depth * ((to - from + 1) / 2);
}

// Makes the tiles of a part, [side][DEPTH], (code - zero) * scale: at once, or block by block between other products.
template <int BITS, int64_t DEPTH>
class Maker {
 public:
  explicit Maker(const Image* w) : w_(w), decode_(w->mid) {
    uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
    together_ = _mm512_loadu_si512(order);
  }
  void make_all(const Part& part, char* tiles) {
    begin(part, tiles, 1);
    finish();
  }
  // `steps` calls of step() will follow, and share the work evenly.
  void begin(const Part& part, char* tiles, int64_t steps) {
    part_ = part, tiles_ = tiles, steps_ = steps, done_ = due_ = 0;
  }
  INLINE_MEMBER void step() {
    due_ += part_.side * part_.blocks;
    for (; due_ >= steps_; due_ -= steps_) make(done_ / part_.blocks, done_ % part_.blocks), ++done_;
  }
  void finish() {
    due_ = 0;
    for (; done_ < part_.side * part_.blocks; ++done_) make(done_ / part_.blocks, done_ % part_.blocks);
  }

 private:
  INLINE_MEMBER void make(int64_t side, int64_t number) {
    const int64_t b = part_.from + number, strip = part_.strip + side;
    char* tile = tiles_ + (side * DEPTH + number) * TILE_ROWS * VECTOR;
    w_->per_ic ? make_per_ic(strip, b, tile) : make_per_oc(strip, b, tile);
  }
  INLINE_MEMBER void make_per_oc(int64_t strip, int64_t b, char* tile) {
    const int64_t at = (strip * w_->groups + b / w_->group_blocks) * STRIP;
    const __m512 scales = load_float16(scales_of(w_) + at).part[0];
    const __m512 offsets = _mm512_mul_ps(raised_zeros(at), scales);
    make_pairs(strip, b, tile, [&](const EvenOdd& codes, int) INLINE_LAMBDA {
      return _mm512_cvtne2ps_pbh(_mm512_fmadd_ps(codes.odd, scales, offsets), _mm512_fmadd_ps(codes.even, scales, offsets));
    });
  }
  // Scales and zeros of inputs, and the same for all outputs of a strip.
  INLINE_MEMBER void make_per_ic(int64_t strip, int64_t b, char* tile) {
    const int64_t at = (strip / w_->group_strips * w_->blocks + b) * BLOCK;
    alignas(VECTOR) float scales[BLOCK], offsets[BLOCK];
    for (int i = 0; i < BLOCK; i += STRIP) {
      const __m512 sixteen = load_float16(scales_of(w_) + at + i).part[0];
      _mm512_store_ps(scales + i, sixteen);
      _mm512_store_ps(offsets + i, _mm512_mul_ps(raised_zeros(at + i), sixteen));
    }
    make_pairs(strip, b, tile, [&](const EvenOdd& codes, int k) INLINE_LAMBDA {
      const __m512 even = _mm512_fmadd_ps(codes.even, _mm512_set1_ps(scales[k]), _mm512_set1_ps(offsets[k]));
      return _mm512_cvtne2ps_pbh(_mm512_fmadd_ps(codes.odd, _mm512_set1_ps(scales[k + 1]), _mm512_set1_ps(offsets[k + 1])), even);
    });
  }
  // What makes codes plus the base codes less their zeros.
  INLINE_MEMBER __m512 raised_zeros(int64_t at) const {
    if (w_->symmetric) return _mm512_set1_ps(static_cast<float>(-decode_.base - w_->mid));
    return load_offsets(zeros_of(w_) + at, -decode_.base).part[0];
  }
  // weights(codes, k) of inputs k and k + 1: those of odd inputs, then those of even ones.
  template <typename Weights>
  INLINE_MEMBER void make_pairs(int64_t strip, int64_t b, char* tile, Weights weights) {
    const uint32_t* block = codes_of(w_, strip) + b * BITS * STRIP;
    for (int v = 0; v < BITS; ++v) _mm_prefetch(reinterpret_cast<const char*>(block + (16 * BITS + v) * STRIP), _MM_HINT_T0);
    unrolled<BLOCK / 2>([&](auto pair) INLINE_LAMBDA {
      constexpr int k = 2 * pair;
      const __m512i both = (__m512i)weights(codes_of_pair(decode_, block, k), k);
      _mm512_store_si512(tile + pair * VECTOR, _mm512_permutexvar_epi16(together_, both));
    });
  }

  const Image* w_;
  RaisedPairs<BITS> decode_;
  __m512i together_;
  Part part_{};
  char* tiles_ = nullptr;
  int64_t steps_ = 1, done_ = 0, due_ = 0;
};

}  // namespace
