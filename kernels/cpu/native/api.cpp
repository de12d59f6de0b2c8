#include "api.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "levels.h"
#include "pack.h"
#include "threads.h"

namespace {

constexpr int64_t SLAB = 64;                // rows of x for which a piece of W stays in a core's cache
constexpr int64_t PIECE_BYTES = 128 << 10;  // of packed weight that a thread takes at once: an eighth of a Zen 5's L2
constexpr int64_t ALONE = 1 << 19;          // products below which one thread is faster: 7 us alone, 3 to 9 to wake another

// Room for a thread's own use, kept between calls.
class Scratch {
 public:
  ~Scratch() { std::free(room_); }
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      std::free(room_);
      size_ = (bytes + 4095) / 4096 * 4096;
      room_ = static_cast<char*>(std::aligned_alloc(64, size_));
      if (!room_) std::abort();
    }
    return room_;
  }

 private:
  char* room_ = nullptr;
  size_t size_ = 0;
};

thread_local Scratch caller_scratch, worker_scratch;

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

int padded_tile(int64_t rows, int largest) {
  const int fitting = rows >= 5 ? 8 : rows >= 3 ? 4 : static_cast<int>(rows);
  return fitting < largest ? fitting : largest;
}

enum Kind { BY_FLOAT, BY_BFLOAT16, BY_INT8 };

struct Multiplication {
  const Level* level;
  const Image* w;
  const char* x;
  char* y;
  const void* bias;
  Type type, bias_type;
  Kind kind;
  int64_t m;
  // The rows of x in the order of the blocks, as the kernel wants them; per_ic leaves the scaling to the workers.
  char* ordered;
  float *sums, *scales;
  int64_t row_bytes, strips_in_piece;
  int element_size;
};

int64_t groups_of_inputs(const Image* w) { return w->per_ic ? 1 : w->groups; }

void load_row(const Multiplication& job, int64_t row, float* workspace) {
  const void* x = job.x + row * job.w->k * job.element_size;
  char* to = job.ordered + row * job.row_bytes;
  float* sums = job.sums + row * groups_of_inputs(job.w);
  if (job.kind == BY_BFLOAT16) return job.level->load_bfloat16(job.w, x, reinterpret_cast<uint16_t*>(to), sums);
  if (job.kind == BY_FLOAT || job.w->per_ic) return job.level->load_float(job.w, x, job.type, reinterpret_cast<float*>(to), sums);
  job.level->load_float(job.w, x, job.type, workspace, sums);
  job.level->load_int8(job.w, workspace, reinterpret_cast<int8_t*>(to), job.scales + row * job.w->blocks, sums);
}

void multiply_tile(const Multiplication& job, Inputs inputs, int64_t row, int64_t from, int64_t to) {
  const int64_t left = job.m - row;
  Outputs out{job.y + row * job.w->n * job.element_size, job.bias, job.type, job.bias_type, job.w->n,
              static_cast<int>(left < inputs.m ? left : inputs.m)};
  const Strips kernel = job.kind == BY_INT8 ? job.level->by_int8 : job.kind == BY_BFLOAT16 ? job.level->by_bfloat16 : job.level->by_float;
  kernel(job.w, inputs, out, from, to);
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
      const float offset = job.level->scale_inputs(w, ordered, group, scaled + i * count);
      sums[i] = offset;
      if (job.kind == BY_INT8) {
        job.level->load_int8(w, scaled + i * count, rounded + i * count, scales + i * w->blocks, &sums[i]);
        sums[i] -= offset / static_cast<float>(w->mid);  // the kernel multiplies it with -mid
      }
    }
    const void* rows = job.kind == BY_INT8 ? static_cast<const void*>(rounded) : scaled;
    multiply_tile(job, Inputs{rows, sums, scales, count, 1, m}, row, from, end < to ? end : to);
    from = end;
  }
}

void multiply_piece(void* context, int64_t piece) {
  const Multiplication& job = *static_cast<const Multiplication*>(context);
  const Image* w = job.w;
  const int64_t from = piece * job.strips_in_piece, all = w->strips;
  const int64_t to = from + job.strips_in_piece < all ? from + job.strips_in_piece : all;
  const int64_t sums_stride = groups_of_inputs(w), value = job.kind == BY_INT8 ? 1 : job.kind == BY_BFLOAT16 ? 2 : 4;
  for (int64_t row = 0; row < job.m; row += job.level->tile) {
    const int m = padded_tile(job.m - row, job.level->tile);
    if (w->per_ic) {
      multiply_per_ic(job, row, m, from, to);
      continue;
    }
    multiply_tile(job, Inputs{job.ordered + row * job.row_bytes, job.sums + row * sums_stride,
                              job.scales + row * w->blocks, job.row_bytes / value, sums_stride, m}, row, from, to);
  }
}

// Pieces that fit a core's cache, a few for each thread, and no thread for next to nothing.
void run(Multiplication& job, int threads) {
  const Image* w = job.w;
  const int64_t strip_bytes = w->blocks * w->bits * VECTOR;
  if (w->n * w->k * job.m < ALONE) threads = 1;
  const int64_t even = (w->strips + 4 * threads - 1) / (4 * threads);
  const int64_t cached = PIECE_BYTES / strip_bytes > 0 ? PIECE_BYTES / strip_bytes : 1;
  job.strips_in_piece = even < cached ? even : cached;
  share_out((w->strips + job.strips_in_piece - 1) / job.strips_in_piece, threads, multiply_piece, &job);
}

}  // namespace

int32_t quantc_cpu_version() { return static_cast<int32_t>(VERSION); }

const char* quantc_cpu_levels() {
  static const std::string names = [] {
    std::string text;
    for (int i = 0; i < level_count(); ++i) text += (i ? " " : "") + std::string(level_at(i).name);
    return text;
  }();
  return names.c_str();
}

const char* quantc_cpu_level() { return level().name; }
int32_t quantc_cpu_choose_level(const char* name) { return choose_level(name); }
int32_t quantc_cpu_has_int8() { return level().by_int8 != nullptr; }
const char* quantc_cpu_pool() { return pool_name(); }

int64_t quantc_cpu_image_bytes(int32_t bits, int64_t n, int64_t k, int64_t group, int32_t per_ic, int32_t symmetric) {
  return describe(bits, n, k, group, per_ic != 0, symmetric != 0).bytes;
}

void quantc_cpu_pack(int32_t bits, int64_t n, int64_t k, int64_t group, int32_t per_ic, const void* codes,
                     const void* scales, const void* zeros, void* image, int32_t threads) {
  pack(describe(bits, n, k, group, per_ic != 0, zeros == nullptr), bits, static_cast<const uint8_t*>(codes),
       static_cast<const uint16_t*>(scales), static_cast<const uint8_t*>(zeros), threads, image);
}

void quantc_cpu_matmul(const void* image, const void* x, void* y, const void* bias, int64_t m, int32_t type,
                       int32_t bias_type, int32_t int8, int32_t threads) {
  Multiplication job{};
  const Image* w = job.w = static_cast<const Image*>(image);
  job.level = &level();
  job.bias = bias;
  job.type = static_cast<Type>(type);
  job.bias_type = static_cast<Type>(bias_type);
  job.element_size = job.type == FLOAT32 ? 4 : 2;
  const bool by_bfloat16 = job.type == BFLOAT16 && job.level->by_bfloat16 && !w->per_ic;
  job.kind = int8 && job.level->by_int8 ? BY_INT8 : by_bfloat16 ? BY_BFLOAT16 : BY_FLOAT;
  const int64_t count = w->blocks * BLOCK, groups = groups_of_inputs(w);
  const int64_t value = job.kind == BY_BFLOAT16 ? 2 : job.kind == BY_INT8 && !w->per_ic ? 1 : 4;
  job.row_bytes = count * value;
  const int64_t slab = m < SLAB ? m : SLAB, tile = job.level->tile, rows = (slab + tile - 1) / tile * tile;
  const size_t ordered = aligned(static_cast<size_t>(rows * job.row_bytes));
  const size_t sums = aligned(static_cast<size_t>(4 * rows * groups)), scales = aligned(static_cast<size_t>(4 * rows * w->blocks));
  char* room = caller_scratch.at_least(ordered + sums + scales + static_cast<size_t>(4 * count));
  job.ordered = room;
  job.sums = reinterpret_cast<float*>(room + ordered);
  job.scales = reinterpret_cast<float*>(room + ordered + sums);
  float* workspace = reinterpret_cast<float*>(room + ordered + sums + scales);
  for (int64_t from = 0; from < m; from += SLAB) {
    job.m = m - from < SLAB ? m - from : SLAB;
    job.x = static_cast<const char*>(x) + from * w->k * job.element_size;
    job.y = static_cast<char*>(y) + from * w->n * job.element_size;
    for (int64_t row = 0; row < job.m; ++row) load_row(job, row, workspace);
    run(job, threads);
  }
}

int64_t quantc_cpu_panel_step(const void* image) {
  const Image* w = static_cast<const Image*>(image);
  return w->per_ic ? w->group : STRIP;
}

namespace {
struct Unpacking {
  const Image* w;
  char* out;
  Type type;
  int64_t from, from_row, stride;
};

void unpack_piece(void* context, int64_t strip) {
  const Unpacking& job = *static_cast<const Unpacking*>(context);
  strip += job.from;
  const int64_t column = first_row(job.w, strip) - job.from_row;
  level().unpack(job.w, strip, strip + 1, job.out + column * (job.type == FLOAT32 ? 4 : 2), job.type, job.stride);
}
}  // namespace

void quantc_cpu_unpack(const void* image, int64_t from, int64_t to, void* out, int32_t type, int32_t threads) {
  const Image* w = static_cast<const Image*>(image);
  const int64_t step = quantc_cpu_panel_step(image), strips = w->per_ic ? w->group_strips : 1;
  Unpacking job{w, static_cast<char*>(out), static_cast<Type>(type), from / step * strips, from, to - from};
  const int64_t end = to == w->n ? w->strips : to / step * strips;
  share_out(end - job.from, threads, unpack_piece, &job);
}
