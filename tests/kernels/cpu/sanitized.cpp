// Packs, multiplies and unpacks weights of odd shapes in memory of their exact size, for AddressSanitizer and
// UndefinedBehaviorSanitizer to watch. Values are checked elsewhere; here they are only kept from being optimized away.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "api.h"
#include "level.h"
#include "steps_of_torch.h"
#include "trellis.h"
#include "weight.h"

static unsigned state = 1;
static unsigned next() { return state = state * 1664525u + 1013904223u, state >> 8; }

static void expect(int32_t found, int32_t wanted) {
  if (found != wanted) std::fprintf(stderr, "a call returned %d, not %d\n", found, wanted), std::abort();
}

// Exactly `bytes` bytes, at a multiple of 64 if asked: a step past them is a step into the sanitizer's red zone.
struct Block {
  explicit Block(size_t bytes, bool aligned = false) : size(bytes) {
    void* at = nullptr;
    if (posix_memalign(&at, aligned ? 64 : 8, bytes ? bytes : 1)) std::abort();
    data = static_cast<unsigned char*>(at);
    for (size_t i = 0; i < bytes; ++i) data[i] = static_cast<unsigned char>(next());
  }
  ~Block() { std::free(data); }
  Block(const Block&) = delete;
  unsigned char* data;
  size_t size;
};

// The rotation of a row in blocks of its largest divisor that is a power of two, or 12 times one, with any signs.
struct Tables {
  explicit Tables(int64_t k)
      : base(k % 12 ? 1 : 12), signs(static_cast<size_t>((k + 15) / 16 * 2)), quarters(static_cast<size_t>(base * base / 4)) {
    const int64_t block = base * ((k / base) & -(k / base));
    for (size_t i = 0; i < quarters.size; ++i) quarters.data[i] &= 15;
    rotation = {k, block, base, reinterpret_cast<const uint16_t*>(signs.data), quarters.data, 0.5f};
  }
  int64_t base;
  Block signs, quarters;
  Rotation rotation;
};

// Every product, and the unpacked weight, of an image.
static void use(const void* image, int64_t n, int64_t k) {
  const Tables tables(k);
  const int64_t rank = k % 7;
  Block a(static_cast<size_t>(2 * rank * k)), b(static_cast<size_t>(2 * rank * ((n + 15) / 16 * 16)));
  const Weight weight{image, k > 1 ? &tables.rotation : nullptr, reinterpret_cast<const uint16_t*>(a.data),
                      reinterpret_cast<const uint16_t*>(b.data), rank};
  for (int type = 0; type < 3; ++type) {
    const size_t size = type ? 2 : 4;
    for (int64_t m : {1, 2, 3, 5, 8, 9, 33, 65}) {
      Block x(size * static_cast<size_t>(m * k)), y(size * static_cast<size_t>(m * n)), bias(size * static_cast<size_t>(n));
      Block other(size * static_cast<size_t>(m * n));
      const Product products[] = {{weight, y.data, m % 2 ? bias.data : nullptr, type}, {weight, other.data, nullptr, 0}};
      for (int int8 = 0; int8 <= quantc_cpu_has_int8(); ++int8)
        for (int count = 1; count <= 2; ++count)
          expect(quantc_cpu_matmul(products, count, x.data, m, k, type, int8, 2), DONE);
    }
    Block panel(size * static_cast<size_t>(n * k));
    expect(quantc_cpu_unpack(image, 0, n, panel.data, n * k, type, 2), DONE);
  }
}

