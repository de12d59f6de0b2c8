// The Viterbi search of quantc/numerics/trellis/encode.py, in int16: the same states, bit for bit.
//
// A step goes from costs of states [S] to those after one more symbol. The 2^k states that share their low L - k bits, the
// head, lead to the same 2^k states: the least of them first (and which one it was), then what each symbol adds.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "trellis.h"
#include "wide.h"

namespace {

using trellis::AROUND;
using trellis::STATES;

constexpr float FARTHEST = 3.99f;
constexpr int16_t FORBIDDEN = 32767;

INLINE int16_t saturated(long value) { return static_cast<int16_t>(value > 32767 ? 32767 : value < -32768 ? -32768 : value); }

#if LANES >= 8 && defined(__AVX2__)
constexpr int COSTS = 2 * LANES;  // of a register
#if LANES == 16
typedef __m512i CostLanes;
INLINE CostLanes all_costs(int16_t value) { return _mm512_set1_epi16(value); }
INLINE CostLanes load_costs(const int16_t* at) { return _mm512_load_si512(at); }
INLINE void store_costs(int16_t* at, CostLanes costs) { _mm512_store_si512(at, costs); }
INLINE CostLanes least(CostLanes a, CostLanes b) { return _mm512_min_epi16(a, b); }
INLINE CostLanes plus(CostLanes a, CostLanes b) { return _mm512_adds_epi16(a, b); }
INLINE CostLanes product(CostLanes a, CostLanes b) { return _mm512_mulhrs_epi16(a, b); }
// The choice, and `number` where other is less than best.
INLINE CostLanes chosen(CostLanes choice, CostLanes best, CostLanes other, int16_t number) {
  return _mm512_mask_mov_epi16(choice, _mm512_cmpgt_epi16_mask(best, other), all_costs(number));
}
INLINE void store_choices(uint8_t* at, CostLanes choices) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi16_epi8(choices));
}
#else
typedef __m256i CostLanes;
INLINE CostLanes all_costs(int16_t value) { return _mm256_set1_epi16(value); }
INLINE CostLanes load_costs(const int16_t* at) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(at)); }
INLINE void store_costs(int16_t* at, CostLanes costs) { _mm256_store_si256(reinterpret_cast<__m256i*>(at), costs); }
INLINE CostLanes least(CostLanes a, CostLanes b) { return _mm256_min_epi16(a, b); }
INLINE CostLanes plus(CostLanes a, CostLanes b) { return _mm256_adds_epi16(a, b); }
INLINE CostLanes product(CostLanes a, CostLanes b) { return _mm256_mulhrs_epi16(a, b); }
INLINE CostLanes chosen(CostLanes choice, CostLanes best, CostLanes other, int16_t number) {
  return _mm256_blendv_epi8(choice, all_costs(number), _mm256_cmpgt_epi16(best, other));
}
INLINE void store_choices(uint8_t* at, CostLanes choices) {
  const __m128i low = _mm256_castsi256_si128(choices), high = _mm256_extracti128_si256(choices, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm_packus_epi16(low, high));
}
#endif

INLINE int16_t least_of(CostLanes costs) {
  alignas(64) int16_t each[COSTS];
  store_costs(each, costs);
  return *std::min_element(each, each + COSTS);
}

