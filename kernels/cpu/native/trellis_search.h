// The Viterbi search of quantc/numerics/trellis/encode.py, in int16: the same states, bit for bit.
//
// A step goes from the least costs of heads to those after one more symbol. The 2^k states that share their low L - k bits,
// the head, lead to the same 2^k states. Costs of states are made in registers, of their head's and what each symbol adds,
// and compared there.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "trellis.h"
#include "wide.h"

namespace {

using trellis::AROUND;
using trellis::STATES;

constexpr float FARTHEST = 5.2f;
constexpr int16_t LARGEST = 32767;

// Of a state, int32: what a number costs there.
INLINE int distance(int number, int value) { return ((number - value) * (number - value) + (1 << 14)) >> 15; }

#if LANES >= 8 && defined(__AVX2__)
constexpr int COSTS = 2 * LANES;  // of a register
#if LANES == 16
typedef __m512i CostLanes;
INLINE CostLanes all_costs(int16_t value) { return _mm512_set1_epi16(value); }
INLINE CostLanes everywhere(int32_t heads) { return _mm512_set1_epi32(heads); }
INLINE CostLanes everywhere(int64_t heads) { return _mm512_set1_epi64(heads); }
INLINE CostLanes everywhere(__m128i heads) { return _mm512_broadcast_i32x4(heads); }
INLINE CostLanes load_costs(const int16_t* at) { return _mm512_load_si512(at); }
INLINE void store_costs(int16_t* at, CostLanes costs) { _mm512_store_si512(at, costs); }
INLINE CostLanes least(CostLanes a, CostLanes b) { return _mm512_min_epi16(a, b); }
INLINE CostLanes minus(CostLanes a, CostLanes b) { return _mm512_sub_epi16(a, b); }
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
INLINE CostLanes everywhere(int32_t heads) { return _mm256_set1_epi32(heads); }
INLINE CostLanes everywhere(int64_t heads) { return _mm256_set1_epi64x(heads); }
INLINE CostLanes everywhere(__m128i heads) { return _mm256_broadcastsi128_si256(heads); }
INLINE CostLanes load_costs(const int16_t* at) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(at)); }
INLINE void store_costs(int16_t* at, CostLanes costs) { _mm256_store_si256(reinterpret_cast<__m256i*>(at), costs); }
INLINE CostLanes least(CostLanes a, CostLanes b) { return _mm256_min_epi16(a, b); }
INLINE CostLanes minus(CostLanes a, CostLanes b) { return _mm256_sub_epi16(a, b); }
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

// By lane, the head of heads that have 2^BITS lanes each: both of its bytes (BYTES 1), or its number in 2 bytes.
template <int BITS, int BYTES>
struct Order {
  alignas(64) uint8_t byte[2 * COSTS];
  constexpr Order() : byte() {
    for (int i = 0; i < COSTS; ++i) {
      byte[2 * i] = (i >> BITS) * (BYTES == 1 ? 2 : 1);
      byte[2 * i + 1] = BYTES == 1 ? byte[2 * i] + 1 : 0;
    }
  }
};

// 2, 4 or 8 heads, again and again.
template <int COUNT>
INLINE CostLanes few(const int16_t* heads) {
  std::conditional_t<COUNT == 2, int32_t, std::conditional_t<COUNT == 4, int64_t, __m128i>> all;
  std::memcpy(&all, heads, sizeof all);
  return everywhere(all);
}

// The heads of a register's states, each 2^BITS times.
template <int BITS>
INLINE CostLanes repeated(const int16_t* heads) {
  constexpr int COUNT = COSTS >> BITS;
  if constexpr (COUNT <= 1) {
    return all_costs(*heads);
#if LANES == 16
  } else if constexpr (COUNT == 16) {
    static constexpr Order<BITS, 2> order;
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(heads));
    return _mm512_permutexvar_epi16(_mm512_load_si512(order.byte), _mm512_castsi256_si512(all));
  } else {
    static constexpr Order<BITS, 1> order;
    return _mm512_shuffle_epi8(few<COUNT>(heads), _mm512_load_si512(order.byte));
#else
  } else {
    static constexpr Order<BITS, 1> order;
    return _mm256_shuffle_epi8(few<COUNT>(heads), _mm256_load_si256(reinterpret_cast<const __m256i*>(order.byte)));
#endif
  }
}
#endif

template <int BITS>
class Search {
 public:
  static constexpr int SYMBOLS = 1 << BITS, HEAD_BITS = trellis::STATE_BITS - BITS, HEADS = 1 << HEAD_BITS;
  static constexpr int OPENING = (trellis::STATE_BITS - 1) / BITS;  // steps after which no state hands on a bit of the head

  explicit Search(char* workspace) : values_(trellis::tables().scaled) {
    heads_ = reinterpret_cast<int16_t*>(workspace);
    next_ = reinterpret_cast<int16_t*>(workspace + trellis::bytes_of_heads(BITS));
    choices_ = reinterpret_cast<uint8_t*>(workspace + 2 * trellis::bytes_of_heads(BITS));
  }

