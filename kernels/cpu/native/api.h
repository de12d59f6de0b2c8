// The library's C interface: pointers and sizes, nothing of torch. kernels/cpu/library.py is its only caller.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#define EXPORT extern "C" __attribute__((visibility("default")))
#else
#define EXPORT extern "C"
#endif

// Of the interface and of images: the caller refuses a library that was built from other sources.
EXPORT int32_t quantc_cpu_version();
// Names of the levels of this processor, separated by spaces, best last.
EXPORT const char* quantc_cpu_levels();
EXPORT const char* quantc_cpu_level();
EXPORT int32_t quantc_cpu_choose_level(const char* name);  // 0 if there is no such level
EXPORT int32_t quantc_cpu_has_int8();                      // whether the chosen level multiplies int8 activations
EXPORT const char* quantc_cpu_pool();

// Bytes of the image of a weight; 0 for one that there is no image of.
EXPORT int64_t quantc_cpu_image_bytes(int32_t bits, int64_t n, int64_t k, int64_t group, int32_t per_ic,
                                      int32_t symmetric);
// zeros: null if symmetric. image: as many bytes as said above, at a multiple of 64.
EXPORT void quantc_cpu_pack(int32_t bits, int64_t n, int64_t k, int64_t group, int32_t per_ic, const void* codes,
                            const void* scales, const void* zeros, void* image, int32_t threads);

// The same of a weight with dropped groups: marks [n][ceil(ceil(k / group) / 8)], codes, scales and zeros are those of the
// format group-sparse, as many as marks says. group: up to 32, and up to k.
EXPORT int64_t quantc_cpu_kept_bytes(int32_t bits, int64_t n, int64_t k, int64_t group, const void* marks,
                                     int32_t symmetric);
EXPORT void quantc_cpu_pack_kept(int32_t bits, int64_t n, int64_t k, int64_t group, const void* marks, const void* codes,
                                 const void* scales, const void* zeros, void* image, int32_t threads);

// The products of x [m][k] with 1 to LARGEST_GROUP weights of this k: `products` are Product structs (weight.h), each
// with its rotation of x, its low-rank addition and its bias. Types: 0 float32, 1 float16, 2 bfloat16; every y has that
// of x. int8: nonzero rounds x to int8 in blocks of 32, where has_int8 says so.
EXPORT void quantc_cpu_matmul(const void* products, int32_t count, const void* x, int64_t m, int32_t type, int32_t int8,
                              int32_t threads);

// x [m][width] rotated, for a Rotation (weight.h), to out of its type.
EXPORT void quantc_cpu_rotate(const void* rotation, const void* x, void* out, int64_t m, int32_t type, int32_t threads);

// Rows [from, to) of W as columns of out [k][to - from]. from and to: multiples of quantc_cpu_panel_step, or to is n.
// Of an image with dropped groups, where quantc_cpu_panel_by_rows says so, as rows of out [to - from][k].
EXPORT int32_t quantc_cpu_panel_by_rows(const void* image);
// Whether the chosen level has a product of its own for many rows of bfloat16 with this image.
EXPORT int32_t quantc_cpu_takes_many_rows(const void* image);
EXPORT int64_t quantc_cpu_panel_step(const void* image);
EXPORT void quantc_cpu_unpack(const void* image, int64_t from, int64_t to, void* out, int32_t type, int32_t threads);

// torch's C functions as Torch of steps.cpp lists them, before a step is run.
EXPORT void quantc_cpu_use_torch(const void* functions);
// A Rotation (weight.h) that lives on, for steps to find by its width and block.
EXPORT void quantc_cpu_keep_rotation(const void* rotation);
// An operator of torch's dispatcher: x, a count of images and of biases, which of these are there, the order of x's
// rotation, int8. Returns the products one behind the other.
EXPORT void quantc_cpu_step(uint64_t* values, uint64_t count, uint64_t outputs);
