// Room for a thread's own use, kept between calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

class Scratch {
 public:
  ~Scratch() { std::free(room_); }
  // What it held before is lost when it grows. Throws std::bad_alloc, and is empty then.
  char* at_least(size_t bytes) {
    if (bytes > size_) grow(bytes);
    return room_;
  }

 private:
  void grow(size_t bytes) {
    std::free(room_);
    room_ = nullptr;
    size_ = 0;
    if (bytes > PTRDIFF_MAX / 2) throw std::bad_alloc();  // rounded up it would be small again
    const size_t whole = (bytes + 4095) / 4096 * 4096;
    room_ = static_cast<char*>(std::aligned_alloc(64, whole));
    if (!room_) throw std::bad_alloc();
    size_ = whole;
  }

  char* room_ = nullptr;
  size_t size_ = 0;
};

inline size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }
