// y = x W^T + b (a x) + bias: what rows of x go through before and while the strips of W are multiplied.
#pragma once

#include "level.h"

struct Call {
  const void* x;  // [m][k] of type
  int64_t m;
  Type type;
  bool int8;
  int threads;
};

// Up to LARGEST_GROUP products of the same x.
void multiply(const Product* products, int count, const Call& call);
// Whether the chosen level has a product of its own for many rows of bfloat16 with this image.
bool takes_many_rows(const Image* w);
// x [m][width] to out of its type, in memory of its own.
void rotate_rows(const Rotation& rotation, const void* x, void* out, int64_t m, Type type, int threads);
