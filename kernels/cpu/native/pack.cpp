#include "pack.h"

#include <cstring>
#include <vector>

#include "bits.h"
#include "threads.h"

namespace {

int64_t aligned(int64_t bytes) { return divide_up(bytes, VECTOR) * VECTOR; }

struct Packing {
  const Image* w;
  int stored_bits;
  const uint8_t *codes, *zeros;
  const uint16_t* scales;
  char* image;
};

// One row of a strip into its words of every vector. The places of the 32 inputs are constants of BITS.
template <int BITS>
void place_row(const Image* w, const uint8_t* codes, uint32_t* strip_words) {
  constexpr uint32_t low_mask = (1u << low_width(BITS)) - 1;
  for (int64_t b = 0; b < w->blocks; ++b, strip_words += BITS * STRIP) {
    uint8_t inputs[BLOCK] = {};
    std::memcpy(inputs, codes + first_input(w, b), static_cast<size_t>(inputs_in(w, b)));
    uint32_t words[BITS] = {};
#pragma GCC unroll 32
    for (int k = 0; k < BLOCK; ++k) {
      words[low_vector(BITS, k)] |= (inputs[k] & low_mask) << low_bit(BITS, k);
      if (high_width(BITS)) {
        words[high_vector(BITS, k) % BITS] |= static_cast<uint32_t>(inputs[k] >> low_width(BITS) % 8) << high_bit(BITS, k);
      }
    }
    for (int v = 0; v < BITS; ++v) strip_words[v * STRIP] = words[v];
  }
}

void place(const Image* w, const uint8_t* codes, uint32_t* words) {
  switch (w->bits) {
    case 2: return place_row<2>(w, codes, words);
    case 3: return place_row<3>(w, codes, words);
    case 4: return place_row<4>(w, codes, words);
    case 5: return place_row<5>(w, codes, words);
    case 6: return place_row<6>(w, codes, words);
    default: return place_row<8>(w, codes, words);
  }
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
  for (int r = 0; r < rows_in(w, strip); ++r) {
    const int64_t row = first_row(w, strip) + r;
    unpack_row(job.codes + row * row_bytes, job.stored_bits, w->k, codes.data());
    place(w, codes.data(), words + r);
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
  if (bits < 2 || bits > 8 || n < 1 || k < 1 || group < 1) return w;
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
