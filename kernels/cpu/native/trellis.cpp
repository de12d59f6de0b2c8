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
      found->scaled[s] = static_cast<int16_t>(std::lrint(value * VALUE_UNIT));
    }
    return found;
  }();
  return *made;
}

// The least costs of heads before a step and after it, and a choice for each head and step.
size_t room_for(int bits) {
  return 2 * bytes_of_heads(bits) + aligned(static_cast<size_t>(STATES >> bits) * LARGEST_TILE);
}

void round(const Rounding& job, int64_t n, int threads) {
  Tiles all{&job, n};
  share_out((n + job.tile - 1) / job.tile, threads, round_one, &all);
}

}  // namespace trellis
