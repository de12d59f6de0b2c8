// Products of more rows of bfloat16 than a tile has: weights rounded to bfloat16, as torch's matmul would have them, and
// then multiplied with all rows of a slab. Included by avx512_amx.cpp.
#pragma once

#include "pairs.h"
#include "tile_register.h"

namespace {

constexpr int64_t DEPTH = 8;  // blocks of inputs at once: two strips of tiles, and the next two, are 32 KB then

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

// Up to DEPTH blocks of one or two strips: what is made into tiles and multiplied at once.
struct Part {
  int64_t strip, from, blocks;
  int side;
};

// Makes the tiles of the next part, (code - zero) * scale, block by block between the products of the one before.
template <int BITS>
class Maker {
 public:
  explicit Maker(const Image* w) : w_(w), decode_(w->mid) {
    uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
    together_ = _mm512_loadu_si512(order);
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
    const int64_t b = part_.from + number, strip = part_.strip + side, at = (strip * w_->groups + b / w_->group_blocks) * STRIP;
    const uint32_t* block = codes_of(w_, strip) + b * BITS * STRIP;
    const __m512 scales = load_float16(scales_of(w_) + at).part[0];
    const __m512 raised = w_->symmetric ? _mm512_set1_ps(static_cast<float>(-decode_.base - w_->mid)) : load_offsets(zeros_of(w_) + at, -decode_.base).part[0];
    const __m512 offsets = _mm512_mul_ps(raised, scales);
    char* tile = tiles_ + (side * DEPTH + number) * TILE_BYTES;
    for (int v = 0; v < BITS; ++v) _mm_prefetch(reinterpret_cast<const char*>(block + (16 * BITS + v) * STRIP), _MM_HINT_T0);
    unrolled<BLOCK / 2>([&](auto pair) INLINE_LAMBDA {
      constexpr int k = 2 * pair;
      const EvenOdd codes = codes_of_pair(decode_, block, k);
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_fmadd_ps(codes.odd, scales, offsets), _mm512_fmadd_ps(codes.even, scales, offsets));
      _mm512_store_si512(tile + pair * VECTOR, _mm512_permutexvar_epi16(together_, (__m512i)both));
    });
  }

  const Image* w_;
  RaisedPairs<BITS> decode_;
  __m512i together_;
  Part part_{};
  char* tiles_ = nullptr;
  int64_t steps_ = 1, done_ = 0, due_ = 0;
};

