// The loops of flow.h, compiled once for each level of instructions, as kernels.cpp is.
#include "flow.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace uniflow_cpu::UNIFLOW_LEVEL {
namespace {

#include "../host_device.h"
// what stands on it
#include "elements.h"

#if defined(__AVX512F__)
constexpr int kWide = 16, kTile = 4;  // floats of a vector; rows of a tile, whose sums stay in registers
#elif defined(__AVX2__)
constexpr int kWide = 8, kTile = 2;
#elif defined(__aarch64__)
constexpr int kWide = 4, kTile = 4;
#else
constexpr int kWide = 4, kTile = 2;
#endif
constexpr int kColumns = 4;  // of a tile

typedef float Floats __attribute__((vector_size(4 * kWide)));
typedef uint32_t Words __attribute__((vector_size(4 * kWide)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWide)));

inline Floats load(const float* from) {
  Floats value;
  memcpy(&value, from, sizeof value);
  return value;
}

inline Floats load(const uint16_t* from) {  // bfloat16
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Floats value;
  memcpy(&value, &words, sizeof value);
  return value;
}

template <class Weight>
inline Floats load_some(const Weight* from, int64_t count) {  // zeros behind
  Weight padded[kWide] = {};
  memcpy(padded, from, count * sizeof(Weight));
  return load(padded);
}

inline float total(const Floats& value) {
  float lanes[kWide];
  memcpy(lanes, &value, sizeof value);
  for (int step = kWide / 2; step > 0; step /= 2)
    for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
  return lanes[0];
}

// Products of kTall rows of weights with kRows rows, `stride` apart, into sums [kTall][kRows].
template <int kTall, int kRows, class Weight>
inline void tile(const Weight* weight, const float* rows, int64_t in, int64_t stride, float (*sums)[kTile]) {
  Floats partial[kTall][kRows] = {};
  int64_t k = 0;
  for (; k + kWide <= in; k += kWide) {
    Floats x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = load(rows + r * stride + k);
    for (int c = 0; c < kTall; ++c) {
      __builtin_prefetch(weight + (c + kTall) * in + k);  // of the next tile: a row is too short for the processor to see it come
      const Floats w = load(weight + c * in + k);
      for (int r = 0; r < kRows; ++r) partial[c][r] += w * x[r];
    }
  }
  if (k < in)
    for (int c = 0; c < kTall; ++c) {
      const Floats w = load_some(weight + c * in + k, in - k);
      for (int r = 0; r < kRows; ++r) partial[c][r] += w * load(rows + r * stride + k);
    }
  for (int c = 0; c < kTall; ++c)
    for (int r = 0; r < kRows; ++r) sums[c][r] = total(partial[c][r]);
}

template <int kTall, class Weight>
inline void tile_of(int64_t rows, const Weight* weight, const float* from, int64_t in, int64_t stride, float (*sums)[kTile]) {
  if constexpr (kTile == 4) {
    if (rows == 4) return tile<kTall, 4>(weight, from, in, stride, sums);
    if (rows == 3) return tile<kTall, 3>(weight, from, in, stride, sums);
  }
  if (rows == 2) return tile<kTall, 2>(weight, from, in, stride, sums);
  tile<kTall, 1>(weight, from, in, stride, sums);
}

// Columns `begin` to `end` of rows * weight^T + bias, the column `first` of the weight being the column 0 of `to`.
template <class Weight>
void multiply(const Product& job, const Weight* weight, const void* bias, float* to, int64_t begin, int64_t end) {
  const int64_t stride = scratch_row(job.in);
  for (int64_t column = begin; column < end; column += kColumns) {
    const int64_t tall = end - column < kColumns ? end - column : kColumns;
    float added[kColumns] = {};
    if (bias != nullptr) {
      float scratch[kColumns];
      const float* values = floats(at(bias, column * sizeof(Weight)), job.type, tall, scratch);
      memcpy(added, values, tall * sizeof(float));
    }
    for (int64_t row = 0; row < job.count; row += kTile) {
      const int64_t rows = job.count - row < kTile ? job.count - row : kTile;
      const float* from = job.rows + row * stride;
      float sums[kColumns][kTile];
      if (tall == kColumns) {
        tile_of<kColumns>(rows, weight + column * job.in, from, job.in, stride, sums);
      } else {
        for (int64_t c = 0; c < tall; ++c) tile_of<1>(rows, weight + (column + c) * job.in, from, job.in, stride, sums + c);
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < tall; ++c) to[(row + r) * job.to_row + column + c] = sums[c][r] + added[c];
    }
  }
}

