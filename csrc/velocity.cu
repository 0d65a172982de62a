// x_t and the velocity loss. A block brings a tile of neighbouring patches into shared memory as rows of tokens, image row
// by image row, and then works on the rows of every repeat, which are contiguous in memory, 16 bytes a thread.
#include "launch.h"
#include "sums.h"
#include "tiles.cuh"
#include "types.cuh"
#include "velocity.h"

namespace uniflow {
namespace {

template <class T, int COUNT>
__device__ void load_pixels(const Source& source, const Tile& tile, float* rows) {
  const Tiling& tiling = source.tiling;
  for_each_run<COUNT>(tiling, tile, source.strides, [&](int64_t offset, uint32_t row, uint32_t x) {
    float pixels[COUNT];
    load<T, COUNT>(static_cast<const T*>(source.images) + offset, pixels);
    float scale = 1.0f, shift = 0.0f;
    if (source.scale_and_shift != nullptr) {
      const uint32_t channel = tiling.by_patch.quotient(row);
      scale = source.scale_and_shift[2 * channel];
      shift = source.scale_and_shift[2 * channel + 1];
    }
#pragma unroll
    for (int k = 0; k < COUNT; ++k) rows[place_in_rows(tiling, row, x + k)] = fmaf(pixels[k], scale, shift);
  });
}

// The tile's patches as rows [tile.count][4 * quads] (what is beyond the length of a row is not written).
__device__ void load_tile(const Source& source, const Tile& tile, bool wide, float* rows) {
  if (source.image_type == kFloat32) {
    wide ? load_pixels<float, 4>(source, tile, rows) : load_pixels<float, 1>(source, tile, rows);
  } else if (source.image_type == kFloat16) {
    wide ? load_pixels<__half, 8>(source, tile, rows) : load_pixels<__half, 1>(source, tile, rows);
  } else if (source.image_type == kBFloat16) {
    wide ? load_pixels<__nv_bfloat16, 8>(source, tile, rows) : load_pixels<__nv_bfloat16, 1>(source, tile, rows);
  } else {
    wide ? load_pixels<uint8_t, 16>(source, tile, rows) : load_pixels<uint8_t, 1>(source, tile, rows);
  }
}

template <class T>
__device__ __forceinline__ void load_noise(const void* noise, int64_t place, int valid, bool wide, float x0[4]) {
  const T* from = static_cast<const T*>(noise) + place;
  if (wide) {
    load<T, 4>(from, x0);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) x0[k] = k < valid ? to_float(from[k]) : 0.0f;
  }
}

// x0 of columns 4*quad .. 4*quad + 3 of a token's row; 0 beyond its end.
__device__ __forceinline__ void noise_at(const Source& source, int64_t image, int64_t token, int quad, bool wide, float x0[4]) {
  const Rows& noise = source.noise;
  const int valid = source.tiling.length - 4 * quad;
  const int64_t place = image * noise.image_stride + token * noise.token_stride + 4 * quad;
  if (valid <= 0) {
#pragma unroll
    for (int k = 0; k < 4; ++k) x0[k] = 0.0f;
  } else if (noise.data == nullptr) {
    const uint64_t seed = source.seed_at == nullptr ? source.seed : *source.seed_at;
    const int64_t row = source.first_row + image * source.tiling.tokens() + token;
    normals(counter_of(row, source.tiling.quads, quad), seed_of(seed, source.offset), x0);
  } else if (noise.type == kFloat32) {
    load_noise<float>(noise.data, place, valid, wide, x0);
  } else if (noise.type == kFloat16) {
    load_noise<__half>(noise.data, place, valid, wide, x0);
  } else {
    load_noise<__nv_bfloat16>(noise.data, place, valid, wide, x0);
  }
}

// x1 of the same columns of the tile's token `g`, in one access where all exist: four would meet in a bank.
__device__ __forceinline__ void pixels_at(const Tiling& tiling, const float* rows, uint32_t g, uint32_t quad, float x1[4]) {
  const float* from = rows + (g * tiling.quads + quad) * 4;
  const int valid = tiling.length - 4 * static_cast<int>(quad);
  if (valid >= 4) {
    load<float, 4>(from, x1);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) x1[k] = k < valid ? from[k] : 0.0f;
  }
}

__device__ __forceinline__ float coefficient_of(const Coefficients& coefficients, int64_t row) {
  return coefficients.each == nullptr ? coefficients.all : coefficients.each[row];
}

struct Wide {  // which accesses may be wide
  bool images, noise;
};

// What a block begins with: its tile, which is then in `rows`, and where in it a thread's elements are.
struct Block {
  Tile tile;
  uint32_t row_quads;
  SmallDivisor by_quads;

