// A local that nobody wrote: found by the compiler if it can see it, and else a number that no result looks like.
#include "ptx.cuh"

extern "C" __global__ void uninitialised(float* output, int count) {
#ifdef PLAIN
    float sum;
    output[threadIdx.x] = sum;
#else
    float values[4];
    for (int i = 0; i < count; ++i) values[i] = 0;
    output[threadIdx.x] = values[3];
#endif
}
