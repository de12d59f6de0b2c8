#include "multiply.h"

#include <cstring>

#include "cost.h"
#include "kept.h"
#include "levels.h"
#include "scratch.h"
#include "threads.h"
#include "tiles.h"

namespace {

constexpr int64_t SLAB = 64;                // rows of x for which a piece of W stays in a core's cache
// Making rounded weights is shared by all rows of a slab, whose sums for a piece of strips must fit the second cache.
// 512 rows take 0.95 of the time of twice 256, 1024 take 1.1 of twice 512. A piece of 32 strips reads x, which may come
// from the third cache, a quarter as often as one of 8: 256 rows of 4096 then take 0.85 of the time.
constexpr int64_t ROUNDED_SLAB = 512, ROUNDED_STRIPS = 32;
constexpr int64_t WEIGHTS_SLAB = 192;  // the same for weights made floats: a tenth of their time is making them
// Of packed weight that a thread takes at once: an eighth of a Zen 5's L2 where it is read for several tiles of rows; much
// where it is read once, since reading must get going again with every piece (128 KB take 1.15 times as long as 2 MB).
constexpr int64_t PIECE_BYTES = 128 << 10, STREAM_BYTES = 2 << 20;

// Strips that kernels of bfloat16 take at once: pieces of fewer, as of long rows, make 4 rows take 1.15 times as long.
constexpr int64_t SIDE_BY_SIDE = 4;
// Rows from which weights with scales of inputs are rounded: elsewhere every group of outputs multiplies its scales into rows
// of floats. At 2 rows that takes 0.7 to 1.1 times as long, at 3 and 4 1.5 to 2.1 times, at 128 5 times (Zen 5).
constexpr int64_t PER_IC_ROUNDED_FROM = 3;
constexpr int64_t PER_IC_WEIGHTS_FROM = 9;  // for the same reason, where tiles of rows are smaller; level at 8

thread_local Scratch caller_scratch, worker_scratch;

int padded_tile(int64_t rows, int largest) {
  const int64_t tiles = (rows + largest - 1) / largest, even = (rows + tiles - 1) / tiles;
  const int fitting = even > 4 ? 8 : even > 2 ? 4 : static_cast<int>(even);
  return fitting < largest ? fitting : largest;
}

int64_t size_of(Type type) { return type == FLOAT32 ? 4 : 2; }

enum Kind { BY_FLOAT, BY_BFLOAT16, BY_INT8, BY_TILES, BY_ROUNDED, BY_WEIGHTS };
bool goes_in_tiles(Kind kind) { return kind == BY_TILES || kind == BY_ROUNDED; }
bool takes_all_rows(Kind kind) { return goes_in_tiles(kind) || kind == BY_WEIGHTS; }

struct Multiplication {
  const Level* level;
  const Image* w;
  const Weight* weight;
  const char* x;
  char* y;
  const void* bias;
  Type type, bias_type;
  Kind kind;
  int64_t m;
  // The rows of x in the order of the blocks, as the kernel wants them; per_ic leaves the scaling to the workers.
  char* ordered;
  float *sums, *scales;
  float *inner, *added;  // the low-rank addition, half done [m][rank] and with the bias [m][n]
  int64_t row_bytes, strips_in_piece;
};

// Sums of a row of x: one for each group, and for each unit of it where products go in tiles.
int64_t sums_of_row(const Multiplication& job) {
  if (job.kind == BY_ROUNDED || job.kind == BY_WEIGHTS) return 0;
  if (job.w->per_ic) return 1;
  return job.kind == BY_TILES ? job.w->groups * units_of_group(job.w) : job.w->groups;
}

// Rows of a tile side by side in every block: loads of a tile from rows far apart would each touch 16 pages.
void order_into_tiles(const Multiplication& job, const void* x, int64_t row, uint16_t* workspace, float* sums) {
  const int64_t height = job.kind == BY_ROUNDED ? TILE_ROWS : job.m;
  char* to = job.ordered + row / TILE_ROWS * TILE_ROWS * job.row_bytes + row % TILE_ROWS * VECTOR;
  if (height == 1) return job.level->load_bfloat16(job.w, x, reinterpret_cast<uint16_t*>(to), sums);
  job.level->load_bfloat16(job.w, x, workspace, sums);
  for (int64_t b = 0; b < job.w->blocks; ++b) std::memcpy(to + b * height * VECTOR, workspace + b * BLOCK, VECTOR);
}

void fit(const Multiplication& job, float* row) {
  if (job.level->fit_fields) job.level->fit_fields(job.w, row);
}

void order_row(const Multiplication& job, const void* x, int64_t row, float* workspace) {
  char* to = job.ordered + row * job.row_bytes;
  if (is_sparse(job.w) && job.kind == BY_BFLOAT16) return job.level->load_kept_bfloat16(job.w, x, reinterpret_cast<uint16_t*>(to));
  if (is_sparse(job.w)) return job.level->load_kept(job.w, x, job.type, reinterpret_cast<float*>(to));
  float* sums = !sums_of_row(job) ? nullptr : job.sums + row * sums_of_row(job);
  if (goes_in_tiles(job.kind)) return order_into_tiles(job, x, row, reinterpret_cast<uint16_t*>(workspace), sums);
  if (job.kind == BY_BFLOAT16) return job.level->load_bfloat16(job.w, x, reinterpret_cast<uint16_t*>(to), sums);
  const bool stays = job.kind == BY_FLOAT || job.kind == BY_WEIGHTS || job.w->per_ic;
  job.level->load_float(job.w, x, job.type, stays ? reinterpret_cast<float*>(to) : workspace, sums);
  if (job.kind == BY_FLOAT && !job.w->per_ic) fit(job, reinterpret_cast<float*>(to));
  if (stays) return;
  job.level->load_int8(job.w, workspace, reinterpret_cast<int8_t*>(to), job.scales + row * job.w->blocks, sums);
}

void load_row(void* context, int64_t row) {
  const Multiplication& job = *static_cast<const Multiplication*>(context);
  const Image* w = job.w;
  const int64_t row_size = w->k * size_of(job.type);
  const Rotation* rotation = job.weight->rotation;
  const size_t rotated = rotation ? aligned(static_cast<size_t>(row_size)) : 0;
  const size_t ordered = static_cast<size_t>(4 * w->blocks * BLOCK), rotating = rotation_room(rotation);
  char* room = worker_scratch.at_least(rotated + (ordered > rotating ? ordered : rotating));
  float* workspace = reinterpret_cast<float*>(room + rotated);
  const void* x = job.x + row * row_size;
  if (rotation) {
    job.level->rotate(rotation, x, job.type, room, workspace);
    x = room;
  }
  if (job.weight->rank) job.level->times_a(job.weight, w->k, x, job.type, job.inner + row * job.weight->rank);
  order_row(job, x, row, workspace);
}

Kind kind_of(const Multiplication& job, const Call& call) {
  const bool bfloat16 = call.type == BFLOAT16;
  if (is_sparse(job.w)) return bfloat16 && call.m == 1 && job.level->by_kept_bfloat16 && fits_pairs(job.w) ? BY_BFLOAT16 : BY_FLOAT;
  if (call.int8 && job.level->by_int8) return BY_INT8;
  if (job.level->by_weights && call.m >= (job.w->per_ic ? PER_IC_WEIGHTS_FROM : job.level->weights_from)) return BY_WEIGHTS;
  if (!bfloat16 || !job.level->by_bfloat16) return BY_FLOAT;
  if (job.level->by_rounded && call.m >= (job.w->per_ic ? PER_IC_ROUNDED_FROM : job.level->rounded_from)) return BY_ROUNDED;
  if (job.w->per_ic) return BY_FLOAT;
  return job.level->by_tiles ? BY_TILES : BY_BFLOAT16;
}

Strips kernel_of(const Multiplication& job) {
  if (is_sparse(job.w)) return job.kind == BY_BFLOAT16 ? job.level->by_kept_bfloat16 : job.level->by_kept;
  if (job.kind == BY_TILES) return job.level->by_tiles;
  if (job.kind == BY_ROUNDED) return job.level->by_rounded;
  if (job.kind == BY_WEIGHTS) return job.level->by_weights;
  return job.kind == BY_INT8 ? job.level->by_int8 : job.kind == BY_BFLOAT16 ? job.level->by_bfloat16 : job.level->by_float;
}

void multiply_tile(const Multiplication& job, Inputs inputs, int64_t row, int64_t from, int64_t to) {
  const int64_t n = job.w->n, left = job.m - row;
  const bool own = job.weight->rank > 0;
  Outputs out{job.y + row * n * size_of(job.type), own ? job.added + row * n : job.bias, job.type,
              own ? FLOAT32 : job.bias_type, n, static_cast<int>(left < inputs.m ? left : inputs.m), own ? n : 0};
  kernel_of(job)(job.w, inputs, out, from, to);
}

// Every group of outputs scales x in its own way.
void multiply_per_ic(const Multiplication& job, int64_t row, int m, int64_t from, int64_t to) {
  const Image* w = job.w;
  const int64_t count = w->blocks * BLOCK;
  const size_t row_bytes = static_cast<size_t>(4 * count), int8_bytes = aligned(static_cast<size_t>(count));
  char* room = worker_scratch.at_least(m * (row_bytes + int8_bytes + 4 * static_cast<size_t>(w->blocks) + 64));
  float* scaled = reinterpret_cast<float*>(room);
  int8_t* rounded = reinterpret_cast<int8_t*>(room + m * row_bytes);
  float* scales = reinterpret_cast<float*>(room + m * (row_bytes + int8_bytes));
  float sums[8];
  while (from < to) {
    const int64_t group = from / w->group_strips, end = (group + 1) * w->group_strips;
    for (int i = 0; i < m; ++i) {
      const float* ordered = reinterpret_cast<const float*>(job.ordered + (row + i) * job.row_bytes);
      const bool whole = job.kind == BY_FLOAT && job.level->fit_fields;
      const float offset = job.level->scale_inputs(w, ordered, group, scaled + i * count, whole ? 0 : w->mid);
      sums[i] = offset;
      if (job.kind == BY_FLOAT) {
        fit(job, scaled + i * count);
      } else {
        job.level->load_int8(w, scaled + i * count, rounded + i * count, scales + i * w->blocks, &sums[i]);
        sums[i] -= offset / static_cast<float>(w->mid);  // the kernel multiplies it with -mid
      }
    }
    const void* rows = job.kind == BY_INT8 ? static_cast<const void*>(rounded) : scaled;
    multiply_tile(job, Inputs{rows, sums, scales, count, 1, m}, row, from, end < to ? end : to);
    from = end;
  }
}

void add_low_rank(const Multiplication& job, int64_t from, int64_t to) {
  const int64_t first = first_row(job.w, from), last = first_row(job.w, to - 1) + rows_in(job.w, to - 1);
  const Outputs all_rows{job.y, job.bias, job.type, job.bias_type, job.w->n, static_cast<int>(job.m)};
  job.level->add_times_b(job.weight, job.inner, all_rows, first, last, job.added);
}

int rows_at_once(const Multiplication& job) { return takes_all_rows(job.kind) ? static_cast<int>(job.m) : job.level->tile; }

void multiply_piece(void* context, int64_t piece) {
  const Multiplication& job = *static_cast<const Multiplication*>(context);
  const Image* w = job.w;
  const int64_t from = piece * job.strips_in_piece, all = w->strips;
  const int64_t to = from + job.strips_in_piece < all ? from + job.strips_in_piece : all;
  if (job.weight->rank) add_low_rank(job, from, to);
  const int64_t sums_stride = sums_of_row(job), value = job.kind == BY_INT8 ? 1 : job.kind == BY_FLOAT || job.kind == BY_WEIGHTS ? 4 : 2;
  const bool all_rows = takes_all_rows(job.kind);
  const int tile = rows_at_once(job);
  for (int64_t row = 0, m; row < job.m; row += m) {
    m = all_rows ? tile : padded_tile(job.m - row, tile);
    if (w->per_ic && !all_rows) {
      multiply_per_ic(job, row, m, from, to);
      continue;
    }
    multiply_tile(job, Inputs{job.ordered + row * job.row_bytes, job.sums + row * sums_stride,
                              job.scales + row * w->blocks, job.row_bytes / value, sums_stride, m}, row, from, to);
  }
}

int64_t value_size(const Multiplication& job) {  // a unit of dropped groups takes as much in pairs of bfloat16
  if (is_sparse(job.w)) return 4;
  return job.kind == BY_BFLOAT16 || goes_in_tiles(job.kind) ? 2 : job.kind == BY_INT8 && !job.w->per_ic ? 1 : 4;
}

// Whether two products take the rows of x in one order, with the same sums: q, k and v of one spec do.
bool same_inputs(const Multiplication& a, const Multiplication& b) {
  return a.weight->rotation == b.weight->rotation && !a.weight->rank && !b.weight->rank && a.w->bits == b.w->bits &&
         a.w->per_ic == b.w->per_ic && a.w->symmetric == b.w->symmetric && is_sparse(a.w) == is_sparse(b.w) &&
         (is_sparse(a.w) || a.w->group_blocks == b.w->group_blocks) && (a.w->per_ic || a.w->group == b.w->group);
}

// Puts a product's share of the caller's scratch at `room`, rows of x that another has loaded aside; returns its bytes.
size_t take_room(Multiplication& job, const Multiplication* loaded, int64_t rows, uintptr_t room) {
  const Image* w = job.w;
  job.row_bytes = w->blocks * BLOCK * value_size(job);
  if (loaded) {
    job.ordered = loaded->ordered, job.sums = loaded->sums, job.scales = loaded->scales;
    return 0;
  }
  const int64_t tile = goes_in_tiles(job.kind) ? TILE_ROWS : job.kind == BY_WEIGHTS ? 1 : job.level->tile, padded = (rows + tile - 1) / tile * tile, rank = job.weight->rank;
  size_t used = 0;
  const auto next = [&](int64_t bytes) {
    const uintptr_t at = room + used;
    used += aligned(static_cast<size_t>(bytes));
    return at;
  };
  job.ordered = reinterpret_cast<char*>(next(padded * job.row_bytes));
  job.sums = reinterpret_cast<float*>(next(4 * padded * sums_of_row(job)));
  job.scales = reinterpret_cast<float*>(next(4 * padded * w->blocks));
  job.inner = reinterpret_cast<float*>(next(4 * rows * rank));
  job.added = reinterpret_cast<float*>(next(rank ? 4 * rows * w->n : 0));
  return used;
}

// The products of a call. Threads take their pieces from one list: waking threads costs as much as a small product.
struct Together {
  Multiplication jobs[LARGEST_GROUP];
  int count;
  int loaders[LARGEST_GROUP];  // which of them load rows of x
  int loader_count;
  int64_t m, first_piece[LARGEST_GROUP + 1];