// One or two tiles of rows, TILE_BYTES for each block, with one or two strips: sums += x times `count` tiles of weights.
// far: bytes from one tile of rows to the next; side: floats from the sums of one strip to those of the other.
template <int ROWS, int SIDE, typename Between>
INLINE void add_tiles(const char* x, int64_t far, const char* tiles, int64_t count, float* sums, int64_t side, bool first, Between between) {
  if (first) {
    _tile_zero(0);
    if (SIDE > 1) _tile_zero(1);
    if (ROWS > 1) _tile_zero(2);
    if (ROWS > 1 && SIDE > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, VECTOR);
    if (SIDE > 1) _tile_loadd(1, sums + side, VECTOR);
    if (ROWS > 1) _tile_loadd(2, sums + TILE_FLOATS, VECTOR);
    if (ROWS > 1 && SIDE > 1) _tile_loadd(3, sums + side + TILE_FLOATS, VECTOR);
  }
  for (int64_t b = 0; b < count; ++b, x += TILE_BYTES, tiles += TILE_BYTES) {
    _tile_loadd(4, x, VECTOR);
    _tile_loadd(6, tiles, VECTOR);
    _tile_dpbf16ps(0, 4, 6);
    if (SIDE > 1) {
      _tile_loadd(7, tiles + DEPTH * TILE_BYTES, VECTOR);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (ROWS > 1) {
      _tile_loadd(5, x + far, VECTOR);
      _tile_dpbf16ps(2, 5, 6);
      if (SIDE > 1) _tile_dpbf16ps(3, 5, 7);
    }
    between();
  }
  _tile_stored(0, sums, VECTOR);
  if (SIDE > 1) _tile_stored(1, sums + side, VECTOR);
  if (ROWS > 1) _tile_stored(2, sums + TILE_FLOATS, VECTOR);
  if (ROWS > 1 && SIDE > 1) _tile_stored(3, sums + side + TILE_FLOATS, VECTOR);
}

template <int SIDE, typename Between>
void add_rows(const Image* w, const Inputs& x, const Part& part, const char* tiles, float* sums, Between between) {
  const char* rows = static_cast<const char*>(x.rows) + part.from * TILE_BYTES;
  const int64_t row_tiles = tiles_of(x.m), far = w->blocks * TILE_BYTES, side = row_tiles * TILE_FLOATS;
  const bool first = part.from == 0;
  int64_t t = 0;
  for (; t + 2 <= row_tiles; t += 2)
    add_tiles<2, SIDE>(rows + t * far, far, tiles, part.blocks, sums + t * TILE_FLOATS, side, first, between);
  if (t < row_tiles) add_tiles<1, SIDE>(rows + t * far, far, tiles, part.blocks, sums + t * TILE_FLOATS, side, first, between);
}

template <int BITS>
void multiply_many_bits(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  const int64_t side = tiles_of(x.m) * TILE_FLOATS, pairs = (to - from + 1) / 2, parts = (w->blocks + DEPTH - 1) / DEPTH * pairs;
  const size_t tiles_bytes = 2 * DEPTH * TILE_BYTES;
  char* tiles = tile_scratch.at_least(2 * tiles_bytes + static_cast<size_t>(4 * (to - from) * side));
  float* sums = reinterpret_cast<float*>(tiles + 2 * tiles_bytes);
  const auto part_at = [&](int64_t i) {
    const int64_t b = i / pairs * DEPTH, strip = from + i % pairs * 2;
    return Part{strip, b, b + DEPTH < w->blocks ? DEPTH : w->blocks - b, strip + 1 < to ? 2 : 1};
  };
  const TilesInUse tiles_in_use(TILE_ROWS);
  Maker<BITS> maker(w);
  maker.begin(part_at(0), tiles, 1);
  for (int64_t i = 0; i < parts; ++i) {
    maker.finish();
    before_tiles_read();
    const Part part = part_at(i);
    const char* made = tiles + i % 2 * tiles_bytes;
    const int64_t steps = (tiles_of(x.m) + 1) / 2 * part.blocks;
    maker.begin(i + 1 < parts ? part_at(i + 1) : Part{0, 0, 0, 0}, tiles + (i + 1) % 2 * tiles_bytes, steps);
    float* own = sums + (part.strip - from) * side;
    const auto between = [&] { maker.step(); };
    part.side == 2 ? add_rows<2>(w, x, part, made, own, between) : add_rows<1>(w, x, part, made, own, between);
  }
  for (int64_t strip = from; strip < to; ++strip)
    for (int m = 0; m < y.rows; ++m) {
      const Floats row{{_mm512_loadu_ps(sums + (strip - from) * side + m * STRIP)}};
      store_row(y, m, first_row(w, strip), rows_in(w, strip), row);
    }
}

void multiply_many(const Image* w, const Inputs& x, const Outputs& y, int64_t from, int64_t to) {
  switch (w->bits) {
    case 2: return multiply_many_bits<2>(w, x, y, from, to);
    case 3: return multiply_many_bits<3>(w, x, y, from, to);
    case 4: return multiply_many_bits<4>(w, x, y, from, to);
    case 5: return multiply_many_bits<5>(w, x, y, from, to);
    case 6: return multiply_many_bits<6>(w, x, y, from, to);
    default: return multiply_many_bits<8>(w, x, y, from, to);
  }
}

}  // namespace
