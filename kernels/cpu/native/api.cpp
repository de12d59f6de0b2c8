#include "api.h"

#include <cstdio>
#include <new>

#include "levels.h"
#include "multiply.h"
#include "pack.h"
#include "threads.h"
#include "trellis.h"
#include "trellis_multiply.h"

namespace {

// Nothing may be thrown to a caller that is no C++.
template <typename Work>
int32_t guarded(Work work) try {
  return work();
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
} catch (...) {
  return FAILED;
}

bool is_type(int64_t type) { return type >= FLOAT32 && type <= BFLOAT16; }

bool is_weight(const Image* w) { return w->magic == MAGIC; }

// Weights: Image or trellis::Stored.
template <typename Weights>
bool takes_rows_of(const Product& product, int64_t k) {
  const Weights* w = static_cast<const Weights*>(product.weight.image);
  const Rotation* rotation = product.weight.rotation;
  return is_weight(w) && w->k == k && (!rotation || rotation->width == k) && product.weight.rank >= 0 &&
         is_type(product.bias_type);
}

// What `multiply` is handed of several products of x [m][k].
template <typename Weights, typename Multiply>
int32_t multiply_all(const void* products, int32_t count, int64_t k, const Call& call, Multiply multiply) {
  const Product* all = static_cast<const Product*>(products);
  if (count < 1 || count > LARGEST_GROUP || call.m < 0 || call.threads < 1 || !is_type(call.type)) return REFUSED;
  for (int i = 0; i < count; ++i)
    if (!takes_rows_of<Weights>(all[i], k)) return REFUSED;
  multiply(all, count, call);
  return DONE;
}

}  // namespace

int32_t quantc_cpu_version() { return static_cast<int32_t>(VERSION); }

const char* quantc_cpu_levels() {
  static char names[256] = "";
  size_t used = 0;
  for (int i = 0; i < level_count() && used < sizeof names; ++i)
    used += static_cast<size_t>(std::snprintf(names + used, sizeof names - used, i ? " %s" : "%s", level_at(i).name));
  return names;
}

const char* quantc_cpu_level() { return level().name; }
int32_t quantc_cpu_choose_level(const char* name) { return choose_level(name); }
int32_t quantc_cpu_has_int8() { return level().by_int8 != nullptr; }
const char* quantc_cpu_pool() { return pool_name(); }

int64_t quantc_cpu_image_bytes(int32_t bits, int64_t n, int64_t k, int64_t group, int32_t per_ic, int32_t symmetric) {
  return describe(bits, n, k, group, per_ic != 0, symmetric != 0).bytes;
}

int32_t quantc_cpu_pack(int32_t bits, int64_t n, int64_t k, int64_t group, int32_t per_ic, const void* codes,
                        const void* scales, const void* zeros, void* image, int64_t image_bytes, int32_t threads) {
  return guarded([&] {
    const Image header = describe(bits, n, k, group, per_ic != 0, zeros == nullptr);
    if (!header.bytes || header.bytes != image_bytes) return REFUSED;
    pack(header, bits, static_cast<const uint8_t*>(codes), static_cast<const uint16_t*>(scales),
         static_cast<const uint8_t*>(zeros), threads, image);
    return DONE;
  });
}

int32_t quantc_cpu_kept_bytes(int32_t bits, int64_t n, int64_t k, int64_t group, const void* marks, int32_t symmetric,
                              int64_t* image_bytes) {
  return guarded([&] {
    *image_bytes = kept_bytes(bits, n, k, group, static_cast<const uint8_t*>(marks), symmetric != 0);
    return DONE;
  });
}

int32_t quantc_cpu_pack_kept(int32_t bits, int64_t n, int64_t k, int64_t group, const void* marks, int64_t kept,
                             const void* codes, const void* scales, const void* zeros, int32_t symmetric, void* image,
                             int64_t image_bytes, int32_t threads) {
  return guarded([&] {
    const Stored stored{static_cast<const uint8_t*>(marks), static_cast<const uint8_t*>(codes),
                        static_cast<const uint16_t*>(scales), static_cast<const uint8_t*>(zeros), symmetric != 0, kept};
    return pack_kept(bits, n, k, group, stored, threads, image, image_bytes) ? DONE : REFUSED;
  });
}