  void add(const Product& product, const Call& call) {
    Multiplication& job = jobs[count++] = Multiplication{};
    job.weight = &product.weight;
    job.w = static_cast<const Image*>(product.weight.image);
    job.level = &level();
    job.bias = product.bias;
    job.type = call.type;
    job.bias_type = static_cast<Type>(product.bias_type);
    job.kind = kind_of(job, call);
  }

  // At 0 this only counts the bytes.
  size_t take_rooms(int64_t rows, uintptr_t room) {
    size_t used = 0;
    loader_count = 0;
    for (int i = 0; i < count; ++i) {
      const Multiplication* loaded = nullptr;
      for (int j = 0; j < loader_count && !loaded; ++j)
        if (same_inputs(jobs[i], jobs[loaders[j]])) loaded = &jobs[loaders[j]];
      used += take_room(jobs[i], loaded, rows, room + used);
      if (!loaded) loaders[loader_count++] = i;
    }
    return used;
  }

  int64_t slab() const {
    int64_t rows = ROUNDED_SLAB;
    for (int i = 0; i < count; ++i) {
      const int64_t own = jobs[i].kind == BY_ROUNDED ? ROUNDED_SLAB : jobs[i].kind == BY_WEIGHTS ? WEIGHTS_SLAB : SLAB;
      rows = own < rows ? own : rows;
    }
    return rows;
  }

