// y = x W^T + b (a x) + bias of weights in trellis codes.
#pragma once

#include "multiply.h"
#include "trellis.h"

namespace trellis {

// Whether sizes belong together: of a weight, and of rows [from, to) of it, whole tiles.
bool is_weight(const Stored* w);
bool are_tiles(const Stored* w, int64_t from, int64_t to);
// False where torch's product of many rows of bfloat16 with an unpacked weight is faster: with instructions made for it.
bool takes_many_rows();

// Up to LARGEST_GROUP products of the same x, whose weight.image is a Stored each. Throws std::bad_alloc.
void multiply(const Product* products, int count, const Call& call);
// Rows [from, to) as columns of out [k][to - from]. Throws std::bad_alloc.
void unpack(const Stored* w, int64_t from, int64_t to, void* out, Type type, int threads);

}  // namespace trellis
