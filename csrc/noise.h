// Philox 4x32-10 (Salmon et al. 2011) and Box-Muller, as uniflow_kernels/ops/noise.py defines them.
#pragma once

#include "host_device.h"

namespace uniflow {

struct Seed {
  uint32_t key0, key1;        // the seed's low and high word
  uint32_t offset0, offset1;  // the offset's
};

UNIFLOW_HD Seed seed_of(uint64_t seed, uint64_t offset) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(offset),
          static_cast<uint32_t>(offset >> 32)};
}

// The counter of columns 4*quad .. 4*quad + 3 of a row of 4*quads columns.
UNIFLOW_HD uint64_t counter_of(int64_t row, int32_t quads, int32_t quad) { return static_cast<uint64_t>(row) * quads + quad; }

struct Words {
  uint32_t x, y, z, w;
};

UNIFLOW_HD Words philox(uint64_t number, Seed seed) {
  uint32_t c0 = static_cast<uint32_t>(number), c1 = static_cast<uint32_t>(number >> 32);
  uint32_t c2 = seed.offset0, c3 = seed.offset1;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t key0 = seed.key0 + round * 0x9E3779B9u, key1 = seed.key1 + round * 0xBB67AE85u;
    const uint32_t high0 = high_word(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = high_word(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
  }
  return {c0, c1, c2, c3};
}

// sqrt(-2 ln u) with u = (x + 1/2) / 2^32. u = m * 2^e with m in [sqrt(1/2), sqrt(2)), and ln m by a polynomial fitted to
// be exact in relative terms, since the hardware's logarithm is not near u = 1.
UNIFLOW_HD float radius(uint32_t x) {
  const float u = multiply_add(static_cast<float>(x), 0x1p-32f, 0x1p-33f);
  const uint32_t shifted = bits_of_float(u) - 0x3F3504F3u;
  const float exponent = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = float_of_bits((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = 0.07332145422697067f;
  p = multiply_add(p, f, -0.11659753322601318f);
  p = multiply_add(p, f, 0.11634723097085953f);
  p = multiply_add(p, f, -0.12396728992462158f);
  p = multiply_add(p, f, 0.1425115317106247f);
  p = multiply_add(p, f, -0.16669149696826935f);
  p = multiply_add(p, f, 0.2000068873167038f);
  p = multiply_add(p, f, -0.24999980628490448f);
  p = multiply_add(p, f, 0.3333333134651184f);
  const float square = f * f;
  const float log_m = multiply_add(square, multiply_add(p, f, -0.5f), f);
  const float log_u = multiply_add(exponent, 0.6931471805599453f, log_m);
#ifdef __CUDA_ARCH__
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(-2.0f * log_u));  // within 1 ulp, without the slow path
  return root;
#else
  return sqrtf(-2.0f * log_u);
#endif
}

// radius * (cosine, sine) of the direction: the two upper bits are the quadrant, the others the angle in it.
UNIFLOW_HD void direct(float length, uint32_t x, float& first, float& second) {
  const int32_t within = static_cast<int32_t>(x & 0x3FFFFFFFu) - 0x20000000;
  const float angle = static_cast<float>(within) * 1.4629180792671596e-9f;  // pi / 2^31
  const float square = angle * angle;
  float s = multiply_add(square, 2.725000058489968e-06f, -0.00019840087043121457f);
  s = multiply_add(s, square, 0.008333331905305386f);
  s = multiply_add(s, square, -0.1666666716337204f);
  const float sine = multiply_add(s * square, angle, angle) * length;
  float c = multiply_add(square, -2.7301013005853747e-07f, 2.4800601750030182e-05f);
  c = multiply_add(c, square, -0.00138888880610466f);
  c = multiply_add(c, square, 0.0416666679084301f);
  const float cosine = multiply_add(square, multiply_add(c, square, -0.5f), 1.0f) * length;
  const bool odd = x & 0x40000000u;
  const uint32_t sign = x & 0x80000000u;
  first = float_of_bits(bits_of_float(odd ? -sine : cosine) ^ sign);
  second = float_of_bits(bits_of_float(odd ? cosine : sine) ^ sign);
}

// Four standard normals of one counter.
UNIFLOW_HD void normals(uint64_t number, Seed seed, float out[4]) {
  const Words words = philox(number, seed);
  direct(radius(words.x), words.y, out[0], out[1]);
  direct(radius(words.z), words.w, out[2], out[3]);
}

}  // namespace uniflow
