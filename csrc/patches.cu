// Images to rows of pixels, one row a token, and back: through a tile in shared memory, so that both sides are read and
// written in long runs. Elements are moved as they are, by their size.
#include "launch.h"
#include "tiles.cuh"
#include "types.cuh"

namespace uniflow {
namespace {

// Between the tile in shared memory and the images, COUNT neighbouring pixels an access.
template <class T, int COUNT, bool CUT>
__device__ void move_pixels(const Patches& move, const Tile& tile, T* rows) {
  const Tiling& tiling = move.tiling;
  for_each_run<COUNT>(tiling, tile, move.strides, [&](int64_t offset, uint32_t row, uint32_t x) {
    auto& pixels = *reinterpret_cast<Vector<T, COUNT>*>(static_cast<T*>(move.images) + offset);
    Vector<T, COUNT> some;
    if constexpr (CUT) some = pixels;
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      T& place = rows[place_in_rows(tiling, row, x + k)];
      CUT ? place = some.values[k] : some.values[k] = place;
    }
    if constexpr (!CUT) pixels = some;
  });
}

// Between the tile and the rows of tokens: 16 bytes an access where both lie without gaps, else element by element.
template <class T, bool VECTOR, bool CUT>
__device__ void move_rows(const Patches& move, const Tile& tile, T* rows) {
  const Tiling& tiling = move.tiling;
  T* tokens = static_cast<T*>(move.rows);
  const uint32_t elements = tile.count * tiling.length;
  if constexpr (VECTOR) {
    constexpr int COUNT = 16 / sizeof(T);
    auto* there = reinterpret_cast<Vector<T, COUNT>*>(tokens + row_offset(tiling, tile, move.row_strides, 0, 0));
    auto* here = reinterpret_cast<Vector<T, COUNT>*>(rows);
    for (uint32_t i = threadIdx.x; i < elements / COUNT; i += kThreads) CUT ? there[i] = here[i] : here[i] = there[i];
  } else {
    const SmallDivisor by_length(tiling.length);
    for (uint32_t i = threadIdx.x; i < elements; i += kThreads) {
      const uint32_t g = by_length.quotient(i), column = i - g * tiling.length;
      T& there = tokens[row_offset(tiling, tile, move.row_strides, g, column)];
      T& here = rows[g * 4 * tiling.quads + column];
      CUT ? there = here : here = there;
    }
  }
}

// Four blocks a multiprocessor: left to itself, ptxas makes room for more on sm_100, and spills for it.
template <class T, bool WIDE, bool VECTOR, bool CUT>
__global__ void __launch_bounds__(kThreads, 4) patches_kernel(const __grid_constant__ Patches move) {
  constexpr int COUNT = WIDE ? 16 / sizeof(T) : 1;
  extern __shared__ __align__(16) unsigned char shared[];
  T* rows = reinterpret_cast<T*>(shared);
  const Tile tile = tile_at(move.tiling, blockIdx.x);
  if constexpr (CUT) {
    move_pixels<T, COUNT, CUT>(move, tile, rows);
    __syncthreads();
    move_rows<T, VECTOR, CUT>(move, tile, rows);
  } else {
    move_rows<T, VECTOR, CUT>(move, tile, rows);
    __syncthreads();
    move_pixels<T, COUNT, CUT>(move, tile, rows);
  }
}

// Whether rows lie in memory as they do in a tile, tile after tile at multiples of 16 bytes.
bool without_gaps(const Patches& move, int64_t count) {
  const Tiling& tiling = move.tiling;
  const int64_t length = tiling.length;
  return aligned(move.rows) && length % 4 == 0 && move.row_strides.column == 1 && move.row_strides.token == length &&
         move.row_strides.image % count == 0 && tiling.across * length % count == 0 && tiling.width * length % count == 0;
}

template <class T, bool CUT>
const char* move_as(const Patches& move, cudaStream_t stream) {
  constexpr int64_t COUNT = 16 / sizeof(T);
  const bool wide = wide_runs(move.tiling, move.strides, move.images, COUNT), vector = without_gaps(move, COUNT);
  const auto kernel = wide ? (vector ? patches_kernel<T, true, true, CUT> : patches_kernel<T, true, false, CUT>)
                           : (vector ? patches_kernel<T, false, true, CUT> : patches_kernel<T, false, false, CUT>);
  const size_t shared = sizeof(T) * move.tiling.width * 4 * move.tiling.quads;
  kernel<<<static_cast<uint32_t>(move.tiling.tiles()), kThreads, shared, stream>>>(move);
  return launched();
}

template <class T>
const char* move_by_size(const Patches& move, bool cut, cudaStream_t stream) {
  return cut ? move_as<T, true>(move, stream) : move_as<T, false>(move, stream);
}

}  // namespace

const char* move_patches(const Patches& move, int32_t size, bool cut, uintptr_t stream) {
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const auto run = size == 1   ? move_by_size<uint8_t>
                   : size == 2 ? move_by_size<uint16_t>
                   : size == 4 ? move_by_size<uint32_t>
                               : move_by_size<uint64_t>;
  return run(move, cut, on);
}

}  // namespace uniflow
