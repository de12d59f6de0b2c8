#include <algorithm>
#include <cstring>
#include <vector>

#include "bits.h"
#include "kept.h"
#include "pack.h"
#include "threads.h"

namespace {

constexpr int64_t SHARE = 2048;        // slots at least: 16 KB of 4-bit codes in groups of 16
constexpr int64_t COST_OF_STRIP = 32;  // in slots: its sums over the lanes and its outputs
constexpr int64_t LARGEST_PLACE = 65535;
constexpr int FOURS = STRIP / FOUR;  // of a strip

int64_t aligned(int64_t bytes) { return divide_up(bytes, VECTOR) * VECTOR; }
bool is_kept(const uint8_t* marks, int64_t column) { return marks[column / 8] >> column % 8 & 1; }

// Which slots the rows take. first: of each row's groups, as the format stores them.
struct Slots {
  std::vector<int64_t> first, starts;
  std::vector<uint8_t> order;

  Slots(int64_t n, int64_t groups, const uint8_t* marks) : first(1), starts(1) {
    for (int64_t row = 0; row < n; ++row, marks += divide_up(groups, 8)) {
      int64_t kept = 0;
      for (int64_t column = 0; column < groups; ++column) kept += is_kept(marks, column);
      first.push_back(first.back() + kept);
    }
    for (int64_t strip = 0; strip < divide_up(n, STRIP); ++strip) add_strip(strip * STRIP);
  }

  int64_t count(int64_t row) const {
    return row + 1 < static_cast<int64_t>(first.size()) ? first[row + 1] - first[row] : 0;
  }

  void add_strip(int64_t row) {
    uint8_t places[STRIP];
    for (int r = 0; r < STRIP; ++r) places[r] = static_cast<uint8_t>(r);
    std::stable_sort(places, places + STRIP, [&](int a, int b) { return count(row + a) > count(row + b); });
    order.insert(order.end(), places, places + STRIP);
    for (int four = 0; four < FOURS; ++four) starts.push_back(starts.back() + FOUR * count(row + places[four * FOUR]));
  }
};

// A share ends with the strip that reaches its part of all costs.
void cut_shares(const Image& w, const Slots& slots, int32_t* shares) {
  const int64_t strips = divide_up(w.n, STRIP), all = w.kept.slots + COST_OF_STRIP * strips;
  int64_t strip = 0;
  for (int64_t share = 0; share < w.strips; ++share) {
    shares[share] = static_cast<int32_t>(strip * STRIP);
    while (strip < strips && (slots.starts[strip * FOURS] + COST_OF_STRIP * strip) * w.strips < (share + 1) * all) ++strip;
  }
  shares[w.strips] = static_cast<int32_t>(w.n);
}

struct Packing {
  const Image* w;
  const Slots* slots;
  int stored_bits;
  const uint8_t *marks, *codes, *zeros;
  const uint16_t* scales;
  char* image;
};

void put_field(uint8_t* stream, int64_t bit, unsigned value) {
  const unsigned shifted = value << bit % 8;
  stream[bit / 8] |= static_cast<uint8_t>(shifted);
  if (shifted >> 8) stream[bit / 8 + 1] |= static_cast<uint8_t>(shifted >> 8);
}

void place_codes(const Packing& job, int64_t group, int64_t slot) {
  const Image* w = job.w;
  const int low = low_width(w->bits), high = high_width(w->bits);
  const int64_t unit = w->kept.unit, stored = divide_up(w->group * job.stored_bits, 8);
  uint8_t* to = reinterpret_cast<uint8_t*>(job.image + w->codes) + slot * bytes_of_group(w);
  for (int64_t k = 0; k < w->group; ++k) {
    const unsigned code = field(job.codes + group * stored, job.stored_bits, k);
    uint8_t* at = to + k / unit * unit * w->bits / 8;
    put_field(at, k % unit * low, code & ((1u << low) - 1));
    if (high) put_field(at + unit * low / 8, k % unit * high, code >> low);
  }
}

// One of four rows into every fourth slot; row: past the last one where the strip is not full.
void place_row(const Packing& job, int64_t row, int64_t slot) {
  const Image* w = job.w;
  const uint8_t* marks = job.marks + row * divide_up(w->groups, 8);
  int64_t column = 0;
  for (int64_t i = 0; i < job.slots->count(row); ++i, ++column, slot += FOUR) {
    const int64_t group = job.slots->first[row] + i;
    while (!is_kept(marks, column)) ++column;
    reinterpret_cast<uint16_t*>(job.image + w->kept.places)[slot] = static_cast<uint16_t>(column * places_of_group(w));
    reinterpret_cast<uint16_t*>(job.image + w->scales)[slot] = job.scales[group];
    if (!w->symmetric) job.image[w->zeros + slot] = static_cast<char>(field(job.zeros, job.stored_bits, group));
    place_codes(job, group, slot);
  }
}

void pack_strip(void* context, int64_t strip) {
  const Packing& job = *static_cast<const Packing*>(context);
  const Slots& slots = *job.slots;
  uint16_t* places = reinterpret_cast<uint16_t*>(job.image + job.w->kept.places);
  const uint16_t behind = static_cast<uint16_t>(job.w->groups * places_of_group(job.w));
  std::fill(places + slots.starts[strip * FOURS], places + slots.starts[(strip + 1) * FOURS], behind);
  for (int64_t i = strip * STRIP; i < (strip + 1) * STRIP; ++i)
    place_row(job, strip * STRIP + slots.order[i], slots.starts[i / FOUR] + i % FOUR);
}

template <typename T>
void store(char* image, int64_t offset, const std::vector<T>& values) {
  std::memcpy(image + offset, values.data(), sizeof(T) * values.size());
}

Image describe(int bits, int64_t n, int64_t k, int64_t group, bool symmetric, const Slots& slots) {
  Image w{};
  w.magic = MAGIC;
  w.version = VERSION;
  w.bits = bits == 7 ? 8 : bits;
  w.mid = 1 << (bits - 1);
  w.symmetric = symmetric;
  w.n = n;
  w.k = k;
  w.group = group;
  w.groups = divide_up(k, group);
  w.kept.unit = group <= 8 ? 8 : UNIT;
  w.kept.units = divide_up(group, UNIT);
  w.kept.slots = slots.starts.back();
  const int64_t strips = divide_up(n, STRIP), shares = divide_up(w.kept.slots + COST_OF_STRIP * strips, SHARE);
  w.strips = w.group_strips = shares < strips ? shares : strips;
  w.blocks = w.group_blocks = divide_up((w.groups + 1) * w.kept.units * UNIT, BLOCK);
  w.codes = aligned(sizeof(Image));
  w.scales = w.codes + aligned(w.kept.slots * bytes_of_group(&w) + READ_BEYOND);
  w.zeros = w.scales + aligned(2 * (w.kept.slots + UNIT));
  w.kept.places = w.zeros + (symmetric ? 0 : aligned(w.kept.slots + UNIT));
  w.kept.order = w.kept.places + aligned(2 * w.kept.slots);
  w.kept.starts = w.kept.order + aligned(strips * STRIP);
  w.kept.shares = w.kept.starts + aligned(8 * (strips * FOURS + 1));
  w.bytes = w.kept.shares + aligned(4 * (w.strips + 1));
  return w;
}

}  // namespace

