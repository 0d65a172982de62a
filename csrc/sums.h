// Sums in a fixed order: each of 32 lanes adds every 32nd value, and the lanes are added in a butterfly.
#pragma once

#include "host_device.h"

namespace uniflow {

constexpr int kLanes = 32;

UNIFLOW_HD float lane_sum(const float* values, int count, int lane) {
  float sum = 0.0f;
  for (int i = lane; i < count; i += kLanes) sum += values[i];
  return sum;
}

#ifdef __CUDACC__
__device__ __forceinline__ float butterfly(float value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  return value;
}
#endif

// The same on a host, where of all lanes only the first one's sum is wanted. A step is a function of its own: where the steps
// were turns of a loop, each vector was read back from what the turn before had stored piece by piece.
template <int STEP = kLanes / 2>
inline float butterfly(const float* __restrict lanes) {
  float sums[STEP];
  for (int lane = 0; lane < STEP; ++lane) sums[lane] = lanes[lane] + lanes[lane + STEP];
  if constexpr (STEP == 1)
    return sums[0];
  else
    return butterfly<STEP / 2>(sums);
}

}  // namespace uniflow
