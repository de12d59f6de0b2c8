// A record of every byte of shared memory: who wrote it and who read it since the last barrier.
//
// Two accesses of one byte by different threads are in order if a sync_block lies between them or, in one warp, an
// operation that all its lanes take part in; if not, and one of them is a write, they race.
#pragma once

#include "fiber.h"

namespace simt {

void load_as(const char* what, void* value, const void* shared, size_t size, size_t alignment, Site site);

// Dynamic shared memory, of exactly this size; then, at the begin of each block, without contents.
void make_dynamic(size_t size);
void forget_dynamic();

}  // namespace simt