// Register V of those that COSTS / 2 heads (8, or 16) make, each head 2^BITS times: bytes of a shuffle within 16.
template <int BITS, int V>
INLINE CostLanes repeated(const int16_t* heads) {
  constexpr int FIRST = (COSTS * V) >> BITS;  // head of the register's first state
#if LANES == 16
  if constexpr (BITS >= 5) return all_costs(heads[FIRST]);
  alignas(64) static constexpr auto order = [] {
    struct { int16_t lane[COSTS]; } found{};
    for (int i = 0; i < COSTS; ++i) found.lane[i] = static_cast<int16_t>(i >> BITS);
    return found;
  }();
  return _mm512_permutexvar_epi16(load_costs(order.lane), _mm512_loadu_si512(heads + FIRST));
#else
  if constexpr (BITS >= 4) return all_costs(heads[FIRST]);
  const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(heads + FIRST)));
  alignas(32) static constexpr auto order = [] {
    struct { int8_t byte[2 * COSTS]; } found{};
    for (int i = 0; i < 2 * COSTS; ++i) found.byte[i] = static_cast<int8_t>(2 * (i / 2 >> BITS) + i % 2);
    return found;
  }();
  return _mm256_shuffle_epi8(both, _mm256_load_si256(reinterpret_cast<const __m256i*>(order.byte)));
#endif
}
#endif

template <int BITS>
class Search {
 public:
  static constexpr int SYMBOLS = 1 << BITS, HEADS = STATES >> BITS;

  explicit Search(char* workspace) : tables_(trellis::tables()) {
    costs_ = reinterpret_cast<int16_t*>(workspace);
    next_ = costs_ + STATES;
    heads_ = next_ + STATES;
    choices_ = reinterpret_cast<uint8_t*>(heads_ + HEADS + 32);  // repeated() reads past the last head
  }

  // The closed walk of `length` states nearest to numbers.
  void find(const float* numbers, int length, int16_t* states) {
    std::fill(costs_, costs_ + STATES, int16_t{0});
    for (int i = 0; i < 2 * AROUND; ++i) step(numbers[(i - AROUND + length * AROUND) % length], i);
    int state = static_cast<int>(std::min_element(costs_, costs_ + STATES) - costs_);
    for (int i = 2 * AROUND - 1; i >= AROUND; --i) state = before(state, i);
    const int head = state & (HEADS - 1);
    std::fill(costs_, costs_ + STATES, FORBIDDEN);
    for (int p = 0; p < SYMBOLS; ++p) costs_[head + p * HEADS] = 0;
    for (int i = 0; i < length; ++i) step(numbers[i], i);
    state = head;
    for (int p = 1; p < SYMBOLS; ++p)
      if (costs_[head + p * HEADS] < costs_[state]) state = head + p * HEADS;
    for (int i = length - 1; i >= 0; --i) {
      states[i] = static_cast<int16_t>(state);
      state = before(state, i);
    }
  }

 private:
  int before(int state, int i) const {
    const int head = state >> BITS;
    return head + choices_[i * HEADS + head] * HEADS;
  }

  void step(float number, int i) {
    const float x = std::max(-FARTHEST, std::min(FARTHEST, number));
    const int16_t times = static_cast<int16_t>(std::lrint(x * -8192.0f));
    const int16_t offset = saturated(std::lrint(x * x * 1024.0f) - take_least(choices_ + i * HEADS));
    add_distances(times, offset);
    std::swap(costs_, next_);
  }

#if LANES >= 8 && defined(__AVX2__)
  int16_t take_least(uint8_t* choices) {
    CostLanes lowest = all_costs(FORBIDDEN);
    for (int j = 0; j < HEADS; j += COSTS) {
      CostLanes best = load_costs(costs_ + j), choice = all_costs(0);
#pragma GCC unroll 32
      for (int p = 1; p < SYMBOLS; ++p) {
        const CostLanes other = load_costs(costs_ + p * HEADS + j);
        choice = chosen(choice, best, other, static_cast<int16_t>(p));
        best = least(best, other);
      }
      lowest = least(lowest, best);
      store_costs(heads_ + j, best);
      store_choices(choices + j, choice);
    }
    return least_of(lowest);
  }

