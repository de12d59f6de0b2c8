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

int64_t quantc_cpu_kept_bytes(int32_t bits, int64_t n, int64_t k, int64_t group, const void* marks, int32_t symmetric) {
  return kept_bytes(bits, n, k, group, static_cast<const uint8_t*>(marks), symmetric != 0);
}

void quantc_cpu_pack_kept(int32_t bits, int64_t n, int64_t k, int64_t group, const void* marks, const void* codes,
                          const void* scales, const void* zeros, void* image, int32_t threads) {
  pack_kept(bits, n, k, group, static_cast<const uint8_t*>(marks), static_cast<const uint8_t*>(codes),
            static_cast<const uint16_t*>(scales), static_cast<const uint8_t*>(zeros), threads, image);
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
  return w->per_ic ? w->group : STRIP;
}

int32_t quantc_cpu_takes_many_rows(const void* image) { return takes_many_rows(static_cast<const Image*>(image)); }

int32_t quantc_cpu_panel_by_rows(const void* image) { return is_sparse(static_cast<const Image*>(image)); }

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

void unpack_rows(void* context, int64_t strip) {
  const Unpacking& job = *static_cast<const Unpacking*>(context);
  const int64_t row = job.from_row + strip * STRIP, row_bytes = job.w->k * (job.type == FLOAT32 ? 4 : 2);
  level().unpack_kept(job.w, row, job.out + (row - job.from_row) * row_bytes, job.type);
}
}  // namespace

void quantc_cpu_unpack(const void* image, int64_t from, int64_t to, void* out, int32_t type, int32_t threads) {
  const Image* w = static_cast<const Image*>(image);
  const int64_t step = quantc_cpu_panel_step(image), strips = w->per_ic ? w->group_strips : 1;
  Unpacking job{w, static_cast<char*>(out), static_cast<Type>(type), from / step * strips, from, to - from};
  if (is_sparse(w)) return share_out((to - from + STRIP - 1) / STRIP, threads, unpack_rows, &job);
  const int64_t end = to == w->n ? w->strips : to / step * strips;
  share_out(end - job.from, threads, unpack_piece, &job);
}