// Calls whose sizes, types or counts do not belong to an image. x, y and what is unpacked have no bytes to touch.
static void refuse(const Block& image, int64_t n, int64_t k) {
  Block none(0), cut(image.size - 1, true);
  std::memcpy(cut.data, image.data, cut.size);
  int64_t found_n = 0, found_k = 0;
  const int64_t size = static_cast<int64_t>(image.size);
  expect(quantc_cpu_image_shape(image.data, size, &found_n, &found_k), DONE);
  if (found_n != n || found_k != k) std::abort();
  for (int64_t bytes : {int64_t{0}, int64_t{7}, size - 1}) expect(quantc_cpu_image_shape(cut.data, bytes, &found_n, &found_k), REFUSED);
  expect(quantc_cpu_image_shape(image.data, size + 1, &found_n, &found_k), REFUSED);
  const Tables others(k + 1);
  const Product plain{{image.data, nullptr, nullptr, nullptr, 0}, none.data, nullptr, 0};
  const Product rotated{{image.data, &others.rotation, nullptr, nullptr, 0}, none.data, nullptr, 0};
  const Product strange{{image.data, nullptr, nullptr, nullptr, 0}, none.data, none.data, 3};
  const auto matmul = [&](const Product& product, int count, int64_t m, int64_t width, int type, int threads) {
    return quantc_cpu_matmul(&product, count, none.data, m, width, type, 0, threads);
  };
  for (int64_t width : {int64_t{0}, k - 1, k + 1, 2 * k, 4096 * k}) expect(matmul(plain, 1, 1, width, 0, 1), REFUSED);
  for (int count : {-1, 0, 9}) expect(matmul(plain, count, 1, k, 0, 1), REFUSED);
  for (int type : {-1, 3}) expect(matmul(plain, 1, 1, k, type, 1), REFUSED);
  expect(matmul(plain, 1, -1, k, 0, 1), REFUSED);
  expect(matmul(plain, 1, 1, k, 0, 0), REFUSED);
  expect(matmul(rotated, 1, 1, k, 0, 1), REFUSED);
  expect(matmul(strange, 1, 1, k, 0, 1), REFUSED);
  expect(matmul(plain, 1, 0, k, 0, 1), DONE);
  const int64_t step = quantc_cpu_panel_step(image.data), past = (n + step - 1) / step * step + step;
  const auto unpack = [&](int64_t from, int64_t to, int64_t values, int type) {
    return quantc_cpu_unpack(image.data, from, to, none.data, values, type, 1);
  };
  expect(unpack(-step, 0, step * k, 0), REFUSED);
  expect(unpack(0, past, past * k, 0), REFUSED);
  expect(unpack(n, n, 0, 0), REFUSED);
  expect(unpack(0, n, n * k - 1, 0), REFUSED);
  expect(unpack(0, n, n * k, 3), REFUSED);
}

// Sizes whose bytes no 64 bits count, and room that no machine has, where malloc has to fail as it does without a
// sanitizer (ASAN_OPTIONS=allocator_may_return_null=1).
static void exhaust() {
  const int64_t huge = INT64_MAX, side = int64_t{1} << 31;
  for (int per_ic = 0; per_ic < 2; ++per_ic) {
    for (int64_t group : {int64_t{1}, int64_t{64}, huge})
      for (int64_t n : {int64_t{0}, int64_t{1}, side, huge})
        for (int64_t k : {int64_t{-1}, side, huge})
          if ((n > side || k != side) && quantc_cpu_image_bytes(4, n, k, group, per_ic, 0)) std::abort();
    if (quantc_cpu_image_bytes(8, side, side, 1, per_ic, 0)) std::abort();
    expect(quantc_cpu_pack(4, huge, huge, 32, per_ic, nullptr, nullptr, nullptr, nullptr, 0, 1), REFUSED);
  }
  int64_t bytes = -1;
  for (int64_t k : {int64_t{0}, side, huge}) expect(quantc_cpu_kept_bytes(4, 1, k, 16, nullptr, 0, &bytes), DONE), expect(bytes != 0, 0);
  const Tables tables(64);
  Rotation wide = tables.rotation;
  wide.width = wide.block = int64_t{1} << 50;
  Block row(256), out(256);
  for (int threads = 1; threads <= 2; ++threads) {
    expect(quantc_cpu_rotate(&wide, row.data, out.data, 4, FLOAT32, threads), OUT_OF_MEMORY);
    expect(quantc_cpu_rotate(&tables.rotation, row.data, out.data, 1, FLOAT32, threads), DONE);
  }
  expect(quantc_cpu_rotate(&tables.rotation, row.data, out.data, -1, FLOAT32, 1), REFUSED);
}

static void exercise(int bits, int64_t n, int64_t k, int64_t group, bool per_ic, bool symmetric) {
  const int64_t along = per_ic ? n : k, groups = (along + group - 1) / group;
  const int64_t rows = per_ic ? groups : n, columns = per_ic ? k : groups;
  Block codes(static_cast<size_t>(n * ((k * bits + 7) / 8))), scales(static_cast<size_t>(2 * rows * columns));
  Block zeros(static_cast<size_t>(rows * ((columns * bits + 7) / 8)));
  Block image(static_cast<size_t>(quantc_cpu_image_bytes(bits, n, k, group, per_ic, symmetric)), true);
  const int64_t size = static_cast<int64_t>(image.size);
  expect(quantc_cpu_pack(bits, n, k, group, per_ic, codes.data, scales.data, symmetric ? nullptr : zeros.data, image.data, size, 2), DONE);
  use(image.data, n, k);
  refuse(image, n, k);
  run_steps(image.data, image.size, n, k);
}

