#include <cstring>

#include "bits.h"
#include "kept.h"
#include "pack.h"
#include "threads.h"

namespace {

constexpr int64_t SHARE = 1024;       // kept groups: 8 KB of 4-bit codes in groups of 16
constexpr int64_t COST_OF_A_ROW = 4;  // in groups: its sums over the lanes and its output
constexpr int64_t LARGEST_COLUMN = 65535;

int64_t aligned(int64_t bytes) { return divide_up(bytes, VECTOR) * VECTOR; }

bool is_kept(const uint8_t* marks, int64_t column) { return marks[column / 8] >> column % 8 & 1; }

void find_starts(const Image& w, const uint8_t* marks, int64_t* starts, uint16_t* columns) {
  const int64_t row_bytes = divide_up(w.groups, 8);
  int64_t kept = 0;
  for (int64_t row = 0; row < w.n; ++row, marks += row_bytes) {
    starts[row] = kept;
    for (int64_t column = 0; column < w.groups; ++column)
      if (is_kept(marks, column)) columns[kept++] = static_cast<uint16_t>(column);
  }
  starts[w.n] = kept;
}

// A share ends with the row that reaches its part of all costs.
void cut_shares(const Image& w, const int64_t* starts, int32_t* shares) {
  const int64_t all = w.kept.groups + COST_OF_A_ROW * w.n;
  int64_t row = 0;
  for (int64_t share = 0; share < w.strips; ++share) {
    shares[share] = static_cast<int32_t>(row);
    while (row < w.n && (starts[row] + COST_OF_A_ROW * row) * w.strips < (share + 1) * all) ++row;
  }
  shares[w.strips] = static_cast<int32_t>(w.n);
}

struct Packing {
  const Image* w;
  int stored_bits;
  const uint8_t* codes;
  const int64_t* starts;
  uint8_t* to;
};

// Sets `bits` of a stream of zeros.
void put_field(uint8_t* stream, int64_t bit, unsigned value) {
  const unsigned shifted = value << bit % 8;
  stream[bit / 8] |= static_cast<uint8_t>(shifted);
  if (shifted >> 8) stream[bit / 8 + 1] |= static_cast<uint8_t>(shifted >> 8);
}

void pack_row(void* context, int64_t row) {
  const Packing& job = *static_cast<const Packing*>(context);
  const Image* w = job.w;
  const int low = low_width(w->bits), high = high_width(w->bits);
  const int64_t unit = w->kept.unit, stored = divide_up(w->group * job.stored_bits, 8);
  for (int64_t g = job.starts[row]; g < job.starts[row + 1]; ++g) {
    uint8_t* to = job.to + g * bytes_of_group(w);
    for (int64_t k = 0; k < w->group; ++k) {
      const unsigned code = field(job.codes + g * stored, job.stored_bits, k);
      uint8_t* at = to + k / unit * unit * w->bits / 8;
      put_field(at, k % unit * low, code & ((1u << low) - 1));
      if (high) put_field(at + unit * low / 8, k % unit * high, code >> low);
    }
  }
}

}  // namespace

Image describe_kept(int bits, int64_t n, int64_t k, int64_t group, int64_t kept, bool symmetric) {
  Image w{};
  if (bits < 2 || bits > 8 || n < 1 || k < 1 || group < 1) return w;
  w.magic = MAGIC;
  w.version = VERSION;
  w.bits = bits == 7 ? 8 : bits;
  w.mid = 1 << (bits - 1);
  w.symmetric = symmetric;
  w.n = n;
  w.k = k;
  w.group = group < k ? group : k;
  w.groups = divide_up(k, w.group);
  if (w.groups > LARGEST_COLUMN || divide_up(w.group, UNIT) > 2 || n > INT32_MAX) return w;
  w.kept.unit = w.group <= 8 ? 8 : UNIT;
  w.kept.units = divide_up(w.group, UNIT);
  w.kept.groups = kept;
  const int64_t shares = divide_up(kept + COST_OF_A_ROW * n, SHARE);
  w.strips = shares < n ? shares : n;
  w.blocks = divide_up(w.groups * w.kept.units * UNIT, BLOCK);
  w.group_strips = w.strips;
  w.group_blocks = w.blocks;
  w.codes = aligned(sizeof(Image));
  w.scales = w.codes + aligned(kept * bytes_of_group(&w) + READ_BEYOND);
  w.zeros = w.scales + aligned(2 * (kept + UNIT));
  w.kept.columns = w.zeros + (symmetric ? 0 : aligned(kept + UNIT));
  w.kept.starts = w.kept.columns + aligned(2 * kept);
  w.kept.shares = w.kept.starts + aligned(8 * (n + 1));
  w.bytes = w.kept.shares + aligned(4 * (w.strips + 1));
  return w;
}

void pack_kept(const Image& header, int stored_bits, const uint8_t* marks, const uint8_t* codes, const uint16_t* scales,
               const uint8_t* zeros, int threads, void* image) {
  char* to = static_cast<char*>(image);
  std::memset(to, 0, static_cast<size_t>(header.bytes));
  std::memcpy(to, &header, sizeof header);
  int64_t* starts = reinterpret_cast<int64_t*>(to + header.kept.starts);
  find_starts(header, marks, starts, reinterpret_cast<uint16_t*>(to + header.kept.columns));
  cut_shares(header, starts, reinterpret_cast<int32_t*>(to + header.kept.shares));
  std::memcpy(to + header.scales, scales, static_cast<size_t>(2 * header.kept.groups));
  if (!header.symmetric) unpack_row(zeros, stored_bits, header.kept.groups, reinterpret_cast<uint8_t*>(to + header.zeros));
  Packing job{&header, stored_bits, codes, starts, reinterpret_cast<uint8_t*>(to + header.codes)};
  share_out(header.n, threads, pack_row, &job);
}
