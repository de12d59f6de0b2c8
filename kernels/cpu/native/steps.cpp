// The operators quantc::native_step1, ... as torch's dispatcher calls them, without Python: kernels/cpu/steps.py.
//
// torch offers plain C functions for this, which stay as they are from one version to the next. They are called
// through addresses that the caller has found, so that nothing is included, linked or needed.
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
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
  int32_t (*dim)(Handle, int64_t*);
  int32_t (*size)(Handle, int64_t dim, int64_t*);
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

// torch makes a RuntimeError of it.
[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("quantc: a compiled step " + what); }

void expect(bool holds, const char* otherwise) {
  if (!holds) fail(otherwise);
}

template <typename T>
T* data(Handle tensor) {
  void* found = nullptr;
  expect(torch.data(tensor, &found) == 0, "got a tensor that has no memory");
  return static_cast<T*>(found);
}

int64_t numel(Handle tensor) {
  int64_t found = 0;
  expect(torch.numel(tensor, &found) == 0, "got a tensor whose size torch does not tell");
  return found;
}

int64_t width(Handle tensor) {
  int64_t dims = 0, found = 0;
  expect(torch.dim(tensor, &dims) == 0 && dims > 0, "needs inputs of one dimension or more");
  expect(torch.size(tensor, dims - 1, &found) == 0, "got a tensor whose size torch does not tell");
  return found;
}

Type type_of(Handle tensor) {
  int32_t dtype = -1;
  expect(torch.dtype(tensor, &dtype) == 0, "got a tensor whose dtype torch does not tell");
  for (int32_t i = 0; i < 3; ++i)
    if (types[i] == dtype) return static_cast<Type>(i);
  fail("takes float32, float16 and bfloat16, and got a tensor of another dtype");
}

// An image of this version, as long as its tensor is. The dispatcher comes here with tensors on the CPU alone.
const Image* image_of(Handle tensor) {
  const Image* image = data<Image>(tensor);
  expect(is_image(image, numel(tensor)), "got a weight that is no image of this version of quantc");
  return image;
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
  expect(torch.is_contiguous(tensor, &holds) == 0 && holds, "needs contiguous tensors");
  return tensor;
}

// Raised as torch's matmul raises it.
void check_width(int64_t found, int64_t rows, const Image* w) {
  if (found == w->k) return;
  const auto shape = [](int64_t a, int64_t b) { return std::to_string(a) + "x" + std::to_string(b); };
  throw std::runtime_error("mat1 and mat2 shapes cannot be multiplied (" + shape(rows, found) + " and " + shape(w->k, w->n) + ")");
}

// y, until it is handed back.
struct Output {
  Handle tensor = nullptr;
  ~Output() {
    if (tensor) torch.free(tensor);
  }
  Handle release() {
    const Handle given = tensor;
    tensor = nullptr;
    return given;
  }
};

Product product_of(Value image, Value bias, bool biased) {
  Product product = {};
  const Image* w = image_of(contiguous(image));
  product.weight.image = w;
  if (biased) {
    const Handle tensor = contiguous(bias);
    expect(numel(tensor) == w->n, "got a bias of another size than its weight's outputs");
    product.bias = data<void>(tensor);
    product.bias_type = type_of(tensor);
  }
  return product;
}

Handle run(const Value* values, int count) {
  const Value *images = values + 1, *biases = images + count, *biased = biases + count;
  const int64_t block = static_cast<int64_t>(biased[1]);
  const Handle x = contiguous(values[0]);
  const int64_t k = width(x), m = k ? numel(x) / k : 0;
  Product products[LARGEST_GROUP] = {};
  uint32_t threads = 1;
  expect(torch.threads(&threads) == 0 && threads > 0, "finds no threads");
  int64_t all = 0;
  for (int i = 0; i < count; ++i) {
    products[i] = product_of(images[i], biases[i], biased[0] >> i & 1);
    const Image* w = static_cast<const Image*>(products[i].weight.image);
    check_width(k, m, w);
    products[i].weight.rotation = rotation(k, block);
    all += w->n;
  }
  expect(static_cast<int64_t>(biased[3]) == all, "was traced for weights with other numbers of outputs");
  const Call call{data<void>(x), m, type_of(x), biased[2] != 0, static_cast<int>(threads)};
  const int64_t size = m * all, stride = 1;
  Output y;
  if (torch.empty(1, &size, &stride, types[call.type], cpu, 0, &y.tensor) != 0) throw std::bad_alloc();
  char* next = data<char>(y.tensor);
  for (int i = 0; i < count; ++i) {
    products[i].y = next;
    next += m * static_cast<const Image*>(products[i].weight.image)->n * (call.type == FLOAT32 ? 4 : 2);
  }
  multiply(products, count, call);
  return y.release();
}

}  // namespace

int32_t quantc_cpu_keep_rotation(const void* rotation) try {
  const std::lock_guard<std::mutex> lock(known().lock);
  known().rotations.push_back(static_cast<const Rotation*>(rotation));
  return DONE;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

void quantc_cpu_use_torch(const void* functions) {
  torch = *static_cast<const Torch*>(functions);
  cpu = torch.cpu();
  for (int i = 0; i < 3; ++i) types[i] = torch.types[i]();
}

void quantc_cpu_step(uint64_t* values, uint64_t count, uint64_t) {
  const int products = static_cast<int>(count - 5) / 2;
  Handle y;
  try {
    const Owned tensors{values, 1 + 2 * products};
    y = run(values, products);
  } catch (const std::bad_alloc&) {
    fail("is out of memory");
  }
  values[0] = reinterpret_cast<Value>(y);
}
