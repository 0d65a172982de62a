// The arithmetic of the kernels stands in functions that a host compiler takes too, so that tests check it without a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define UNIFLOW_HD __host__ __device__ __forceinline__
#else
#define UNIFLOW_HD inline
#endif

namespace uniflow {

UNIFLOW_HD uint32_t high_word(uint32_t a, uint32_t b) { return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32); }

UNIFLOW_HD float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

UNIFLOW_HD uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// a*b + c, rounded once where the target has an instruction for that: the library's function would be many times as slow.
UNIFLOW_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDACC__) || defined(__FMA__) || defined(__aarch64__)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Division of numbers below 2^16 by a constant below 2^16: one multiplication. Exact, since the rounding error of the
// reciprocal, below 2^-32 * divisor, stays below 1 / divisor after multiplication by the number.
struct SmallDivisor {
  uint32_t divisor;
  uint32_t reciprocal;

  SmallDivisor() = default;
  UNIFLOW_HD explicit SmallDivisor(uint32_t by) : divisor(by), reciprocal(by > 1 ? 0xFFFFFFFFu / by + 1 : 0) {}

  UNIFLOW_HD uint32_t quotient(uint32_t number) const { return divisor == 1 ? number : high_word(number, reciprocal); }
};

}  // namespace uniflow
