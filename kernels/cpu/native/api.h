// The library's C interface: pointers and sizes, nothing of torch. kernels/cpu/library.py is its only caller.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#define EXPORT extern "C" __attribute__((visibility("default")))
#else
#define EXPORT extern "C"
#endif

// What functions return that can fail. Nothing is written, or something that means nothing, where they do.
enum Status : int32_t {
  DONE = 0,
  OUT_OF_MEMORY = 1,
  REFUSED = 2,  // sizes, types or addresses that do not belong together
  FAILED = 3,   // what the system refuses else
};

// Of the interface and of images: the caller refuses a library that was built from other sources.
EXPORT int32_t quantc_cpu_version();
// Names of the levels of this processor, separated by spaces, best last.
EXPORT const char* quantc_cpu_levels();
EXPORT const char* quantc_cpu_level();
EXPORT int32_t quantc_cpu_choose_level(const char* name);  // 0 if there is no such level
EXPORT int32_t quantc_cpu_has_int8();                      // whether the chosen level multiplies int8 activations
EXPORT const char* quantc_cpu_pool();

// Bytes of the image of a weight; 0 for one that there is no image of, as where they are more than 64 bits count.
EXPORT int64_t quantc_cpu_image_bytes(int32_t bits, int64_t n, int64_t k, int64_t group, int32_t per_ic,
                                      int32_t symmetric);
// zeros: null if symmetric. image: of image_bytes, as many as said above, at a multiple of 64.
EXPORT int32_t quantc_cpu_pack(int32_t bits, int64_t n, int64_t k, int64_t group, int32_t per_ic, const void* codes,
                               const void* scales, const void* zeros, void* image, int64_t image_bytes, int32_t threads);

// The same of a weight with dropped groups: marks [n][ceil(ceil(k / group) / 8)], codes, scales and zeros are those of the
// format group-sparse, of `kept` groups, which are as many as marks says; zeros are not read if symmetric. group: up to
// 32, and up to k. image_bytes: what kept_bytes finds, 0 for a weight that there is no image of.
EXPORT int32_t quantc_cpu_kept_bytes(int32_t bits, int64_t n, int64_t k, int64_t group, const void* marks,
                                     int32_t symmetric, int64_t* image_bytes);
EXPORT int32_t quantc_cpu_pack_kept(int32_t bits, int64_t n, int64_t k, int64_t group, const void* marks, int64_t kept,
                                    const void* codes, const void* scales, const void* zeros, int32_t symmetric,
                                    void* image, int64_t image_bytes, int32_t threads);

// Trellis codes [columns][n] of columns of weights (trellis.h): tiles of `tile` rows are coded together, each row in units
// of `unit` [n] and with the scale `scale` [n]. upper: U from the first column's pivot on, with strides upper_row and
// upper_column; then errors [columns][n] over their pivots are written, and fed into the columns of left after them. Null:
// nothing is fed back, and neither scale nor errors is needed.
EXPORT int32_t quantc_cpu_round_trellis(int32_t bits, int32_t tile, int64_t n, int64_t columns, void* left,
                                        const void* unit, const void* scale, const void* upper, int64_t upper_row,
                                        int64_t upper_column, void* errors, void* codes, int32_t threads);

// The products of x [m][k] with 1 to LARGEST_GROUP weights in trellis codes: Products whose image is a trellis::Stored.
// Types and int8: as below, but rows of int8 activations come one at a time; more rows stay as they are.
EXPORT int32_t quantc_cpu_multiply_trellis(const void* products, int32_t count, const void* x, int64_t m, int64_t k,
                                           int32_t type, int32_t int8, int32_t threads);
// Whether many rows of bfloat16 are best left to it, and not to torch's product with unpacked rows.
EXPORT int32_t quantc_cpu_trellis_takes_many_rows();
// Rows [from, to) of a trellis::Stored, whole tiles, as columns of out [k][to - from] of a type. values: of out.
EXPORT int32_t quantc_cpu_unpack_trellis(const void* stored, int64_t from, int64_t to, void* out, int64_t values,
                                         int32_t type, int32_t threads);

// Write the size of an image's weight; REFUSED for anything but an image of this version of image_bytes bytes.
EXPORT int32_t quantc_cpu_image_shape(const void* image, int64_t image_bytes, int64_t* n, int64_t* k);

// The products of x [m][k] with 1 to LARGEST_GROUP weights of this k: `products` are Product structs (weight.h), each
// with its rotation of x, its low-rank addition and its bias. Types: 0 float32, 1 float16, 2 bfloat16; every y has that
// of x. int8: nonzero rounds x to int8 in blocks of 32, where has_int8 says so.
EXPORT int32_t quantc_cpu_matmul(const void* products, int32_t count, const void* x, int64_t m, int64_t k, int32_t type,
                                 int32_t int8, int32_t threads);

// x [m][width] rotated, for a Rotation (weight.h), to out of its type.
EXPORT int32_t quantc_cpu_rotate(const void* rotation, const void* x, void* out, int64_t m, int32_t type, int32_t threads);

// Rows [from, to) of W as columns of out [k][to - from]. from and to: multiples of quantc_cpu_panel_step, or to is n.
// Of an image with dropped groups, where quantc_cpu_panel_by_rows says so, as rows of out [to - from][k]. values: of out.
EXPORT int32_t quantc_cpu_panel_by_rows(const void* image);
// Whether many rows are best left to the chosen level's own product with this image: there is one for them, or the level
// has no products of bfloat16, and torch's take several times as long as those of floats there.
EXPORT int32_t quantc_cpu_takes_many_rows(const void* image);
EXPORT int64_t quantc_cpu_panel_step(const void* image);
EXPORT int32_t quantc_cpu_unpack(const void* image, int64_t from, int64_t to, void* out, int64_t values, int32_t type,
                                 int32_t threads);

// torch's C functions as Torch of steps.cpp lists them, before a step is run.
EXPORT void quantc_cpu_use_torch(const void* functions);
// A Rotation (weight.h) that lives on, for steps to find by its width and block.
EXPORT int32_t quantc_cpu_keep_rotation(const void* rotation);
// An operator of torch's dispatcher: x, a count of images and of biases, which of these are there, the order of x's
// rotation, int8, and how many outputs there are. Returns the products one behind the other. Throws, as torch expects, a
// std::exception that says which tensor it cannot read, or that memory is out.
EXPORT void quantc_cpu_step(uint64_t* values, uint64_t count, uint64_t outputs);
// The same of weights in trellis codes: x, their codes, scales and biases, which of these are there, the order of x's
// rotation, the bits of each weight, four for each, int8, and how many outputs there are.
EXPORT void quantc_cpu_trellis_step(uint64_t* values, uint64_t count, uint64_t outputs);
