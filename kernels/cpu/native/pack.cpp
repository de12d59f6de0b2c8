#include "pack.h"

#include <cstring>
#include <vector>

#include "bits.h"
#include "threads.h"

namespace {

// A block of a strip takes up to 512 bytes of codes and 96 of scales and zeros: MOST_BLOCKS of them fit 64 bits.
constexpr int64_t LARGEST_SIDE = int64_t{1} << 31, MOST_BLOCKS = int64_t{1} << 50;

int64_t aligned(int64_t bytes) { return divide_up(bytes, VECTOR) * VECTOR; }

struct Packing {
  const Image* w;
  int stored_bits;
  const uint8_t *codes, *zeros;
  const uint16_t* scales;
  char* image;
};

// The inputs of a block. Found once for a strip: two divisions take longer than packing a row's block.
struct Run {
  int64_t first;
  int count;
};

// Four fields of `bits`, the lowest of each 16 bits of a word, side by side.
inline uint32_t side_by_side(uint64_t fields, int bits) {
  const int step = 16 - bits;
  return static_cast<uint32_t>(fields | fields >> step | fields >> 2 * step | fields >> 3 * step) & ((1u << 4 * bits) - 1);
}
// The same of even bytes' fields in the lower and of odd bytes' in the upper half of a word.
inline uint32_t in_halves(uint64_t bytes, int bits) {
  const uint64_t first = 0x0001000100010001u * ((1u << bits) - 1);
  return side_by_side(bytes & first, bits) | side_by_side(bytes >> 8 & first, bits) << 16;
}
// The four upper parts of each half moved to the fields (image.h) that they belong to: two and two side by side.
inline uint32_t by_fields(uint32_t halves, int bits, int field) {
  const uint32_t lower = 0x00010001u * ((1u << 2 * bits) - 1);
  return (halves & lower) | (halves & lower << 2 * bits) << (field - 2 * bits);
}

// Codes of inputs 8 j to 8 j + 7 of a block, a byte each, into their places (image.h) in the words of a row.
template <int BITS>
inline void place_eight(uint64_t codes, int j, uint32_t* words) {
  constexpr int LOW = low_width(BITS), HIGH = high_width(BITS);
  if constexpr (LOW == 8) {
    for (int half = 0; half < 2; ++half, codes >>= 32)
      words[2 * j + half] = static_cast<uint32_t>((codes & 0xff0000ff) | (codes >> 8 & 0xff00) | (codes & 0xff00) << 8);
  } else {
    constexpr int EIGHTS = inputs_in_vector(BITS) / 8;  // in a vector
    const int vector = j / EIGHTS, byte = j % EIGHTS;
    words[vector] |= in_halves(codes, LOW) << 8 * byte;
    if constexpr (HIGH > 0) {
      const uint32_t upper = by_fields(in_halves(codes >> LOW, HIGH), HIGH, field_width(BITS));
      const int shift = vector % high_share(BITS) * joints(BITS) * HIGH;
      words[LOW + vector / high_share(BITS)] |= upper << 8 * byte << shift;
    }
  }
}

// One row of a strip into its words of every vector.
template <int BITS>
void place_row(const std::vector<Run>& blocks, const uint8_t* codes, uint32_t* strip_words) {
  for (const Run& block : blocks) {
    const uint8_t* inputs = codes + block.first;
    uint8_t padded[BLOCK] = {};
    if (block.count < BLOCK) inputs = static_cast<uint8_t*>(std::memcpy(padded, inputs, static_cast<size_t>(block.count)));
    uint32_t words[BITS] = {};
#pragma GCC unroll 4
    for (int j = 0; j < BLOCK / 8; ++j) {
      uint64_t eight;
      std::memcpy(&eight, inputs + 8 * j, sizeof eight);
      place_eight<BITS>(eight, j, words);
    }
    for (int v = 0; v < BITS; ++v) strip_words[v * STRIP] = words[v];
    strip_words += BITS * STRIP;
  }
}

void place(int bits, const std::vector<Run>& blocks, const uint8_t* codes, uint32_t* words) {
  with_bits(bits, [&](auto width) { place_row<width>(blocks, codes, words); });
}

void pack_strip(void* context, int64_t strip) {
  const Packing& job = *static_cast<const Packing*>(context);
  const Image* w = job.w;
  const int64_t row_bytes = divide_up(w->k * job.stored_bits, 8), strip_words = w->blocks * w->bits * STRIP;
  const int64_t zero_bytes = divide_up(w->groups * job.stored_bits, 8);
  uint32_t* words = reinterpret_cast<uint32_t*>(job.image + w->codes) + strip * strip_words;
  uint16_t* scales = reinterpret_cast<uint16_t*>(job.image + w->scales) + strip * w->groups * STRIP;
  uint8_t* zeros = reinterpret_cast<uint8_t*>(job.image + w->zeros) + strip * w->groups * STRIP;
  std::vector<uint8_t> codes(static_cast<size_t>(w->k));
  std::vector<Run> blocks;
  for (int64_t b = 0; b < w->blocks; ++b) blocks.push_back({first_input(w, b), inputs_in(w, b)});
  for (int r = 0; r < rows_in(w, strip); ++r) {
    const int64_t row = first_row(w, strip) + r;
    unpack_row(job.codes + row * row_bytes, job.stored_bits, w->k, codes.data());
    place(w->bits, blocks, codes.data(), words + r);
    if (w->per_ic) continue;
    for (int64_t g = 0; g < w->groups; ++g) {
      scales[g * STRIP + r] = job.scales[row * w->groups + g];
      if (!w->symmetric) {
        zeros[g * STRIP + r] = static_cast<uint8_t>(field(job.zeros + row * zero_bytes, job.stored_bits, g));
      }
    }
  }
}

void place_ic_scales(const Packing& job) {
  const Image* w = job.w;
  uint16_t* scales = reinterpret_cast<uint16_t*>(job.image + w->scales);
  uint8_t* zeros = reinterpret_cast<uint8_t*>(job.image + w->zeros);
  const int64_t row_bytes = divide_up(w->k * job.stored_bits, 8);
  for (int64_t g = 0; g < w->groups; ++g) {
    std::memcpy(scales + g * w->blocks * BLOCK, job.scales + g * w->k, static_cast<size_t>(2 * w->k));
    if (!w->symmetric) unpack_row(job.zeros + g * row_bytes, job.stored_bits, w->k, zeros + g * w->blocks * BLOCK);
  }
}

}  // namespace

