#include "trellis_multiply.h"

#include <cstring>

#include "cost.h"
#include "levels.h"
#include "scratch.h"
#include "threads.h"

namespace trellis {
namespace {

// Rows of x that share the decoding of a part. Their sums for a tile are 12 KB for each 48 rows, in the second cache.
constexpr int64_t SLAB = 192;
constexpr int64_t DECODING = 8;  // products that take as long as decoding a weight

thread_local Scratch caller_scratch, worker_scratch;

int64_t size_of(Type type) { return type == FLOAT32 ? 4 : 2; }
int64_t even(int64_t k) { return (k + 1) / 2 * 2; }
int64_t tiles_of(const Stored* w) { return (w->n + w->tile - 1) / w->tile; }

struct Multiplication {
  const Level* level;
  const Weight* weight;
  const Stored* w;
  const char* x;
  Outputs y;
  int64_t m;
  bool pairs;             // whether rows of x stay bfloat16
  float *rows, *totals;   // x as floats [m][k], rotated, and its sums; or as bfloat16 [m][even(k)]
  float *inner, *added;   // the low-rank addition, half done [m][rank] and with the bias [m][n]
};

void load_row(void* context, int64_t row) {
  const Multiplication& job = *static_cast<const Multiplication*>(context);
  const int64_t k = job.w->k, row_size = k * size_of(job.y.type);
  const Weight& weight = *job.weight;
  const void* x = job.x + row * row_size;
  if (weight.rotation) {
    const size_t rotated = aligned(static_cast<size_t>(row_size));
    char* room = worker_scratch.at_least(rotated + rotation_room(weight.rotation));
    job.level->rotate(weight.rotation, x, job.y.type, room, reinterpret_cast<float*>(room + rotated));
    x = room;
  }
  if (weight.rank) job.level->times_a(&weight, k, x, job.y.type, job.inner + row * weight.rank);
  if (!job.pairs) {
    job.totals[row] = job.level->load_plain(x, job.y.type, k, job.rows + row * k);
    return;
  }
  uint16_t* to = reinterpret_cast<uint16_t*>(job.rows) + row * even(k);
  to[even(k) - 1] = 0;
  std::memcpy(to, x, static_cast<size_t>(2 * k));
}

void multiply_one(void* context, int64_t tile) {
  const Multiplication& job = *static_cast<const Multiplication*>(context);
  const Stored* w = job.w;
  const int64_t sums = job.m * w->tile, first = tile * w->tile, last = first + w->tile;
  Outputs y = job.y;
  if (job.weight->rank) {
    job.level->add_times_b(job.weight, job.inner, y, first, last < w->n ? last : w->n, job.added);
    y.bias = job.added;
    y.bias_type = FLOAT32;
    y.bias_stride = w->n;
  }
  float* workspace = reinterpret_cast<float*>(worker_scratch.at_least(static_cast<size_t>(4 * (PART_VALUES + sums))));
  const Inputs inputs{job.rows, job.totals, nullptr, job.pairs ? even(w->k) : w->k, 1, static_cast<int>(job.m)};
  (job.pairs ? job.level->multiply_trellis_pairs : job.level->multiply_trellis)(w, inputs, y, tile, workspace);
}

// Puts the job's share of the caller's scratch at `room`; returns its bytes. At 0 this only counts them.
size_t take_room(Multiplication& job, int64_t rows, uintptr_t room) {
  const int64_t rank = job.weight->rank;
  size_t used = 0;
  const auto next = [&](int64_t values) {
    const uintptr_t at = room + used;
    used += aligned(static_cast<size_t>(4 * values));
    return reinterpret_cast<float*>(at);
  };
  job.rows = next(rows * job.w->k);
  job.totals = next(rows);
  job.inner = next(rows * rank);
  job.added = next(rank ? rows * job.w->n : 0);
  return used;
}

struct Unpacking {
  const Stored* w;
  char* out;
  Type type;
  int64_t from, stride;
};

void unpack_one(void* context, int64_t tile) {
  const Unpacking& job = *static_cast<const Unpacking*>(context);
  float* workspace = reinterpret_cast<float*>(worker_scratch.at_least(4 * PART_VALUES));
  char* to = job.out + tile * job.w->tile * size_of(job.type);
  level().unpack_trellis(job.w, job.from / job.w->tile + tile, to, job.type, job.stride, workspace);
}

}  // namespace

bool is_weight(const Stored* w) {
  int64_t column = 0, bytes = 0;
  if (w->bits < LEAST_BITS || w->bits > MOST_BITS || !is_tile(w->tile) || w->n < 1 || w->k < 1) return false;
  const int64_t tiles = w->n / w->tile + (w->n % w->tile != 0);
  return !__builtin_mul_overflow(tiles, int64_t{w->tile} * w->bits / 8, &column) &&
         !__builtin_mul_overflow(column, w->k, &bytes) && bytes == w->code_bytes;
}

bool takes_many_rows() { return !level().multiply_trellis_pairs; }

bool are_tiles(const Stored* w, int64_t from, int64_t to) {
  return from >= 0 && from < to && to <= w->n && from % w->tile == 0 && (to % w->tile == 0 || to == w->n);
}

void multiply(const Product& product, const Call& call) {
  Multiplication job{};
  job.level = &level();
  job.weight = &product.weight;
  job.w = static_cast<const Stored*>(product.weight.image);
  const int64_t n = job.w->n, k = job.w->k, size = size_of(call.type);
  const int64_t slab = call.m < SLAB ? call.m : SLAB;
  take_room(job, slab, reinterpret_cast<uintptr_t>(caller_scratch.at_least(take_room(job, slab, 0))));
  for (int64_t from = 0; from < call.m; from += slab) {
    job.m = call.m - from < slab ? call.m - from : slab;
    job.pairs = call.type == BFLOAT16 && job.m > 1 && job.level->multiply_trellis_pairs;
    job.x = static_cast<const char*>(call.x) + from * k * size;
    job.y = Outputs{static_cast<char*>(product.y) + from * n * size, product.bias, call.type,
                    static_cast<Type>(product.bias_type), n, static_cast<int>(job.m)};
    const int64_t cost = cost_of_row(k, job.weight->rotation, job.weight->rank);
    share_out(job.m, threads_for_rows(job.m, cost, call.threads), load_row, &job);
    share_out(tiles_of(job.w), threads_for_rows(job.m + DECODING, n * k, call.threads), multiply_one, &job);
  }
}

void unpack(const Stored* w, int64_t from, int64_t to, void* out, Type type, int threads) {
  Unpacking job{w, static_cast<char*>(out), type, from, to - from};
  share_out((to - from + w->tile - 1) / w->tile, threads, unpack_one, &job);
}

}  // namespace trellis