// A group in `one_in` stays; in 0, none does.
static void exercise_kept(int bits, int64_t n, int64_t k, int64_t group, unsigned one_in, bool symmetric) {
  const int64_t groups = (k + group - 1) / group, row_bytes = (groups + 7) / 8;
  Block marks(static_cast<size_t>(n * row_bytes));
  std::memset(marks.data, 0, marks.size);
  int64_t kept = 0;
  for (int64_t row = 0; row < n; ++row)
    for (int64_t g = 0; one_in && g < groups; ++g)
      if (next() % one_in == 0) marks.data[row * row_bytes + g / 8] |= static_cast<unsigned char>(1 << g % 8), ++kept;
  Block codes(static_cast<size_t>(kept * ((group * bits + 7) / 8))), scales(static_cast<size_t>(2 * kept));
  Block zeros(static_cast<size_t>((kept * bits + 7) / 8));
  int64_t size = 0;
  expect(quantc_cpu_kept_bytes(bits, n, k, group, marks.data, symmetric, &size), DONE);
  Block image(static_cast<size_t>(size), true);
  const auto pack = [&](int64_t stored, int64_t bytes) {
    return quantc_cpu_pack_kept(bits, n, k, group, marks.data, stored, codes.data, scales.data, zeros.data, symmetric, image.data, bytes, 2);
  };
  for (int64_t off : {-1, 1}) expect(pack(kept + off, size), REFUSED), expect(pack(kept, size + off * 64), REFUSED);
  expect(pack(kept, size), DONE);
  use(image.data, n, k);
  refuse(image, n, k);
}

// A weight in trellis codes, as many rows of it as fill their tiles or not: its products and its unpacked rows.
static void exercise_trellis(int bits, int tile, int64_t n, int64_t k) {
  const int64_t tiles = (n + tile - 1) / tile;
  Block codes(static_cast<size_t>(tiles * k * tile * bits / 8)), scales(static_cast<size_t>(2 * n)), none(0);
  const trellis::Stored stored{codes.data, reinterpret_cast<const uint16_t*>(scales.data), static_cast<int64_t>(codes.size), n, k, bits, tile};
  const Tables tables(k);
  const int64_t rank = k % 3;
  Block a(static_cast<size_t>(2 * rank * k)), b(static_cast<size_t>(2 * rank * ((n + 15) / 16 * 16)));
  const auto weight = [&](const trellis::Stored& one) {
    return Weight{&one, k > 1 ? &tables.rotation : nullptr, reinterpret_cast<const uint16_t*>(a.data), reinterpret_cast<const uint16_t*>(b.data), rank};
  };
  for (int type = 0; type < 3; ++type) {
    const size_t size = type ? 2 : 4;
    for (int64_t m : {1, 2, 9, 193}) {
      Block x(size * static_cast<size_t>(m * k)), y(size * static_cast<size_t>(m * n)), bias(size * static_cast<size_t>(n));
      const Product product{weight(stored), y.data, m % 2 ? bias.data : nullptr, type};
      for (int int8 : {0, 1}) expect(quantc_cpu_multiply_trellis(&product, 1, x.data, m, k, type, int8, 2), DONE);
    }
    Block panel(size * static_cast<size_t>(n * k));
    expect(quantc_cpu_unpack_trellis(&stored, 0, n, panel.data, n * k, type, 2), DONE);
  }
  const auto refuse = [&](const trellis::Stored& one, int64_t m, int64_t width, int type, int threads) {
    const Product product{weight(one), none.data, nullptr, 0};
    expect(quantc_cpu_multiply_trellis(&product, 1, none.data, m, width, type, 0, threads), REFUSED);
  };
  const auto unpack = [&](int64_t from, int64_t to, int64_t values, int type) {
    expect(quantc_cpu_unpack_trellis(&stored, from, to, none.data, values, type, 1), REFUSED);
  };
  refuse(stored, -1, k, 0, 1), refuse(stored, 1, k + 1, 0, 1), refuse(stored, 1, k, 3, 1), refuse(stored, 1, k, 0, 0);
  for (int other : {0, 6, -1}) { trellis::Stored one = stored; one.bits = other; refuse(one, 1, k, 0, 1); }
  for (int other : {0, 8, 16, 128, -64}) { trellis::Stored one = stored; one.tile = other; refuse(one, 1, k, 0, 1); }
  for (int64_t other : {int64_t{0}, int64_t{-1}, n + tile, INT64_MAX}) { trellis::Stored one = stored; one.n = other; refuse(one, 1, k, 0, 1); }
  for (int64_t other : {int64_t{0}, k + 1, INT64_MAX}) { trellis::Stored one = stored; one.k = other; refuse(one, 1, other, 0, 1); }
  unpack(-tile, 0, tile * k, 0), unpack(0, n + tile, (n + tile) * k, 0), unpack(n, n, 0, 0);
  unpack(0, n, n * k - 1, 0), unpack(0, n, n * k, 3);
  if (trellis::tile_of(n) == tile) run_trellis_steps(bits, tile, n, k);
}