Image describe(int bits, int64_t n, int64_t k, int64_t group, bool per_ic, bool symmetric) {
  Image w{};
  if (bits < 2 || bits > 8 || n < 1 || k < 1 || group < 1 || n > LARGEST_SIDE || k > LARGEST_SIDE) return w;
  w.magic = MAGIC;
  w.version = VERSION;
  w.bits = bits == 7 ? 8 : bits;
  w.mid = 1 << (bits - 1);
  w.per_ic = per_ic;
  w.symmetric = symmetric;
  w.n = n;
  w.k = k;
  const int64_t along = per_ic ? n : k, step = per_ic ? STRIP : BLOCK;
  w.group = group < along ? group : along;
  w.groups = divide_up(along, w.group);
  const int64_t in_group = divide_up(w.group, step);
  const int64_t steps = (w.groups - 1) * in_group + divide_up(along - (w.groups - 1) * w.group, step);
  w.strips = per_ic ? steps : divide_up(n, STRIP);
  w.blocks = per_ic ? divide_up(k, BLOCK) : steps;
  w.group_strips = per_ic ? in_group : w.strips;
  w.group_blocks = per_ic ? w.blocks : in_group;
  if (w.strips > MOST_BLOCKS / w.blocks) return w;
  const int64_t scales = per_ic ? w.groups * w.blocks * BLOCK : w.strips * w.groups * STRIP;
  w.codes = aligned(sizeof(Image));
  w.scales = w.codes + w.strips * w.blocks * w.bits * VECTOR;
  w.zeros = w.scales + aligned(2 * scales);
  w.bytes = w.zeros + (symmetric ? 0 : aligned(scales));
  return w;
}

void pack(const Image& header, int stored_bits, const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros,
          int threads, void* image) {
  // What no row or input fills must be defined: padded inputs meet an x of zero, but zero times NaN would be NaN.
  std::memset(image, 0, static_cast<size_t>(header.bytes));
  std::memcpy(image, &header, sizeof header);
  Packing job{&header, stored_bits, codes, zeros, scales, static_cast<char*>(image)};
  share_out(header.strips, threads, pack_strip, &job);
  if (header.per_ic) place_ic_scales(job);
}