  __device__ Block(const Source& source, bool wide, float* rows)
      : tile(tile_at(source.tiling, blockIdx.x)),
        row_quads((source.columns + 3) / 4),
        by_quads(row_quads) {
    load_tile(source, tile, wide, rows);
    __syncthreads();
  }
};

// The tile's first token in one repeat: its row among k*B*N, that of its image among k*B, and its number in the image.
struct Tokens {
  int64_t first, image, token;

  __device__ Tokens(const Tiling& tiling, const Tile& tile, int repeat)
      : first(first_row(tiling, tile, repeat)),
        image(repeat * tiling.batch + tile.image),
        token(static_cast<int64_t>(tile.line) * tiling.across + tile.left) {}
};

// A thread works on QUADS * 4 neighbouring elements, in one access where VECTOR, else element by element.
template <class T, bool VECTOR>
constexpr int kQuads = VECTOR ? 4 / sizeof(T) : 1;

template <class T, bool VECTOR>
__global__ void __launch_bounds__(kThreads)
    interpolate_kernel(const __grid_constant__ Source source, Wide wide, const float* t, bool t_per_token, T* x_t) {
  constexpr int QUADS = kQuads<T, VECTOR>;
  extern __shared__ __align__(16) float rows[];
  const Tiling& tiling = source.tiling;
  const auto [tile, row_quads, by_quads] = Block(source, wide.images, rows);
  for (int repeat = 0; repeat < source.repeats; ++repeat) {
    const auto [first, image, token] = Tokens(tiling, tile, repeat);
    for (uint32_t i = threadIdx.x * QUADS; i < tile.count * row_quads; i += kThreads * QUADS) {
      float out[4 * QUADS];
#pragma unroll
      for (int q = 0; q < QUADS; ++q) {
        const uint32_t g = by_quads.quotient(i + q), quad = i + q - g * row_quads;
        float x0[4], x1[4];
        noise_at(source, image, token + g, quad, wide.noise, x0);
        pixels_at(tiling, rows, g, quad, x1);
        const float time = t[t_per_token ? first + g : image];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const bool inside = 4 * quad + k < tiling.length;
          out[4 * q + k] = inside ? interpolated(x1[k], x0[k], time) : 0.0f;
        }
      }
      const uint32_t g = by_quads.quotient(i), column = 4 * (i - g * row_quads);
      T* to = x_t + (first + g) * source.columns + column;
      if constexpr (VECTOR) {
        store<T, 4 * QUADS>(out, to);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (column + k < source.columns) from_float(out[k], to[k]);
      }
    }
  }
}

template <class T, bool VECTOR>
__global__ void __launch_bounds__(kThreads)
    velocity_loss_kernel(const __grid_constant__ Source source, Wide wide, Rows velocity, Coefficients coefficients,
                         T* gradient, float* losses) {
  constexpr int QUADS = kQuads<T, VECTOR>;
  extern __shared__ __align__(16) float rows[];
  const Tiling& tiling = source.tiling;
  float* partials = rows + tiling.width * 4 * tiling.quads;  // [tile.count][row_quads]
  const auto [tile, row_quads, by_quads] = Block(source, wide.images, rows);
  for (int repeat = 0; repeat < source.repeats; ++repeat) {
    const auto [first, image, token] = Tokens(tiling, tile, repeat);
    for (uint32_t i = threadIdx.x * QUADS; i < tile.count * row_quads; i += kThreads * QUADS) {
      const uint32_t g_of_first = by_quads.quotient(i), column = 4 * (i - g_of_first * row_quads);
      const T* from = static_cast<const T*>(velocity.data) + image * velocity.image_stride +
                      (token + g_of_first) * velocity.token_stride + column;
      float v[4 * QUADS];
      if constexpr (VECTOR) {
        load<T, 4 * QUADS>(from, v);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = column + k < source.columns ? to_float(from[k]) : 0.0f;
      }
#pragma unroll
      for (int q = 0; q < QUADS; ++q) {
        const uint32_t g = by_quads.quotient(i + q), quad = i + q - g * row_quads;
        const float coefficient = coefficient_of(coefficients, first + g);
        float x0[4], x1[4];
        noise_at(source, image, token + g, quad, wide.noise, x0);
        if constexpr (VECTOR) pixels_at(tiling, rows, g, quad, x1);
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const bool inside = 4 * quad + k < tiling.length;
          // one by one where columns are odd: sm_80 has no registers left for four
          if constexpr (!VECTOR) x1[k] = inside ? rows[g * 4 * tiling.quads + 4 * quad + k] : 0.0f;
          const float error = inside ? velocity_error(v[4 * q + k], x1[k], x0[k], coefficient) : 0.0f;
          sum = fmaf(error, error, sum);
          v[4 * q + k] = velocity_gradient(error, coefficient);
        }
        partials[i + q] = sum;
      }
      if (gradient != nullptr) {
        T* to = gradient + (first + g_of_first) * source.columns + column;
        if constexpr (VECTOR) {
          store<T, 4 * QUADS>(v, to);
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k)
            if (column + k < source.columns) from_float(v[k], to[k]);
        }
      }
    }
    __syncthreads();
    for (int g = threadIdx.x / kLanes; g < tile.count; g += kThreads / kLanes) {
      const int lane = threadIdx.x % kLanes;
      const float sum = butterfly(lane_sum(partials + g * row_quads, row_quads, lane));
      if (lane == 0) losses[first + g] = coefficient_of(coefficients, first + g) * sum;
    }
    __syncthreads();
  }
}

