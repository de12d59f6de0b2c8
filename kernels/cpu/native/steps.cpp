// The operators quantc::native_step1, ... as torch's dispatcher calls them, without Python: kernels/cpu/steps.py.
//
// torch offers plain C functions for this, which stay as they are from one version to the next. They are called
// through addresses that the caller has found, so that nothing is included, linked or needed.
#include <mutex>
#include <stdexcept>
#include <vector>

#include "api.h"
#include "multiply.h"

namespace {

using Handle = void*;  // of a tensor
using Value = uint64_t;

// Those of torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h, in the order of steps.py. All but
// the codes of types return 0 where they have succeeded.
struct Torch {
  int32_t (*data)(Handle, void**);
  int32_t (*numel)(Handle, int64_t*);
  int32_t (*dtype)(Handle, int32_t*);
  int32_t (*is_contiguous)(Handle, bool*);
  int32_t (*empty)(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device,
                   int32_t index, Handle*);
  int32_t (*free)(Handle);
  int32_t (*threads)(uint32_t*);
  int32_t (*cpu)();
  int32_t (*types[3])();  // as Type numbers them
};

Torch torch;
int32_t cpu, types[3];

struct Known {
  std::mutex lock;
  std::vector<const Rotation*> rotations;
};

Known& known() {
  static Known* const kept = new Known;
  return *kept;
}

const Rotation* rotation(int64_t width, int64_t block) {
  if (!block) return nullptr;
  const std::lock_guard<std::mutex> lock(known().lock);
  for (const Rotation* r : known().rotations)
    if (r->width == width && r->block == block) return r;
  throw std::runtime_error("quantc: a compiled graph rotates by an order that no weight in this process has");
}

void expect(bool holds) {
  if (!holds) throw std::runtime_error("quantc: a compiled step got a tensor that it cannot read");
}

template <typename T>
T* data(Handle tensor) {
  void* found = nullptr;
  expect(torch.data(tensor, &found) == 0);
  return static_cast<T*>(found);
}

Type type_of(Handle tensor) {
  int32_t dtype = -1;
  expect(torch.dtype(tensor, &dtype) == 0);
  for (int32_t i = 0; i < 3; ++i)
    if (types[i] == dtype) return static_cast<Type>(i);
  expect(false);
  return FLOAT32;
}

// The arguments, which are the callee's to free.
struct Owned {
  Value* values;
  int count;
  ~Owned() {
    for (int i = 0; i < count; ++i) torch.free(reinterpret_cast<Handle>(values[i]));
  }
};

Handle contiguous(Value value) {
  const Handle tensor = reinterpret_cast<Handle>(value);
  bool holds = false;
  expect(torch.is_contiguous(tensor, &holds) == 0 && holds);
  return tensor;
}

Handle run(const Value* values, int count) {
  const Value *images = values + 1, *biases = images + count, *biased = biases + count;
  const int64_t block = static_cast<int64_t>(biased[1]);
  const Handle x = contiguous(values[0]);
  Product products[LARGEST_GROUP] = {};
  int64_t numel = 0, all = 0;
  uint32_t threads = 1;
  expect(torch.numel(x, &numel) == 0 && torch.threads(&threads) == 0);
  for (int i = 0; i < count; ++i) {
    Product& product = products[i];
    product.weight.image = data<Image>(contiguous(images[i]));
    if (biased[0] >> i & 1) {
      product.bias = data<void>(contiguous(biases[i]));
      product.bias_type = type_of(reinterpret_cast<Handle>(biases[i]));
    }
    all += static_cast<const Image*>(product.weight.image)->n;
  }
  const int64_t k = static_cast<const Image*>(products[0].weight.image)->k, m = numel / k;
  const Call call{data<void>(x), m, type_of(x), biased[2] != 0, static_cast<int>(threads)};
  const int64_t size = m * all, stride = 1;
  Handle y = nullptr;
  expect(torch.empty(1, &size, &stride, types[call.type], cpu, 0, &y) == 0);
  char* next = data<char>(y);
  for (int i = 0; i < count; ++i) {
    products[i].y = next;
    products[i].weight.rotation = rotation(k, block);
    next += m * static_cast<const Image*>(products[i].weight.image)->n * (call.type == FLOAT32 ? 4 : 2);
  }
  multiply(products, count, call);
  return y;
}

}  // namespace

void quantc_cpu_keep_rotation(const void* rotation) {
  const std::lock_guard<std::mutex> lock(known().lock);
  known().rotations.push_back(static_cast<const Rotation*>(rotation));
}

void quantc_cpu_use_torch(const void* functions) {
  torch = *static_cast<const Torch*>(functions);
  cpu = torch.cpu();
  for (int i = 0; i < 3; ++i) types[i] = torch.types[i]();
}

void quantc_cpu_step(uint64_t* values, uint64_t count, uint64_t) {
  const int products = static_cast<int>(count - 5) / 2;
  Handle y;
  {
    const Owned tensors{values, 1 + 2 * products};
    y = run(values, products);
  }
  values[0] = reinterpret_cast<Value>(y);
}