// e^x for x at most 0, within 2 units of the last place; 0 where that is below the least normal number.
inline float exponential(float x) {
  const float at_least = x > -87.3f ? x : -87.3f;  // a NaN becomes a number, which `silu` undoes
  const float shifted = at_least * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the addition rounds to an integer
  const float power = shifted - 12582912.0f;
  const float rest = (at_least - power * 0.693145752f) - power * 1.42860677e-6f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const uint32_t scale = (uniflow::bits_of_float(shifted) + 127u) << 23;  // the low bits of `shifted` are the integer
  return sum * uniflow::float_of_bits(scale);
}

inline float silu(float x) {
  const float small = exponential(x < 0.0f ? x : -x);  // of -|x|
  return x * (x < 0.0f ? small : 1.0f) / (1.0f + small);
}

void product(const Product& job, int64_t begin, int64_t end) {
  const auto columns = [&](const void* weight, const void* bias, float* to) {
    if (job.type == kFloat32) {
      multiply(job, static_cast<const float*>(weight), bias, to, begin, end);
    } else {
      multiply(job, static_cast<const uint16_t*>(weight), bias, to, begin, end);
    }
  };
  if (job.then == Then::kGatedResidual) {
    columns(job.layer.weight, job.layer.bias, job.up);
  } else {
    columns(job.layer.weight, job.layer.bias, job.to);
  }
  if (job.then == Then::kSwiglu) {
    const int64_t size = bytes_of(job.type);
    const void* bias = job.layer.bias == nullptr ? nullptr : at(job.layer.bias, job.out * size);
    columns(at(job.layer.weight, job.out * job.in * size), bias, job.up);
  }
  for (int64_t row = 0; row < job.count && job.then != Then::kNothing; ++row) {
    float* __restrict to = job.to + row * job.to_row;
    const float* __restrict other = job.up == nullptr ? nullptr : job.up + row * job.to_row;
    if (job.then == Then::kSilu) {
      for (int64_t i = begin; i < end; ++i) to[i] = silu(to[i]);
    } else if (job.then == Then::kSwiglu) {
      for (int64_t i = begin; i < end; ++i) to[i] = silu(to[i]) * other[i];
    } else {
      const float* __restrict gate = job.gates[row];
      for (int64_t i = begin; i < end; ++i) to[i] += gate[i] * other[i];
    }
  }
}

// Sums in kWide * 4 lanes, each of which adds every so many-th value.
template <class Value>
inline float sum_of(int64_t count, const Value& value) {
  constexpr int kMany = 4 * kWide;
  float lanes[kMany] = {};
  int64_t i = 0;
  for (; i + kMany <= count; i += kMany)
    for (int lane = 0; lane < kMany; ++lane) lanes[lane] += value(i + lane);
  for (int lane = 0; i + lane < count; ++lane) lanes[lane] += value(i + lane);
  for (int step = kMany / 2; step > 0; step /= 2)
    for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
  return lanes[0];
}

void modulated(const Modulated& job, int64_t begin, int64_t end) {
  const int64_t width = job.width;
  const int64_t size = bytes_of(job.type);
  for (int64_t row = begin; row < end; ++row) {
    const float* __restrict x = job.x + row * job.row;
    float* __restrict to = job.to + row * job.row;
    const float mean = job.rms ? 0.0f : sum_of(width, [&](int64_t i) { return x[i]; }) / static_cast<float>(width);
    const float squares = sum_of(width, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(width) + job.eps);
    for (int64_t i = 0; i < width; ++i) to[i] = (x[i] - mean) * factor;
    constexpr int64_t kPart = 256;
    float weights[kPart], biases[kPart];
    for (int64_t start = 0; start < width && job.norm.weight != nullptr; start += kPart) {
      const int64_t count = width - start < kPart ? width - start : kPart;
      const float* __restrict weight = floats(at(job.norm.weight, start * size), job.type, count, weights);
      for (int64_t i = 0; i < count; ++i) to[start + i] *= weight[i];
      if (job.norm.bias == nullptr) continue;
      const float* __restrict bias = floats(at(job.norm.bias, start * size), job.type, count, biases);
      for (int64_t i = 0; i < count; ++i) to[start + i] += bias[i];
    }
    if (job.shifts == nullptr) continue;
    const float* __restrict shift = job.shifts[row];
    const float* __restrict scale = job.scales[row];
    for (int64_t i = 0; i < width; ++i) to[i] = to[i] * (1.0f + scale[i]) + shift[i];
  }
}

void widen(const void* from, int32_t type, int64_t count, float* to) {
  const float* values = floats(from, type, count, to);
  if (values != to) memcpy(to, values, count * sizeof(float));
}

void narrow(const float* from, int32_t type, int64_t count, void* to) { store(from, type, count, to); }

}  // namespace

const FlowKernels flow_kernels = {product, modulated, widen, narrow};

}  // namespace uniflow_cpu::UNIFLOW_LEVEL
