// The operators quantc::native_step1, ... and quantc::trellis_step1, ... as torch's dispatcher calls them, without Python:
// kernels/cpu/steps.py.
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
#include "trellis_multiply.h"

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

int64_t size_of_dim(Handle tensor, int64_t dim) {
  int64_t dims = 0, found = 0;
  expect(torch.dim(tensor, &dims) == 0 && dim < dims, "got a weight of too few dimensions");
  expect(torch.size(tensor, dim, &found) == 0, "got a tensor whose size torch does not tell");
  return found;
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

// The products of one x, which are added one after the other.
class Step {
 public:
  Step(Value x, Value block)
      : x_(contiguous(x)), k_(width(x_)), m_(k_ ? numel(x_) / k_ : 0), block_(static_cast<int64_t>(block)) {}

  void add(const void* weight, int64_t n, int64_t k, bool biased, Value bias) {
    check_width(n, k);
    Product& product = products_[count_];
    product.weight.image = weight;
    product.weight.rotation = rotation(k, block_);
    if (biased) {
      const Handle tensor = contiguous(bias);
      expect(numel(tensor) == n, "got a bias of another size than its weight's outputs");
      product.bias = data<void>(tensor);
      product.bias_type = type_of(tensor);
    }
    outputs_[count_++] = n;
    all_ += n;
  }

  // outputs: of all products, as the graph has it. multiply(products, count, call).
  template <typename Multiply>
  Handle run(Value int8, Value outputs, Multiply multiply) {
    uint32_t threads = 1;
    expect(torch.threads(&threads) == 0 && threads > 0, "finds no threads");
    expect(static_cast<int64_t>(outputs) == all_, "was traced for weights with other numbers of outputs");
    const Call call{data<void>(x_), m_, type_of(x_), int8 != 0, static_cast<int>(threads)};
    const int64_t size = m_ * all_, stride = 1;
    Output y;
    if (torch.empty(1, &size, &stride, types[call.type], cpu, 0, &y.tensor) != 0) throw std::bad_alloc();
    char* next = data<char>(y.tensor);
    for (int i = 0; i < count_; ++i) {
      products_[i].y = next;
      next += m_ * outputs_[i] * (call.type == FLOAT32 ? 4 : 2);
    }
    multiply(products_, count_, call);
    return y.release();
  }

 private:
  // Raised as torch's matmul raises it.
  void check_width(int64_t n, int64_t k) const {
    if (k_ == k) return;
    const auto shape = [](int64_t a, int64_t b) { return std::to_string(a) + "x" + std::to_string(b); };
    throw std::runtime_error("mat1 and mat2 shapes cannot be multiplied (" + shape(m_, k_) + " and " + shape(k, n) + ")");
  }

  Handle x_;
  int64_t k_, m_, block_, all_ = 0;
  Product products_[LARGEST_GROUP] = {};
  int64_t outputs_[LARGEST_GROUP] = {};
  int count_ = 0;
};

Handle run_images(const Value* values, int count) {
  const Value *images = values + 1, *biases = images + count, *settings = biases + count;
  Step step(values[0], settings[1]);
  for (int i = 0; i < count; ++i) {
    const Image* w = image_of(contiguous(images[i]));
    step.add(w, w->n, w->k, settings[0] >> i & 1, biases[i]);
  }
  return step.run(settings[2], settings[3], [](auto... given) { multiply(given...); });
}

Handle run_trellis(const Value* values, int count) {
  const Value *codes = values + 1, *scales = codes + count, *biases = scales + count, *settings = biases + count;
  Step step(values[0], settings[1]);
  trellis::Stored weights[LARGEST_GROUP];
  for (int i = 0; i < count; ++i) {
    const Handle walks = contiguous(codes[i]), of_rows = contiguous(scales[i]);
    const int64_t n = numel(of_rows), k = size_of_dim(walks, 1), bits = static_cast<int64_t>(settings[2] >> 4 * i & 15);
    weights[i] = {data<uint8_t>(walks), data<uint16_t>(of_rows), numel(walks), n, k, static_cast<int32_t>(bits), trellis::tile_of(n)};
    expect(type_of(of_rows) == FLOAT16 && trellis::is_weight(&weights[i]), "got codes and scales that are not those of one weight");
    step.add(&weights[i], n, k, settings[0] >> i & 1, biases[i]);
  }
  return step.run(settings[3], settings[4], [](auto... given) { trellis::multiply(given...); });
}

// values: `per_weight` tensors for each product after x, and then `settings` numbers; y comes in their place.
template <typename Run>
void run_step(Value* values, Value given, int per_weight, int settings, Run run) {
  const int products = (static_cast<int>(given) - 1 - settings) / per_weight;
  Handle y;
  try {
    const Owned tensors{values, 1 + per_weight * products};
    y = run(values, products);
  } catch (const std::bad_alloc&) {
    fail("is out of memory");
  }
  values[0] = reinterpret_cast<Value>(y);
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

void quantc_cpu_step(uint64_t* values, uint64_t count, uint64_t) { run_step(values, count, 2, 4, run_images); }
void quantc_cpu_trellis_step(uint64_t* values, uint64_t count, uint64_t) { run_step(values, count, 3, 5, run_trellis); }
