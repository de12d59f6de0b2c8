#include "api.h"

#include <string>

#include "levels.h"
#include "multiply.h"
#include "pack.h"
#include "threads.h"

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

int64_t quantc_cpu_kept_bytes(int32_t bits, int64_t n, int64_t k, int64_t group, int64_t kept, int32_t symmetric) {
  return describe_kept(bits, n, k, group, kept, symmetric != 0).bytes;
}

void quantc_cpu_pack_kept(int32_t bits, int64_t n, int64_t k, int64_t group, int64_t kept, const void* marks,
                          const void* codes, const void* scales, const void* zeros, void* image, int32_t threads) {
  pack_kept(describe_kept(bits, n, k, group, kept, zeros == nullptr), bits, static_cast<const uint8_t*>(marks),
            static_cast<const uint8_t*>(codes), static_cast<const uint16_t*>(scales), static_cast<const uint8_t*>(zeros),
            threads, image);
}

void quantc_cpu_matmul(const void* products, int32_t count, const void* x, int64_t m, int32_t type, int32_t int8,
                       int32_t threads) {
  multiply(static_cast<const Product*>(products), count, Call{x, m, static_cast<Type>(type), int8 != 0, threads});
}

void quantc_cpu_rotate(const void* rotation, const void* x, void* out, int64_t m, int32_t type, int32_t threads) {
  rotate_rows(*static_cast<const Rotation*>(rotation), x, out, m, static_cast<Type>(type), threads);
}

int64_t quantc_cpu_panel_step(const void* image) {
  const Image* w = static_cast<const Image*>(image);
  return is_sparse(w) ? 0 : w->per_ic ? w->group : STRIP;
}

namespace {
struct Unpacking {
  const Image* w;
  char* out;
  Type type;
  int64_t from, from_row, end, stride;
};

void unpack_piece(void* context, int64_t strip) {
  const Unpacking& job = *static_cast<const Unpacking*>(context);
  strip += job.from;
  const int64_t column = first_row(job.w, strip) - job.from_row;
  level().unpack(job.w, strip, strip + 1, job.out + column * (job.type == FLOAT32 ? 4 : 2), job.type, job.stride);
}

constexpr int64_t ROWS_AT_ONCE = 16;

void unpack_rows(void* context, int64_t piece) {
  const Unpacking& job = *static_cast<const Unpacking*>(context);
  const int64_t from = job.from_row + piece * ROWS_AT_ONCE, to = from + ROWS_AT_ONCE < job.end ? from + ROWS_AT_ONCE : job.end;
  level().unpack_kept(job.w, from, to, job.out + (from - job.from_row) * job.w->k * (job.type == FLOAT32 ? 4 : 2), job.type);
}
}  // namespace

void quantc_cpu_unpack(const void* image, int64_t from, int64_t to, void* out, int32_t type, int32_t threads) {
  const Image* w = static_cast<const Image*>(image);
  if (is_sparse(w)) {
    Unpacking job{w, static_cast<char*>(out), static_cast<Type>(type), 0, from, to, 0};
    return share_out((to - from + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, threads, unpack_rows, &job);
  }
  const int64_t step = quantc_cpu_panel_step(image), strips = w->per_ic ? w->group_strips : 1;
  Unpacking job{w, static_cast<char*>(out), static_cast<Type>(type), from / step * strips, from, to, to - from};
  const int64_t end = to == w->n ? w->strips : to / step * strips;
  share_out(end - job.from, threads, unpack_piece, &job);
}