  void go_to(const Product* products, const Call& call, int64_t from) {
    m = call.m - from < slab() ? call.m - from : slab();
    for (int i = 0; i < count; ++i) {
      const int64_t size = size_of(call.type);
      jobs[i].m = m;
      jobs[i].x = static_cast<const char*>(call.x) + from * jobs[i].w->k * size;
      jobs[i].y = static_cast<char*>(products[i].y) + from * jobs[i].w->n * size;
    }
  }
};

void load_one(void* context, int64_t i) {
  Together& all = *static_cast<Together*>(context);
  load_row(&all.jobs[all.loaders[i / all.m]], i % all.m);
}

void multiply_one(void* context, int64_t piece) {
  Together& all = *static_cast<Together*>(context);
  int i = 0;
  while (piece >= all.first_piece[i + 1]) ++i;
  multiply_piece(&all.jobs[i], piece - all.first_piece[i]);
}

void load(Together& all, int threads) {
  int64_t cost = 0;
  for (int i = 0; i < all.loader_count; ++i) {
    const Multiplication& job = all.jobs[all.loaders[i]];
    cost += cost_of_row(job.w->k, job.weight->rotation, job.weight->rank);
  }
  share_out(all.loader_count * all.m, threads_for_rows(all.m, cost, threads), load_one, &all);
}

// Pieces that fit a core's cache, a few for each thread, and no thread for next to nothing.
void run(Together& all, int threads) {
  int64_t strips = 0, products = 0;
  for (int i = 0; i < all.count; ++i) {
    strips += all.jobs[i].w->strips;
    products += products_per_row(all.jobs[i].w) * all.m;
  }
  if (products < ALONE) threads = 1;
  const int64_t even = (strips + 4 * threads - 1) / (4 * threads);
  for (int i = 0; i < all.count; ++i) {
    Multiplication& job = all.jobs[i];
    const int64_t strip_bytes = is_sparse(job.w) ? job.w->bytes / job.w->strips : job.w->blocks * job.w->bits * VECTOR;
    const int64_t most = (rows_at_once(job) >= job.m ? STREAM_BYTES : PIECE_BYTES) / strip_bytes;
    job.strips_in_piece = even < most ? even : most;
    if (job.strips_in_piece < SIDE_BY_SIDE) job.strips_in_piece = even < SIDE_BY_SIDE ? even : SIDE_BY_SIDE;
    if (job.kind == BY_ROUNDED || job.kind == BY_WEIGHTS) job.strips_in_piece = even >= ROUNDED_STRIPS ? ROUNDED_STRIPS : (even + 1) / 2 * 2;
    all.first_piece[i + 1] = all.first_piece[i] + (job.w->strips + job.strips_in_piece - 1) / job.strips_in_piece;
  }
  share_out(all.first_piece[all.count], threads, multiply_one, &all);
}

}  // namespace