// The search for codes of a few columns, with what is fed back and without.
static void exercise_search(int bits, int tile, int64_t n, int64_t columns) {
  Block left(static_cast<size_t>(4 * n * columns)), errors(static_cast<size_t>(4 * n * columns)), codes(static_cast<size_t>(2 * n * columns));
  Block unit(static_cast<size_t>(4 * n)), scale(static_cast<size_t>(4 * n)), upper(static_cast<size_t>(4 * columns * columns));
  for (Block* block : {&left, &unit, &scale, &upper})
    for (size_t i = 0; i < block->size / 4; ++i) reinterpret_cast<float*>(block->data)[i] = 0.5f + static_cast<float>(next() % 64) / 64;
  const auto round = [&](int width, int height, const void* factor, void* fed) {
    return quantc_cpu_round_trellis(width, height, n, columns, left.data, unit.data, scale.data, factor, columns, 1, fed, codes.data, 2);
  };
  expect(round(bits, tile, nullptr, nullptr), DONE);
  expect(round(bits, tile, upper.data, errors.data), DONE);
  for (int width : {0, 6}) expect(round(width, tile, nullptr, nullptr), REFUSED);
  for (int height : {8, 20, 104}) expect(round(bits, height, nullptr, nullptr), REFUSED);
  expect(round(bits, tile, upper.data, nullptr), REFUSED);
}

int main() {
  exhaust();
  std::vector<char> names(quantc_cpu_levels(), quantc_cpu_levels() + std::strlen(quantc_cpu_levels()) + 1);
  for (char* name = std::strtok(names.data(), " "); name; name = std::strtok(nullptr, " ")) {
    if (!quantc_cpu_choose_level(name)) return 1;
    for (int bits = 2; bits <= 8; ++bits)
      for (int kind = 0; kind < 4; ++kind) {
        exercise(bits, 1, 1, 1, kind & 1, kind & 2);
        exercise(bits, 17, 65, 32, kind & 1, kind & 2);
        exercise(bits, 35, 130, 9, kind & 1, kind & 2);
        exercise(bits, 3, 60, 20, kind & 1, kind & 2);
        exercise(bits, 3, 384, 64, kind & 1, kind & 2);
      }
    for (int bits = 2; bits <= 8; ++bits)
      for (unsigned one_in = 0; one_in < 4; ++one_in) {
        exercise_kept(bits, 1, 1, 1, one_in, bits & 1);
        exercise_kept(bits, 17, 65, 8, one_in, one_in & 1);
        exercise_kept(bits, 35, 130, 16, one_in, one_in & 2);
        exercise_kept(bits, 3, 1150, 32, one_in, one_in & 1);
      }
    for (int bits = 1; bits <= 5; ++bits) {
      for (int tile : {32, 48, 64, 80, 96}) exercise_trellis(bits, tile, tile, 3), exercise_trellis(bits, tile, 2 * tile, 131);
      exercise_trellis(bits, 64, 133, 1), exercise_trellis(bits, 32, 7, 20);
      exercise_search(bits, 32, 7, 2), exercise_search(bits, 96, 192, 3);
    }
    std::printf("%s\n", name);
  }
  return 0;
}
