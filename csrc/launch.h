// What the module calls: launches on a stream, with raw device pointers. A call returns an error's text, or null.
#pragma once

#include <cstdint>

#include "noise.h"
#include "patches.h"

namespace uniflow {

struct Rows {  // [k*B, N, ...] with neighbouring elements in a row; strides in elements
  const void* data;
  int32_t type;
  int64_t image_stride, token_stride;
};

struct Source {  // what x1 and x0 are made of
  Tiling tiling;
  const void* images;
  int32_t image_type;
  ImageStrides strides;
  const float* scale_and_shift;  // [C, 2], or null
  int32_t repeats;
  Rows noise;  // data is null where the seed counts
  uint64_t seed, offset;
  const uint64_t* seed_at;  // null, or where the device holds the seed
  int64_t first_row;  // of the seed's noise, which row 0 has
  int32_t columns;  // length of a row of x_t or of the velocity
};

struct Coefficients {  // of the tokens
  const float* each;  // [k*B*N], or null
  float all;
};

struct Patches {  // what is moved between images and rows
  Tiling tiling;
  void* images;
  ImageStrides strides;
  void* rows;
  RowStrides row_strides;
};

struct Layer {  // [B, S, D] with neighbouring elements in a row; strides in elements
  const void* student;
  const void* teacher;
  void* gradient;  // contiguous, or null
  float* powers;   // [B, S], what each token's gradient was multiplied by, or null
  int64_t student_batch, student_token, teacher_batch, teacher_token;
};

constexpr int kMostLayers = 64;
constexpr int kMostPixels = 12000;  // of four bytes, of a tile in shared memory: 48 KB with the partial sums

const char* interpolate(const Source& source, const float* t, bool t_per_token, void* x_t, int32_t type, uintptr_t stream);
const char* velocity_loss(const Source& source, const Rows& velocity, const Coefficients& coefficients, void* gradient,
                          float* losses, uintptr_t stream);
const char* move_patches(const Patches& move, int32_t size, bool cut, uintptr_t stream);  // size: bytes of an element
const char* cosine_distances(const Layer* layers, int32_t count, int64_t batch, int64_t length, int32_t width,
                             int64_t skip, int32_t type, float* distances, uintptr_t stream);
const char* scale(void* values, int32_t type, int64_t count, const float* factor, uintptr_t stream);

}  // namespace uniflow
