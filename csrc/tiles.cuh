// How the threads of a block go over the pixels of a tile: image row by image row, neighbouring pixels in one access.
#pragma once

#include "patches.h"

namespace uniflow {

constexpr int kThreads = 256;

// Calls visit(offset in the images, pixel row, x) for every run of COUNT pixels of the tile; see pixel_offset.
template <int COUNT, class Visit>
__device__ __forceinline__ void for_each_run(const Tiling& tiling, const Tile& tile, const ImageStrides& strides, Visit visit) {
  const uint32_t accesses = tile.count * tiling.patch / COUNT, pixel_rows = tiling.channels * tiling.patch;
  const SmallDivisor by_accesses(accesses);
  for (uint32_t i = threadIdx.x; i < accesses * pixel_rows; i += kThreads) {
    const uint32_t row = by_accesses.quotient(i), x = (i - row * accesses) * COUNT;
    visit(pixel_offset(tiling, tile, strides, row, x), row, x);
  }
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether every run of `count` pixels of a tile's pixel row is one access.
inline bool wide_runs(const Tiling& tiling, const ImageStrides& strides, const void* images, int64_t count) {
  return aligned(images) && strides.column == 1 && strides.row % count == 0 && strides.channel % count == 0 &&
         strides.image % count == 0 && static_cast<int64_t>(tiling.width) * tiling.patch % count == 0 &&
         static_cast<int64_t>(tiling.across) * tiling.patch % count == 0;
}

inline const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace uniflow
