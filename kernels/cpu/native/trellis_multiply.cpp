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

enum Kind { BY_FLOAT, BY_PAIRS, BY_INT8 };

struct Multiplication {
  const Level* level;
  const Weight* weight;
  const Stored* w;
  const char* x;
  Outputs y;
  int64_t m;
  Kind kind;
  float *rows, *totals;   // x as floats [m][k], rotated, and its sums; or as bfloat16 [m][even(k)]
  int8_t* rounded;        // int8 activations, and their scales
  float* scales;
  float *inner, *added;   // the low-rank addition, half done [m][rank] and with the bias [m][n]
};

void load_row(const Multiplication& job, int64_t row) {
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
  if (job.kind == BY_PAIRS) {
    uint16_t* to = reinterpret_cast<uint16_t*>(job.rows) + row * even(k);
    to[even(k) - 1] = 0;
    std::memcpy(to, x, static_cast<size_t>(2 * k));
    return;
  }
  job.totals[row] = job.level->load_plain(x, job.y.type, k, job.rows + row * k);
  if (job.kind == BY_INT8) job.totals[row] = job.level->round_plain(job.rows, k, job.rounded, job.scales);
}

void multiply_tile(const Multiplication& job, int64_t tile) {
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
  const int64_t stride = job.kind == BY_PAIRS ? even(w->k) : w->k;
  const void* rows = job.kind == BY_INT8 ? static_cast<const void*>(job.rounded) : job.rows;
  const Inputs inputs{rows, job.totals, job.scales, stride, 1, static_cast<int>(job.m)};
  const auto kernel = job.kind == BY_PAIRS  ? job.level->multiply_trellis_pairs
                      : job.kind == BY_INT8 ? job.level->multiply_trellis_int8
                                            : job.level->multiply_trellis;
  kernel(w, inputs, y, tile, workspace);
}

Kind kind_of(const Level& level, Type type, bool int8, int64_t m) {
  if (int8 && m == 1 && level.multiply_trellis_int8) return BY_INT8;
  return type == BFLOAT16 && m > 1 && level.multiply_trellis_pairs ? BY_PAIRS : BY_FLOAT;
}

// Puts a product's share of the caller's scratch at `room`, rows of x that another has loaded aside; returns its bytes. At
// 0 this only counts them.
size_t take_room(Multiplication& job, const Multiplication* loaded, int64_t rows, uintptr_t room) {
  if (loaded) {
    job.rows = loaded->rows, job.totals = loaded->totals, job.rounded = loaded->rounded, job.scales = loaded->scales;
    return 0;
  }
  const int64_t rank = job.weight->rank;
  size_t used = 0;
  const auto next = [&](int64_t bytes) {
    const uintptr_t at = room + used;
    used += aligned(static_cast<size_t>(bytes));
    return at;
  };
  job.rows = reinterpret_cast<float*>(next(4 * rows * job.w->k));
  job.totals = reinterpret_cast<float*>(next(4 * rows));
  job.rounded = reinterpret_cast<int8_t*>(next(job.kind == BY_INT8 ? job.w->k : 0));
  job.scales = reinterpret_cast<float*>(next(job.kind == BY_INT8 ? 4 * ((job.w->k + BLOCK - 1) / BLOCK) : 0));
  job.inner = reinterpret_cast<float*>(next(4 * rows * rank));
  job.added = reinterpret_cast<float*>(next(rank ? 4 * rows * job.w->n : 0));
  return used;
}

// The products of a call. Threads take their tiles from one list: waking threads costs as much as a small product.
struct Together {
  Multiplication jobs[LARGEST_GROUP];
  int count, loader_count;
  int loaders[LARGEST_GROUP];  // which of them load rows of x
  int64_t m, first_tile[LARGEST_GROUP + 1];

  Together(const Product* products, int given, const Call& call) : jobs{}, count(given), m(0) {
    first_tile[0] = 0;
    for (int i = 0; i < count; ++i) {
      jobs[i].level = &level();
      jobs[i].weight = &products[i].weight;
      jobs[i].w = static_cast<const Stored*>(products[i].weight.image);
      jobs[i].kind = kind_of(level(), call.type, call.int8, call.m);
      first_tile[i + 1] = first_tile[i] + tiles_of(jobs[i].w);
    }
  }

  size_t take_rooms(int64_t rows, uintptr_t room) {
    size_t used = 0;
    loader_count = 0;
    for (int i = 0; i < count; ++i) {
      const Multiplication* loaded = nullptr;
      for (int j = 0; j < loader_count && !loaded; ++j) {
        const Weight &mine = *jobs[i].weight, &other = *jobs[loaders[j]].weight;
        if (mine.rotation == other.rotation && !mine.rank && !other.rank) loaded = &jobs[loaders[j]];
      }
      used += take_room(jobs[i], loaded, rows, room + used);
      if (!loaded) loaders[loader_count++] = i;
    }
    return used;
  }

  void go_to(const Product* products, const Call& call, int64_t from, int64_t rows) {
    m = rows;
    for (int i = 0; i < count; ++i) {
      const int64_t n = jobs[i].w->n, size = size_of(call.type);
      jobs[i].m = rows;
      jobs[i].x = static_cast<const char*>(call.x) + from * jobs[i].w->k * size;
      jobs[i].y = Outputs{static_cast<char*>(products[i].y) + from * n * size, products[i].bias, call.type,
                          static_cast<Type>(products[i].bias_type), n, static_cast<int>(rows)};
    }
  }
};

void load_one(void* context, int64_t i) {
  const Together& all = *static_cast<const Together*>(context);
  load_row(all.jobs[all.loaders[i / all.m]], i % all.m);
}

void multiply_one(void* context, int64_t tile) {
  const Together& all = *static_cast<const Together*>(context);
  int i = 0;
  while (tile >= all.first_tile[i + 1]) ++i;
  multiply_tile(all.jobs[i], tile - all.first_tile[i]);
}

void run(Together& all, int threads) {
  int64_t cost = 0, products = 0;
  for (int i = 0; i < all.loader_count; ++i) {
    const Multiplication& job = all.jobs[all.loaders[i]];
    cost += cost_of_row(job.w->k, job.weight->rotation, job.weight->rank);
  }
  for (int i = 0; i < all.count; ++i) products += all.jobs[i].w->n * all.jobs[i].w->k;
  share_out(all.loader_count * all.m, threads_for_rows(all.m, cost, threads), load_one, &all);
  share_out(all.first_tile[all.count], threads_for_rows(all.m + DECODING, products, threads), multiply_one, &all);
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

void multiply(const Product* products, int count, const Call& call) {
  Together all(products, count, call);
  const int64_t slab = call.m < SLAB ? call.m : SLAB;
  all.take_rooms(slab, reinterpret_cast<uintptr_t>(caller_scratch.at_least(all.take_rooms(slab, 0))));
  for (int64_t from = 0; from < call.m; from += slab) {
    all.go_to(products, call, from, call.m - from < slab ? call.m - from : slab);
    run(all, call.threads);
  }
}

void unpack(const Stored* w, int64_t from, int64_t to, void* out, Type type, int threads) {
  Unpacking job{w, static_cast<char*>(out), type, from, to - from};
  share_out((to - from + w->tile - 1) / w->tile, threads, unpack_one, &job);
}

}  // namespace trellis
