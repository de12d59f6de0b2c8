// From the parts of the dense and of the group-sparse format to an image.
#pragma once

#include "image.h"

// The header of an image, offsets and size included; bytes is 0 for a weight that the kernels cannot have.
Image describe(int bits, int64_t n, int64_t k, int64_t group, bool per_ic, bool symmetric);

// Fills an image of which only the bytes are there. codes [n][ceil(k * bits / 8)], scales and zeros as in the format.
void pack(const Image& header, int stored_bits, const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros,
          int threads, void* image);

// A weight with dropped groups as it is stored. marks [n][ceil(groups / 8)]: a bit for each group, 1 where it stays.
// kept: of how many groups there are codes, scales and zeros.
struct Stored {
  const uint8_t *marks, *codes;
  const uint16_t* scales;
  const uint8_t* zeros;
  bool symmetric;  // then there are no zeros
  int64_t kept;
};

// The same of a weight with dropped groups (kept.h). pack_kept does nothing and returns false where marks are not of as
// many groups as are stored, or image is of other bytes than these make.
int64_t kept_bytes(int bits, int64_t n, int64_t k, int64_t group, const uint8_t* marks, bool symmetric);
bool pack_kept(int bits, int64_t n, int64_t k, int64_t group, const Stored& stored, int threads, void* image, int64_t image_bytes);