  // The closed walk of `length` states nearest to numbers.
  void find(const float* numbers, int length, int16_t* states) {
    const int head = head_at_the_seam(numbers, length);
    std::fill(heads_, heads_ + HEADS, LARGEST);
    heads_[head] = 0;
    for (int i = 0; i < length - 1; ++i) step<true>(rounded(numbers[i]), i + 1);
    int state = head, least = INT_MAX;
    for (int last = head; last < STATES; last += HEADS)
      if (const int cost = cost_of(rounded(numbers[length - 1]), last); cost < least) state = last, least = cost;
    for (int i = length - 1; i >= 0; --i) {
      states[i] = static_cast<int16_t>(state);
      state = before(state, i);
    }
    open(head, states);
  }

 private:
  // Of a free run over the numbers on either side of the seam.
  int head_at_the_seam(const float* numbers, int length) {
    const auto number = [&](int i) { return rounded(numbers[(i - AROUND + length * AROUND) % length]); };
    std::fill(heads_, heads_ + HEADS, int16_t{0});
    for (int i = 0; i < AROUND - 1; ++i) step<false>(number(i), i + 1);
    for (int i = AROUND - 1; i < 2 * AROUND; ++i) step<true>(number(i), i + 1);
    int state = STATES;  // the first of the cheapest: their heads cost 0
    for (int head = 0; head < HEADS; ++head)
      if (heads_[head] == 0) state = std::min(state, before(head << BITS, 2 * AROUND));
    for (int i = 2 * AROUND - 1; i >= AROUND; --i) state = before(state, i);
    return state & (HEADS - 1);
  }

  // Makes the first states come after the head. They do already, unless a path out of another head looked as cheap: among
  // numbers far from all codes many costs are LARGEST.
  static void open(int head, int16_t* states) {
    constexpr int OWN = BITS * OPENING;  // bits of the walk's own symbols in the last of these states
    const int symbols = states[OPENING - 1] & ((1 << OWN) - 1);
    for (int i = 0; i < OPENING; ++i) {
      const int own = BITS * (i + 1);
      states[i] = static_cast<int16_t>((head << own | symbols >> (OWN - own)) & (STATES - 1));
    }
  }

  static int16_t rounded(float number) {
    const float x = std::max(-FARTHEST, std::min(FARTHEST, number));
    return static_cast<int16_t>(std::lrint(x * trellis::VALUE_UNIT));
  }

  int cost_of(int number, int state) const {
    return std::min<int>(distance(number, values_[state]) + heads_[state >> BITS], LARGEST);
  }

  int before(int state, int i) const {
    const int head = state >> BITS;
    return head + choices_[i * HEADS + head] * HEADS;
  }

  // Takes heads_ one symbol further, and with CHOICES notes which states they came from. Costs start near 0 again.
  template <bool CHOICES>
  void step(int16_t number, int to) {
    const int16_t least = compare<CHOICES>(number, choices_ + to * HEADS);
    for (int j = 0; j < HEADS; ++j) next_[j] = static_cast<int16_t>(next_[j] - least);
    std::swap(heads_, next_);
  }

#if LANES >= 8 && defined(__AVX2__)
  // Of COSTS states from `at` on.
  INLINE_MEMBER CostLanes costs(CostLanes number, int at) const {
    const CostLanes difference = minus(number, load_costs(values_ + at));
    return plus(product(difference, difference), repeated<BITS>(heads_ + (at >> BITS)));
  }

  template <bool CHOICES>
  int16_t compare(int16_t number, uint8_t* choices) {
    const CostLanes x = all_costs(number);
    CostLanes lowest = all_costs(LARGEST);
    for (int j = 0; j < HEADS; j += COSTS) {
      CostLanes best = costs(x, j), choice = all_costs(0);
#pragma GCC unroll 32
      for (int p = 1; p < SYMBOLS; ++p) {
        const CostLanes other = costs(x, p * HEADS + j);
        if (CHOICES) choice = chosen(choice, best, other, static_cast<int16_t>(p));
        best = least(best, other);
      }
      lowest = least(lowest, best);
      store_costs(next_ + j, best);
      if (CHOICES) store_choices(choices + j, choice);
    }
    return least_of(lowest);
  }
#else
  template <bool CHOICES>
  int16_t compare(int16_t number, uint8_t* choices) {
    std::fill(next_, next_ + HEADS, LARGEST);
    if (CHOICES) std::fill(choices, choices + HEADS, uint8_t{0});
    for (int p = 0; p < SYMBOLS; ++p)
      for (int j = 0; j < HEADS; ++j) {
        const int cost = cost_of(number, p * HEADS + j);
        if (CHOICES) choices[j] = cost < next_[j] ? static_cast<uint8_t>(p) : choices[j];
        next_[j] = static_cast<int16_t>(std::min<int>(cost, next_[j]));
      }
    return *std::min_element(next_, next_ + HEADS);
  }
#endif

  const int16_t* values_;
  int16_t *heads_, *next_;
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
