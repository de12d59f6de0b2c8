// A stand-in for torch's C functions, and steps on tensors of the right and of wrong shapes, for sanitizers to watch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "api.h"

namespace {

struct Tensor {
  std::vector<int64_t> sizes;
  int32_t dtype;  // as Type of level.h numbers them; others are strange
  bool contiguous = true;
  std::vector<unsigned char> bytes{};

  int64_t numel() const {
    int64_t all = 1;
    for (int64_t size : sizes) all *= size;
    return all;
  }
};

int alive = 0;

Tensor* tensor(std::vector<int64_t> sizes, int32_t dtype, size_t value) {
  ++alive;
  auto* made = new Tensor{std::move(sizes), dtype};
  made->bytes.resize(static_cast<size_t>(made->numel()) * value);
  return made;
}

Tensor* as_tensor(void* handle) { return static_cast<Tensor*>(handle); }
int32_t data_of(void* t, void** out) { return *out = as_tensor(t)->bytes.data(), 0; }
int32_t numel_of(void* t, int64_t* out) { return *out = as_tensor(t)->numel(), 0; }
int32_t dtype_of(void* t, int32_t* out) { return *out = as_tensor(t)->dtype, 0; }
int32_t contiguous_of(void* t, bool* out) { return *out = as_tensor(t)->contiguous, 0; }
int32_t dim_of(void* t, int64_t* out) { return *out = static_cast<int64_t>(as_tensor(t)->sizes.size()), 0; }
int32_t size_of_dim(void* t, int64_t d, int64_t* out) { return *out = as_tensor(t)->sizes[static_cast<size_t>(d)], 0; }
int32_t make_empty(int64_t, const int64_t* sizes, const int64_t*, int32_t dtype, int32_t, int32_t, void** out) {
  if (sizes[0] > 1 << 24) return 1;
  return *out = tensor({sizes[0]}, dtype, dtype ? 2 : 4), 0;
}
int32_t release(void* t) { return --alive, delete as_tensor(t), 0; }
int32_t two_threads(uint32_t* out) { return *out = 2, 0; }
int32_t no_device() { return 0; }
template <int32_t TYPE>
int32_t code() { return TYPE; }

// In the order of steps.py.
const void* const FUNCTIONS[] = {
    reinterpret_cast<void*>(data_of),       reinterpret_cast<void*>(numel_of),    reinterpret_cast<void*>(dtype_of),
    reinterpret_cast<void*>(contiguous_of), reinterpret_cast<void*>(dim_of),      reinterpret_cast<void*>(size_of_dim),
    reinterpret_cast<void*>(make_empty),    reinterpret_cast<void*>(release),     reinterpret_cast<void*>(two_threads),
    reinterpret_cast<void*>(no_device),     reinterpret_cast<void*>(code<0>),     reinterpret_cast<void*>(code<1>),
    reinterpret_cast<void*>(code<2>)};

// The outputs of a step of one product, or -1 where it throws; all that it was given and made is gone afterwards.
int64_t run_one(void (*run)(uint64_t*, uint64_t, uint64_t), std::vector<uint64_t> values) {
  int64_t found = -1;
  try {
    run(values.data(), values.size(), 1);
    found = reinterpret_cast<Tensor*>(values[0])->numel();
    release(reinterpret_cast<void*>(values[0]));
  } catch (const std::exception&) {
  }
  if (alive) std::fprintf(stderr, "a step leaves %d tensors behind\n", alive), std::abort();
  return found;
}

uint64_t value_of(Tensor* t) { return reinterpret_cast<uint64_t>(t); }

int64_t step(Tensor* x, Tensor* image, Tensor* bias, uint64_t biased, uint64_t outputs) {
  return run_one(quantc_cpu_step, {value_of(x), value_of(image), value_of(bias), biased, 0, 0, outputs});
}

void expect_outputs(int64_t found, int64_t wanted) {
  if (found != wanted) std::fprintf(stderr, "a step has %ld outputs, not %ld\n", long(found), long(wanted)), std::abort();
}

// Of a weight in trellis codes: its own sizes, and such as do not belong together.
void run_trellis_steps(int bits, int64_t tile, int64_t n, int64_t k) {
  quantc_cpu_use_torch(FUNCTIONS);
  const int64_t tiles = (n + tile - 1) / tile, bytes = tile * bits / 8;
  const auto codes = [&](int64_t width) { return tensor({tiles, width, bytes}, 9, 1); };
  const auto scales = [&](int64_t rows) { return tensor({rows, 1}, 1, 2); };
  const auto go = [&](Tensor* x, Tensor* walks, Tensor* of_rows, int64_t width, int int8, int64_t outputs) {
    Tensor* bias = tensor({n}, 0, 4);
    const uint64_t settings = static_cast<uint64_t>(width);
    return run_one(quantc_cpu_trellis_step, {value_of(x), value_of(walks), value_of(of_rows), value_of(bias), 1, 0, settings,
                                             static_cast<uint64_t>(int8), static_cast<uint64_t>(outputs)});
  };
  for (int int8 : {0, 1})
    for (int64_t m : {0, 1, 3}) expect_outputs(go(tensor({m, k}, 0, 4), codes(k), scales(n), bits, int8, n), m * n);
  const auto x = [&] { return tensor({1, k}, 2, 2); };
  expect_outputs(go(x(), codes(k + 1), scales(n), bits, 0, n), -1);
  expect_outputs(go(x(), codes(k), scales(n + tile), bits, 0, n + tile), -1);
  expect_outputs(go(x(), codes(k), tensor({n, 1}, 0, 4), bits, 0, n), -1);
  expect_outputs(go(x(), tensor({tiles * k * bytes}, 9, 1), scales(n), bits, 0, n), -1);
  for (int other : {0, bits + 1, 15}) expect_outputs(go(x(), codes(k), scales(n), other, 0, n), -1);
  expect_outputs(go(x(), codes(k), scales(n), bits, 0, n + 1), -1);
}

void run_steps(const unsigned char* image, size_t bytes, int64_t n, int64_t k) {
  quantc_cpu_use_torch(FUNCTIONS);
  const auto of_image = [&](size_t cut) {
    Tensor* made = tensor({static_cast<int64_t>(bytes - cut)}, 9, 1);
    std::copy(image, image + (bytes - cut), made->bytes.begin());
    return made;
  };
  const uint64_t all = static_cast<uint64_t>(n);
  for (int32_t type = 0; type < 3; ++type) {
    const size_t value = type ? 2 : 4;
    const auto rows = [&](std::vector<int64_t> sizes) { return tensor(std::move(sizes), type, value); };
    for (int64_t m : {0, 1, 3}) expect_outputs(step(rows({m, k}), of_image(0), rows({n}), 1, all), m * n);
    expect_outputs(step(rows({k}), of_image(0), rows({0}), 0, all), n);
    for (int64_t width : {int64_t{0}, k - 1, k + 1, 2 * k}) expect_outputs(step(rows({1, width}), of_image(0), rows({n}), 0, all), -1);
    expect_outputs(step(rows({}), of_image(0), rows({n}), 0, all), -1);
    for (int64_t size : {int64_t{0}, n - 1, n + 1}) expect_outputs(step(rows({1, k}), of_image(0), rows({size}), 1, all), -1);
    for (size_t cut : {size_t{1}, bytes - 7, bytes}) expect_outputs(step(rows({1, k}), of_image(cut), rows({n}), 0, all), -1);
    expect_outputs(step(rows({1, k}), of_image(0), rows({n}), 0, all + 1), -1);
    Tensor* strided = rows({1, k});
    strided->contiguous = false;
    expect_outputs(step(strided, of_image(0), rows({n}), 0, all), -1);
    expect_outputs(step(tensor({1, k}, 7, 8), of_image(0), rows({n}), 0, all), -1);
    expect_outputs(step(rows({1, k}), of_image(0), tensor({n}, 7, 8), 1, all), -1);
  }
}

}  // namespace