  void add_distances(int16_t times, int16_t offset) {
    constexpr int AT_ONCE = COSTS / 2;  // heads
    const CostLanes x = all_costs(times), square = all_costs(offset);
    for (int j = 0; j < HEADS; j += AT_ONCE) {
      const int16_t* heads = heads_ + j;
      const int first = j * SYMBOLS;
      unrolled<SYMBOLS / 2>([&](auto v) INLINE_LAMBDA {
        const int at = first + v * COSTS;
        const CostLanes cross = product(x, load_costs(tables_.scaled + at));
        const CostLanes distance = plus(plus(cross, load_costs(tables_.squares + at)), square);
        store_costs(next_ + at, plus(distance, repeated<BITS, v>(heads)));
      });
    }
  }
#else
  int16_t take_least(uint8_t* choices) {
    for (int j = 0; j < HEADS; ++j) heads_[j] = costs_[j];
    std::fill(choices, choices + HEADS, uint8_t{0});
    for (int p = 1; p < SYMBOLS; ++p)
      for (int j = 0; j < HEADS; ++j) {
        const int16_t other = costs_[p * HEADS + j];
        choices[j] = other < heads_[j] ? static_cast<uint8_t>(p) : choices[j];
        heads_[j] = other < heads_[j] ? other : heads_[j];
      }
    return *std::min_element(heads_, heads_ + HEADS);
  }

  void add_distances(int16_t times, int16_t offset) {
    for (int j = 0; j < HEADS; ++j)
      for (int p = 0; p < SYMBOLS; ++p) {
        const int s = j * SYMBOLS + p;
        const int cross = (times * tables_.scaled[s] + (1 << 14)) >> 15;
        next_[s] = saturated(saturated(saturated(cross + tables_.squares[s]) + offset) + heads_[j]);
      }
  }
#endif

  const trellis::Tables& tables_;
  int16_t *costs_, *next_, *heads_;
  uint8_t* choices_;
};

// Row r of a tile is at step tile - 1 - place of the search; places: places_of of quantc/numerics/trellis/code.py.
INLINE int step_of(int row, int tile) { return tile - 1 - (tile / 8 * (row % 8) + row / 8); }

template <int BITS>
void round_tile_of(const trellis::Rounding& job, int64_t first, int rows, char* workspace) {
  Search<BITS> search(workspace);
  const int16_t* values = trellis::tables().values;
  const float *unit = job.unit + first, *scale = job.scale + first;
  float numbers[trellis::LARGEST_TILE] = {}, stored[trellis::LARGEST_TILE];
  int16_t states[trellis::LARGEST_TILE];
  for (int64_t c = 0; c < job.columns; ++c) {
    const int64_t at = c * job.stride + first;
    const float* left = job.left + at;
    for (int r = 0; r < rows; ++r) numbers[step_of(r, job.tile)] = unit[r] == 0 ? 0 : left[r] / unit[r];
    search.find(numbers, job.tile, states);
    for (int r = 0; r < rows; ++r) {
      job.codes[at + r] = states[step_of(r, job.tile)];
    }
    if (!job.upper) continue;
    for (int r = 0; r < rows; ++r) stored[r] = values[job.codes[at + r]] * scale[r];
    __asm__("" ::: "memory");  // stored values are rounded before they are taken off, as they are elsewhere
    const float* pivot = job.upper + c * (job.upper_row + job.upper_column);
    float* errors = job.errors + at;
    for (int r = 0; r < rows; ++r) errors[r] = (left[r] - stored[r]) / *pivot;
    for (int64_t d = c + 1; d < job.columns; ++d) {
      const float factor = pivot[(d - c) * job.upper_column];
      float* to = job.left + d * job.stride + first;
      for (int r = 0; r < rows; ++r) to[r] -= factor * errors[r];
    }
  }
}

void round_tile(const trellis::Rounding& job, int64_t first, int rows, char* workspace) {
  constexpr trellis::RoundTile each[] = {round_tile_of<1>, round_tile_of<2>, round_tile_of<3>, round_tile_of<4>, round_tile_of<5>};
  each[job.bits - 1](job, first, rows, workspace);
}

}  // namespace
