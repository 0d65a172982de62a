// The flow head's blocks for few rows: a product reads every weight once and holds all rows, and what is computed of a
// row stays in float32 from the first product to the last. All of it is memory traffic, of the weights.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace uniflow_cpu {

struct Affine {  // a weight, and a bias or null
  const void* weight;
  const void* bias;
};

enum class Then { kNothing, kSilu, kSwiglu, kGatedResidual };  // with the sums of a product

struct Product {  // units: columns of `to`
  const float* rows;  // [R, in], each row padded with zeros to whole cache lines
  int64_t count, in, out;
  Affine layer;  // [out, in], of kSwiglu [2 out, in], the gate's first
  int32_t type;
  Then then;
  float* to;        // [R, ...]; of kGatedResidual what is added to
  int64_t to_row;   // stride
  float* up;        // of kSwiglu what the gate multiplies, like `to`
  const float* const* gates;  // of kGatedResidual each row's
};

struct Modulated {  // units: rows
  const float* x;   // [R, W], strides as those of `to`
  int64_t width, row;
  Affine norm;
  int32_t type;  // of the norm
  float eps;
  bool rms;
  const float* const* shifts;  // each row's, or null
  const float* const* scales;
  float* to;
};

struct FlowKernels {
  void (*product)(const Product&, int64_t begin, int64_t end);
  void (*modulated)(const Modulated&, int64_t begin, int64_t end);
  void (*widen)(const void* from, int32_t type, int64_t count, float* to);
  void (*narrow)(const float* from, int32_t type, int64_t count, void* to);
};

namespace baseline {
extern const FlowKernels flow_kernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const FlowKernels flow_kernels;
}
namespace avx512 {
extern const FlowKernels flow_kernels;
}
#endif

}  // namespace uniflow_cpu
