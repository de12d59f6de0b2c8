// Work shared among the threads that torch uses.
#pragma once

#include <cstdint>

// Calls work(context, i) for i in [0, count), on up to `threads` threads; returns when all is done. Throws what the
// first piece that failed has thrown; pieces that no thread had begun then are left out.
void share_out(int64_t count, int threads, void (*work)(void* context, int64_t i), void* context);

// Which pool runs it: "openmp" (the library's that torch has loaded), "own" (without one), for `quantc doctor`.
const char* pool_name();
