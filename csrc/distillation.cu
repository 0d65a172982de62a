// Cosine distances of all layers in one launch, each token's gradient written on the way: a warp a token, which keeps the
// token in registers where it fits. And the factor that a gradient made by a forward pass may still need.
#include "cosine.h"
#include "launch.h"
#include "sums.h"
#include "tiles.cuh"
#include "types.cuh"

namespace uniflow {
namespace {

constexpr int kWarps = kThreads / kLanes;

struct Layers {
  Layer layer[kMostLayers];
};

__device__ CosineTerms terms_of(CosineSums sums) {
  sums.product = butterfly(sums.product);
  sums.student = butterfly(sums.student);
  sums.teacher = butterfly(sums.teacher);
  return cosine_terms(sums);
}

// COUNT neighbouring elements an access; KEPT accesses a lane stay in registers (0: everything is read twice).
template <class T, int COUNT, int KEPT>
__global__ void __launch_bounds__(kThreads)
    cosine_kernel(const __grid_constant__ Layers layers, int64_t batch, int64_t length, int32_t width, int64_t skip, float* distances) {
  const Layer& layer = layers.layer[blockIdx.y];
  const int lane = threadIdx.x % kLanes;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (number >= batch * length) return;
  const int64_t image = number / length, token = number - image * length;
  T* gradient = layer.gradient == nullptr ? nullptr : static_cast<T*>(layer.gradient) + number * width;
  if (token < skip) {
    if (gradient == nullptr) return;
    const float zeros[COUNT] = {};
    for (int column = lane * COUNT; column < width; column += kLanes * COUNT) store<T, COUNT>(zeros, gradient + column);
    return;
  }
  const T* student = static_cast<const T*>(layer.student) + image * layer.student_batch + token * layer.student_token;
  const T* teacher = static_cast<const T*>(layer.teacher) + image * layer.teacher_batch + token * layer.teacher_token;
  CosineSums sums;
  CosineTerms terms;
  float power = 1.0f;
  if constexpr (KEPT > 0) {
    Vector<T, COUNT> s[KEPT], t[KEPT];
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int column = (i * kLanes + lane) * COUNT;
      if (column < width) {
        s[i] = *reinterpret_cast<const Vector<T, COUNT>*>(student + column);
        t[i] = *reinterpret_cast<const Vector<T, COUNT>*>(teacher + column);
      }
    }
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      if ((i * kLanes + lane) * COUNT < width) {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) sums.add(to_float(s[i].values[k]), to_float(t[i].values[k]));
      }
    }
    terms = terms_of(sums);
    if (layer.powers != nullptr) power = gradient_power(terms.student_least);
    if (gradient != nullptr) {
#pragma unroll
      for (int i = 0; i < KEPT; ++i) {
        const int column = (i * kLanes + lane) * COUNT;
        if (column < width) {
          float out[COUNT];
#pragma unroll
          for (int k = 0; k < COUNT; ++k)
            out[k] = power * cosine_gradient(terms, to_float(s[i].values[k]), to_float(t[i].values[k]), Largest<T>::value);
          store<T, COUNT>(out, gradient + column);
        }
      }
    }
  } else {
    for (int column = lane * COUNT; column < width; column += kLanes * COUNT) {
      float s[COUNT], t[COUNT];
      load<T, COUNT>(student + column, s);
      load<T, COUNT>(teacher + column, t);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) sums.add(s[k], t[k]);
    }
    terms = terms_of(sums);
    if (layer.powers != nullptr) power = gradient_power(terms.student_least);
    for (int column = lane * COUNT; gradient != nullptr && column < width; column += kLanes * COUNT) {
      float s[COUNT], t[COUNT], out[COUNT];
      load<T, COUNT>(student + column, s);
      load<T, COUNT>(teacher + column, t);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) out[k] = power * cosine_gradient(terms, s[k], t[k], Largest<T>::value);
      store<T, COUNT>(out, gradient + column);
    }
  }
  if (lane == 0 && layer.powers != nullptr) layer.powers[number] = power;
  if (lane == 0) distances[(blockIdx.y * batch + image) * (length - skip) + token - skip] = terms.distance;
}

bool wide_layer(const Layer& layer, int64_t count) {
  const auto pointers = reinterpret_cast<uintptr_t>(layer.student) | reinterpret_cast<uintptr_t>(layer.teacher) |
                        reinterpret_cast<uintptr_t>(layer.gradient);
  return pointers % 16 == 0 && layer.student_batch % count == 0 && layer.student_token % count == 0 &&
         layer.teacher_batch % count == 0 && layer.teacher_token % count == 0;
}

template <class T>
const char* cosine_as(const Layer* all, int32_t count, int64_t batch, int64_t length, int32_t width, int64_t skip,
                      float* distances, cudaStream_t stream) {
  constexpr int COUNT = 16 / sizeof(T);
  Layers layers;
  bool wide = width % COUNT == 0;
  for (int i = 0; i < count; ++i) {
    layers.layer[i] = all[i];
    wide = wide && wide_layer(all[i], COUNT);
  }
  const auto kernel = !wide                         ? cosine_kernel<T, 1, 0>
                      : width <= 4 * kLanes * COUNT ? cosine_kernel<T, COUNT, 4>
                      : width <= 8 * kLanes * COUNT ? cosine_kernel<T, COUNT, 8>
                                                    : cosine_kernel<T, COUNT, 0>;
  const dim3 grid(static_cast<uint32_t>((batch * length + kWarps - 1) / kWarps), count);
  kernel<<<grid, kThreads, 0, stream>>>(layers, batch, length, width, skip, distances);
  return launched();
}

// The factor is known to the device only: where it is 1, nothing but it is read.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(T* values, int64_t count, const float* factor) {
  constexpr int COUNT = 16 / sizeof(T);
  const float by = *factor;
  if (by == 1.0f) return;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = thread; i < count / COUNT; i += stride) {
    float some[COUNT];
    load<T, COUNT>(values + i * COUNT, some);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) some[k] *= by;
    store<T, COUNT>(some, values + i * COUNT);
  }
  if (thread < count % COUNT) {
    T& last = values[count - 1 - thread];
    from_float(to_float(last) * by, last);
  }
}

template <class T>
const char* scale_as(void* values, int64_t count, const float* factor, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 2048;
  const int64_t blocks = count / (kThreads * (16 / sizeof(T))) + 1;
  scale_kernel<T><<<static_cast<uint32_t>(blocks < kMostBlocks ? blocks : kMostBlocks), kThreads, 0, stream>>>(
      static_cast<T*>(values), count, factor);
  return launched();
}

}  // namespace

const char* cosine_distances(const Layer* layers, int32_t count, int64_t batch, int64_t length, int32_t width,
                             int64_t skip, int32_t type, float* distances, uintptr_t stream) {
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const auto run = type == kFloat32 ? cosine_as<float> : type == kFloat16 ? cosine_as<__half> : cosine_as<__nv_bfloat16>;
  return run(layers, count, batch, length, width, skip, distances, on);
}

const char* scale(void* values, int32_t type, int64_t count, const float* factor, uintptr_t stream) {
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const auto run = type == kFloat32 ? scale_as<float> : type == kFloat16 ? scale_as<__half> : scale_as<__nv_bfloat16>;
  return run(values, count, factor, on);
}

}  // namespace uniflow