bool takes_many_rows(const Image* w) { return !is_sparse(w) || !level().by_bfloat16; }

void multiply(const Product* products, int count, const Call& call) {
  Together all;
  all.count = 0;
  all.first_piece[0] = 0;
  for (int i = 0; i < count; ++i) all.add(products[i], call);
  const int64_t slab = all.slab(), rows = call.m < slab ? call.m : slab;
  char* room = caller_scratch.at_least(all.take_rooms(rows, 0));
  all.take_rooms(rows, reinterpret_cast<uintptr_t>(room));
  for (int64_t from = 0; from < call.m; from += slab) {
    all.go_to(products, call, from);
    load(all, call.threads);
    run(all, call.threads);
  }
}

namespace {
struct Rotating {
  const Rotation* rotation;
  const char* x;
  char* out;
  Type type;
};

void rotate_row(void* context, int64_t row) {
  const Rotating& job = *static_cast<const Rotating*>(context);
  const int64_t at = row * job.rotation->width * size_of(job.type);
  float* workspace = reinterpret_cast<float*>(worker_scratch.at_least(rotation_room(job.rotation)));
  level().rotate(job.rotation, job.x + at, job.type, job.out + at, workspace);
}
}  // namespace

void rotate_rows(const Rotation& rotation, const void* x, void* out, int64_t m, Type type, int threads) {
  Rotating job{&rotation, static_cast<const char*>(x), static_cast<char*>(out), type};
  share_out(m, threads_for_rows(m, cost_of_row(rotation.width, &rotation, 0), threads), rotate_row, &job);
}
