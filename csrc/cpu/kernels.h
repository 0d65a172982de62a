// What the CPU part computes: one table of functions a level of instructions. Each works on a run of units, `begin` to
// `end`, that share nothing with the others, so that the bits do not depend on who works on which. All strides are in
// elements.
#pragma once

#include <cstdint>

namespace uniflow_cpu {

constexpr int64_t kScaledAtOnce = 1 << 12;  // elements
constexpr int kTokens = 8;                  // of which distances are made at once; both sides' and a gradient are scratch

enum Type : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kUInt8 = 3 };

struct Noise {  // units: counters of all groups of rows, each with a seed of its own
  const uint64_t* seeds;
  uint64_t offset;
  int64_t first_row, rows, columns;  // rows of a group
  float* out;
};

struct Pictures {
  void* data;
  int64_t image, channel, row, column;  // strides
  int64_t batch, channels, down, across, patch;

  int64_t lines() const { return batch * down; }
  int64_t length() const { return channels * patch * patch; }
};

struct Rows {  // [.., N, ...], of any type but float64
  void* data;
  int32_t type;
  int64_t image, token;  // strides
};

struct Source {  // what x1 and x0 are made of
  Pictures pictures;
  int32_t type;
  const float* scale_and_shift;  // [C, 2], or null
  int64_t repeats;
  Rows noise;  // data is null where the seed counts
  uint64_t seed, offset;
  int64_t first_row;
  int64_t columns;  // length of a row of x_t or of the velocity

  int64_t lines() const { return repeats * pictures.lines(); }
};

struct Interpolate {  // units: lines of patches
  Source source;
  const float* t;
  bool per_token;
  void* x_t;
  int32_t type;
};

struct Loss {  // units: lines of patches
  Source source;
  Rows velocity;
  const float* each;  // coefficients of the tokens [k*B*N], or null
  float all;
  void* gradient;  // contiguous, or null
  float* losses;
};

struct Move {  // units: lines of patches
  Pictures pictures;
  void* rows;
  int64_t image, token, column;  // strides
  int32_t size;                  // bytes of an element
  bool cut;
};

struct Finish {  // units: lines of patches
  Pictures pictures;
  int32_t type;
  Rows rows, velocity;  // data of the velocity may be null
  int64_t rows_column, velocity_column;
  float dt;
  const float* mean_and_std;  // [C, 2], or null
  bool clamp;
};

struct Layer {  // [B, S, D] with neighbouring elements in a row
  const void* student;
  const void* teacher;
  void* gradient;  // contiguous, or null
  float* powers;   // [B, S], what each token's gradient was multiplied by, or null
  int64_t student_batch, student_token, teacher_batch, teacher_token;
};

struct Distances {  // units: tokens of all layers
  const Layer* layers;
  int64_t batch, length, width, skip;
  int32_t type, teacher_type;
  float* distances;  // [L, B, S - skip]
};

struct Scaled {  // contiguous, [rows, width]
  void* values;
  const float* factors;  // of the rows
  int64_t rows, width;
  int32_t type;
  int64_t first;  // unit

  int64_t units() const { return (rows * width + kScaledAtOnce - 1) / kScaledAtOnce; }
};

struct Scale {  // units: so many elements of one tensor; only the last of each has fewer
  const Scaled* tensors;
};

// `scratch` is memory of the thread's own: five rows.
struct Kernels {
  void (*noise)(const Noise&, int64_t begin, int64_t end);
  void (*interpolate)(const Interpolate&, int64_t begin, int64_t end, float* scratch);
  void (*loss)(const Loss&, int64_t begin, int64_t end, float* scratch);
  void (*move)(const Move&, int64_t begin, int64_t end, float* scratch);
  void (*finish)(const Finish&, int64_t begin, int64_t end, float* scratch);
  void (*distances)(const Distances&, int64_t begin, int64_t end, float* scratch);
  void (*scale)(const Scale&, int64_t begin, int64_t end, float* scratch);
};

inline int64_t scratch_row(int64_t length) { return (length + 15) / 16 * 16; }  // whole cache lines

namespace baseline {
extern const Kernels kernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace uniflow_cpu
