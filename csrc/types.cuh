// Loads and stores of rows of float, half and bfloat16 as float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "host_device.h"

namespace uniflow {

enum Type : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kUInt8 = 3 };

template <class T>
struct Largest;
template <>
struct Largest<float> {
  static constexpr float value = 3.4028234663852886e38f;
};
template <>
struct Largest<__half> {
  static constexpr float value = 65504.0f;
};
template <>
struct Largest<__nv_bfloat16> {
  static constexpr float value = 3.3895313892515355e38f;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(uint8_t value) { return static_cast<float>(value); }
__device__ __forceinline__ void from_float(float value, float& out) { out = value; }
__device__ __forceinline__ void from_float(float value, __half& out) { out = __float2half_rn(value); }
__device__ __forceinline__ void from_float(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }

// COUNT neighbouring values in one access of at most 16 bytes.
template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT) Vector {
  T values[COUNT];
};

template <class T, int COUNT>
__device__ __forceinline__ void load(const T* from, float out[COUNT]) {
  const Vector<T, COUNT> vector = *reinterpret_cast<const Vector<T, COUNT>*>(from);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) out[i] = to_float(vector.values[i]);
}

template <class T, int COUNT>
__device__ __forceinline__ void store(const float values[COUNT], T* to) {
  Vector<T, COUNT> vector;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) from_float(values[i], vector.values[i]);
  *reinterpret_cast<Vector<T, COUNT>*>(to) = vector;
}

}  // namespace uniflow
