// Packs, multiplies and unpacks weights of odd shapes in memory of their exact size, for AddressSanitizer and
// UndefinedBehaviorSanitizer to watch. Values are checked elsewhere; here they are only kept from being optimized away.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "api.h"
#include "weight.h"

static unsigned state = 1;
static unsigned next() { return state = state * 1664525u + 1013904223u, state >> 8; }

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
        for (int count = 1; count <= 2; ++count) quantc_cpu_matmul(products, count, x.data, m, type, int8, 2);
    }
    Block panel(size * static_cast<size_t>(n * k));
    quantc_cpu_unpack(image, 0, n, panel.data, type, 2);
  }
}

static void exercise(int bits, int64_t n, int64_t k, int64_t group, bool per_ic, bool symmetric) {
  const int64_t along = per_ic ? n : k, groups = (along + group - 1) / group;
  const int64_t rows = per_ic ? groups : n, columns = per_ic ? k : groups;
  Block codes(static_cast<size_t>(n * ((k * bits + 7) / 8))), scales(static_cast<size_t>(2 * rows * columns));
  Block zeros(static_cast<size_t>(rows * ((columns * bits + 7) / 8)));
  Block image(static_cast<size_t>(quantc_cpu_image_bytes(bits, n, k, group, per_ic, symmetric)), true);
  quantc_cpu_pack(bits, n, k, group, per_ic, codes.data, scales.data, symmetric ? nullptr : zeros.data, image.data, 2);
  use(image.data, n, k);
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
  Block image(static_cast<size_t>(quantc_cpu_kept_bytes(bits, n, k, group, marks.data, symmetric)), true);
  quantc_cpu_pack_kept(bits, n, k, group, marks.data, codes.data, scales.data, symmetric ? nullptr : zeros.data, image.data, 2);
  use(image.data, n, k);
}

int main() {
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
    std::printf("%s\n", name);
  }
  return 0;
}
