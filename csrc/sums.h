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

// The same on a host, where of all lanes only the first one's sum is wanted.
inline float butterfly(const float lanes[kLanes]) {
  float now[kLanes];
  memcpy(now, lanes, sizeof now);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int lane = 0; lane < step; ++lane) now[lane] += now[lane + step];
  return now[0];
}

}  // namespace uniflow
