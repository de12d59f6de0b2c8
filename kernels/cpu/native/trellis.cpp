#include "trellis.h"

#include <cmath>

#include "levels.h"
#include "scratch.h"
#include "threads.h"

namespace trellis {
namespace {

thread_local Scratch scratch;

struct Tiles {
  const Rounding* job;
  int64_t n;
};

void round_one(void* context, int64_t tile) {
  const Tiles& all = *static_cast<const Tiles*>(context);
  const int64_t first = tile * all.job->tile, left = all.n - first;
  const int rows = left < all.job->tile ? static_cast<int>(left) : all.job->tile;
  level().round_tile(*all.job, first, rows, scratch.at_least(room_for(all.job->bits)));
}

}  // namespace

const Tables& tables() {
  static const Tables* const made = [] {
    Tables* found = new Tables;
    for (int s = 0; s < STATES; ++s) {
      const double value = value_of(static_cast<uint32_t>(s)) / RMS;
      found->values[s] = static_cast<int16_t>(value_of(static_cast<uint32_t>(s)));
      found->scaled[s] = static_cast<int16_t>(std::lrint(value * (1 << 13)));
      found->squares[s] = static_cast<int16_t>(std::lrint(value * value * (1 << 10)));
    }
    return found;
  }();
  return *made;
}

// Two arrays of costs, the least of each head, and a choice for each head and step.
size_t room_for(int bits) {
  const size_t heads = static_cast<size_t>(STATES >> bits);
  return aligned(2 * (2 * STATES + heads + 32)) + aligned(heads * LARGEST_TILE);
}

void round(const Rounding& job, int64_t n, int threads) {
  Tiles all{&job, n};
  share_out((n + job.tile - 1) / job.tile, threads, round_one, &all);
}

}  // namespace trellis