// Whether rows can be read `count` elements at a time, which may cross from one row into the next where rows touch.
bool wide_rows(const Source& source, int64_t count, const void* data, int64_t image_stride, int64_t token_stride, int64_t columns) {
  if (!aligned(data) || image_stride % count) return false;
  if (columns % count == 0 && token_stride % count == 0) return true;
  return token_stride == columns && columns % 4 == 0 && source.tiling.across * columns % count == 0 &&
         source.tiling.width * columns % count == 0;
}

Wide wide_of(const Source& source) {
  const bool noise = source.noise.data != nullptr && source.tiling.length % 4 == 0 && aligned(source.noise.data) &&
                     source.noise.image_stride % 4 == 0 && source.noise.token_stride % 4 == 0;
  const int64_t pixels = source.image_type == kFloat32 ? 4 : source.image_type == kUInt8 ? 16 : 8;
  return {wide_runs(source.tiling, source.strides, source.images, pixels), noise};
}

template <class T>
const char* interpolate_as(const Source& source, const float* t, bool t_per_token, void* x_t, cudaStream_t stream) {
  const int64_t columns = source.columns;
  const bool vector = wide_rows(source, 16 / sizeof(T), x_t, source.tiling.tokens() * columns, columns, columns);
  const size_t shared = sizeof(float) * source.tiling.width * 4 * source.tiling.quads;
  const auto kernel = vector ? interpolate_kernel<T, true> : interpolate_kernel<T, false>;
  kernel<<<static_cast<uint32_t>(source.tiling.tiles()), kThreads, shared, stream>>>(source, wide_of(source), t, t_per_token,
                                                                                  static_cast<T*>(x_t));
  return launched();
}

template <class T>
const char* velocity_loss_as(const Source& source, const Rows& velocity, const Coefficients& coefficients, void* gradient,
                             float* losses, cudaStream_t stream) {
  const int64_t columns = source.columns;
  const int64_t count = 16 / sizeof(T);
  const bool vector =
      wide_rows(source, count, velocity.data, velocity.image_stride, velocity.token_stride, columns) &&
      (gradient == nullptr || wide_rows(source, count, gradient, source.tiling.tokens() * columns, columns, columns));
  const size_t shared = sizeof(float) * source.tiling.width * (4 * source.tiling.quads + (columns + 3) / 4);
  const auto kernel = vector ? velocity_loss_kernel<T, true> : velocity_loss_kernel<T, false>;
  kernel<<<static_cast<uint32_t>(source.tiling.tiles()), kThreads, shared, stream>>>(
      source, wide_of(source), velocity, coefficients, static_cast<T*>(gradient), losses);
  return launched();
}

}  // namespace

const char* interpolate(const Source& source, const float* t, bool t_per_token, void* x_t, int32_t type, uintptr_t stream) {
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  if (type == kFloat32) return interpolate_as<float>(source, t, t_per_token, x_t, on);
  if (type == kFloat16) return interpolate_as<__half>(source, t, t_per_token, x_t, on);
  return interpolate_as<__nv_bfloat16>(source, t, t_per_token, x_t, on);
}

const char* velocity_loss(const Source& source, const Rows& velocity, const Coefficients& coefficients, void* gradient,
                          float* losses, uintptr_t stream) {
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const auto run = velocity.type == kFloat32   ? velocity_loss_as<float>
                   : velocity.type == kFloat16 ? velocity_loss_as<__half>
                                               : velocity_loss_as<__nv_bfloat16>;
  return run(source, velocity, coefficients, gradient, losses, on);
}

}  // namespace uniflow