bool can_be_packed(int bits, int64_t n, int64_t k, int64_t group) {
  if (bits < 2 || bits > 8 || n < 1 || n > INT32_MAX || k < 1 || k > INT32_MAX || group < 1 || group > k || group > 2 * UNIT) return false;
  return divide_up(k, group) <= LARGEST_PLACE / places_of_units(divide_up(group, UNIT));
}

int64_t kept_bytes(int bits, int64_t n, int64_t k, int64_t group, const uint8_t* marks, bool symmetric) {
  if (!can_be_packed(bits, n, k, group)) return 0;
  return describe(bits, n, k, group, symmetric, Slots(n, divide_up(k, group), marks)).bytes;
}

bool pack_kept(int bits, int64_t n, int64_t k, int64_t group, const Stored& stored, int threads, void* image, int64_t image_bytes) {
  if (!can_be_packed(bits, n, k, group)) return false;
  const Slots slots(n, divide_up(k, group), stored.marks);
  const Image header = describe(bits, n, k, group, stored.symmetric, slots);
  if (slots.first.back() != stored.kept || header.bytes != image_bytes) return false;
  char* to = static_cast<char*>(image);
  std::memset(to, 0, static_cast<size_t>(header.bytes));
  std::memcpy(to, &header, sizeof header);
  store(to, header.kept.order, slots.order);
  store(to, header.kept.starts, slots.starts);
  cut_shares(header, slots, reinterpret_cast<int32_t*>(to + header.kept.shares));
  Packing job{&header, &slots, bits, stored.marks, stored.codes, stored.zeros, stored.scales, to};
  share_out(divide_up(n, STRIP), threads, pack_strip, &job);
  return true;
}