int32_t quantc_cpu_round_trellis(int32_t bits, int32_t tile, int64_t n, int64_t columns, void* left, const void* unit,
                                 const void* scale, const void* upper, int64_t upper_row, int64_t upper_column,
                                 void* errors, void* codes, int32_t threads) {
  return guarded([&] {
    const bool known = bits >= trellis::LEAST_BITS && bits <= trellis::MOST_BITS && n >= 0 && columns >= 0;
    if (!known || tile < 16 || tile > trellis::LARGEST_TILE || tile % 8 || (upper && !errors)) return REFUSED;
    const trellis::Rounding job{bits, tile, columns, n, static_cast<float*>(left), static_cast<const float*>(unit),
                                static_cast<const float*>(scale), static_cast<const float*>(upper), upper_row,
                                upper_column, static_cast<float*>(errors), static_cast<int16_t*>(codes)};
    trellis::round(job, n, threads);
    return DONE;
  });
}

int32_t quantc_cpu_multiply_trellis(const void* products, int32_t count, const void* x, int64_t m, int64_t k, int32_t type,
                                    int32_t int8, int32_t threads) {
  return guarded([&] {
    const Call call{x, m, static_cast<Type>(type), int8 != 0, threads};
    return multiply_all<trellis::Stored>(products, count, k, call, [](auto... given) { trellis::multiply(given...); });
  });
}

int32_t quantc_cpu_trellis_takes_many_rows() { return trellis::takes_many_rows(); }

int32_t quantc_cpu_unpack_trellis(const void* stored, int64_t from, int64_t to, void* out, int64_t values, int32_t type,
                                  int32_t threads) {
  return guarded([&] {
    const trellis::Stored* w = static_cast<const trellis::Stored*>(stored);
    if (!trellis::is_weight(w) || !trellis::are_tiles(w, from, to) || values != (to - from) * w->k || !is_type(type))
      return REFUSED;
    trellis::unpack(w, from, to, out, static_cast<Type>(type), threads);
    return DONE;
  });
}

int32_t quantc_cpu_image_shape(const void* image, int64_t image_bytes, int64_t* n, int64_t* k) {
  const Image* w = static_cast<const Image*>(image);
  if (!is_image(w, image_bytes)) return REFUSED;
  *n = w->n;
  *k = w->k;
  return DONE;
}

int32_t quantc_cpu_matmul(const void* products, int32_t count, const void* x, int64_t m, int64_t k, int32_t type,
                          int32_t int8, int32_t threads) {
  return guarded([&] {
    const Call call{x, m, static_cast<Type>(type), int8 != 0, threads};
    return multiply_all<Image>(products, count, k, call, [](auto... given) { multiply(given...); });
  });
}

int32_t quantc_cpu_rotate(const void* rotation, const void* x, void* out, int64_t m, int32_t type, int32_t threads) {
  return guarded([&] {
    if (m < 0 || !is_type(type)) return REFUSED;
    rotate_rows(*static_cast<const Rotation*>(rotation), x, out, m, static_cast<Type>(type), threads);
    return DONE;
  });
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

int32_t quantc_cpu_unpack(const void* image, int64_t from, int64_t to, void* out, int64_t values, int32_t type,
                          int32_t threads) {
  return guarded([&] {
    const Image* w = static_cast<const Image*>(image);
    const int64_t step = quantc_cpu_panel_step(image), strips = w->per_ic ? w->group_strips : 1;
    const bool on_steps = from % step == 0 && (to % step == 0 || to == w->n);
    if (from < 0 || from >= to || to > w->n || !on_steps || values != (to - from) * w->k || !is_type(type)) return REFUSED;
    Unpacking job{w, static_cast<char*>(out), static_cast<Type>(type), from / step * strips, from, to - from};
    const int64_t end = to == w->n ? w->strips : to / step * strips;
    if (is_sparse(w)) share_out((to - from + STRIP - 1) / STRIP, threads, unpack_rows, &job);
    else share_out(end - job.from, threads, unpack_piece, &job);
    return DONE;
  });
}
