// The cosine distance of a token and its gradient, as uniflow_kernels/ops/distillation.py defines them.
#pragma once

#include "host_device.h"

namespace uniflow {

struct CosineSums {
  float product = 0.0f, student = 0.0f, teacher = 0.0f;

  UNIFLOW_HD void add(float s, float t) {
    product = multiply_add(s, t, product);
    student = multiply_add(s, s, student);
    teacher = multiply_add(t, t, teacher);
  }
};

// The gradient of the distance is along * s + across * t.
struct CosineTerms {
  float distance, along, across, student_least;
};

UNIFLOW_HD CosineTerms cosine_terms(const CosineSums& sums) {
  constexpr float eps = 1e-8f;
  const float student = sqrtf(sums.student), teacher = sqrtf(sums.teacher);
  const float student_least = student > eps ? student : eps, teacher_least = teacher > eps ? teacher : eps;
  // two divisions: the product of two least norms is not far from the smallest float
  const float cosine = sums.product / student_least / teacher_least;
  CosineTerms terms;
  terms.distance = 1.0f - cosine;
  terms.along = student > eps ? cosine / student_least / student_least : 0.0f;
  terms.across = -1.0f / student_least / teacher_least;
  terms.student_least = student_least;
  return terms;
}

// What float16 stores a gradient times, since it ends at 6e-8: near the student's norm, so that 2^11 is not exceeded.
UNIFLOW_HD float gradient_power(float student_least) { return 1024.0f * float_of_bits(bits_of_float(student_least) & 0x7F800000u); }

// `largest` is the largest finite number of the type that the gradient is stored in
UNIFLOW_HD float cosine_gradient(const CosineTerms& terms, float s, float t, float largest) {
  const float gradient = multiply_add(terms.along, s, terms.across * t);
  return gradient > largest ? largest : gradient < -largest ? -largest : gradient;  // NaN stays NaN
}

}  // namespace uniflow
