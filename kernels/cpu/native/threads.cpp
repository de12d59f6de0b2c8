#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace {

struct Task {
  void (*work)(void*, int64_t);
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::mutex failing{};
  std::exception_ptr error{};  // of the first piece that failed

  void fail() {
    next = count;
    const std::lock_guard<std::mutex> lock(failing);
    if (!error) error = std::current_exception();
  }
};

// Threads take the next piece when they are done with one: on a busy machine a thread that was put aside holds up
// one piece, not its share. What a piece throws must not leave a thread that others started.
void run_pieces(void* pointer) {
  Task* task = static_cast<Task*>(pointer);
  try {
    for (int64_t i; (i = task->next.fetch_add(1, std::memory_order_relaxed)) < task->count;) task->work(task->context, i);
  } catch (...) {
    task->fail();
  }
}

// torch brings an OpenMP library, under a name of its own choosing. A second one would start a second pool of threads,
// so this library links to none and takes the one that the process has loaded: GNU's entry, which LLVM's and Intel's
// libraries offer too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

#if defined(__linux__)
int find_openmp(dl_phdr_info* info, size_t, void* found) {
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* name = slash ? slash + 1 : info->dlpi_name;
  if (std::strncmp(name, "libgomp", 7) && std::strncmp(name, "libiomp", 7) && std::strncmp(name, "libomp", 6)) return 0;
  void* library = dlopen(info->dlpi_name, RTLD_NOW | RTLD_NOLOAD);
  if (!library) return 0;
  void* entry = dlsym(library, "GOMP_parallel");
  if (!entry) return 0;
  *static_cast<GompParallel*>(found) = reinterpret_cast<GompParallel>(entry);
  return 1;
}

GompParallel openmp() {
  static const GompParallel entry = [] {
    GompParallel found = nullptr;
    dl_iterate_phdr(find_openmp, &found);
    return found;
  }();
  return entry;
}
#else
GompParallel openmp() { return nullptr; }
#endif

// Used where there is no OpenMP: sleeping threads, started when first needed, one task at a time. Never destroyed:
// the threads may outlive the library's own end.
class Pool {
 public:
  void run(Task* task, int helpers) {
    std::unique_lock<std::mutex> one_task(entry_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start(helpers);
      task_ = task;
      helpers_ = pending_ = helpers < started_ ? helpers : started_;
      ++round_;
    }
    wake_.notify_all();
    run_pieces(task);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    task_ = nullptr;
  }

 private:
  void start(int helpers) try {
    for (; started_ < helpers; ++started_) std::thread([this, index = started_] { serve(index); }).detach();
  } catch (const std::system_error&) {
    // The system has no more threads: those that run, and the caller, do the work.
  }

  void serve(int index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (index >= helpers_ || !task_) continue;
      Task* task = task_;
      lock.unlock();
      run_pieces(task);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex entry_, mutex_;
  std::condition_variable wake_, done_;
  Task* task_ = nullptr;
  int started_ = 0, helpers_ = 0, pending_ = 0;
  uint64_t round_ = 0;
};

Pool& pool() {
  static Pool* const kept = new Pool;
  return *kept;
}

}  // namespace

void share_out(int64_t count, int threads, void (*work)(void*, int64_t), void* context) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) work(context, i);
    return;
  }
  Task task;
  task.work = work;
  task.context = context;
  task.count = count;
  if (openmp()) openmp()(run_pieces, &task, static_cast<unsigned>(threads), 0);
  else pool().run(&task, threads - 1);
  if (task.error) std::rethrow_exception(task.error);
}

const char* pool_name() { return openmp() ? "openmp" : "own"; }
