// Room for a thread's own use, kept between calls.
#pragma once

#include <cstddef>
#include <cstdlib>

class Scratch {
 public:
  ~Scratch() { std::free(room_); }
  // What it held before is lost when it grows.
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      std::free(room_);
      size_ = (bytes + 4095) / 4096 * 4096;
      room_ = static_cast<char*>(std::aligned_alloc(64, size_));
      if (!room_) std::abort();
    }
    return room_;
  }

 private:
  char* room_ = nullptr;
  size_t size_ = 0;
};

inline size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }
