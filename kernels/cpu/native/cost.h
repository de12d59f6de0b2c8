// What products cost, in products of one pair of numbers, and how many threads that is worth.
#pragma once

#include "image.h"
#include "weight.h"

constexpr int64_t ALONE = 1 << 19;  // products below which one thread is faster: 7 us alone, 3 to 9 to wake another

// Products (75 in a nanosecond of one Zen 5 core) that take as long as what comes before them: x to its order 0.1 ns a
// value, its rotation 0.26 and with a base matrix 0.16 + base / 190 more, a x two products' time for each.
inline int64_t cost_of_row(int64_t k, const Rotation* rotation, int64_t rank) {
  const int64_t base = rotation && rotation->base > 1 ? 12 + 2 * rotation->base / 5 : 0;
  return k * (8 + (rotation ? 20 + base : 0) + 2 * rank);
}

inline int threads_for_rows(int64_t rows, int64_t cost, int threads) { return rows * cost < ALONE ? 1 : threads; }

inline int64_t products_per_row(const Image* w) { return is_sparse(w) ? w->kept.slots * w->group : w->n * w->k; }
