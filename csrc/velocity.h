// The flow's formulas, an element at a time, as uniflow_kernels/ops/velocity.py defines them.
#pragma once

#include "host_device.h"

namespace uniflow {

UNIFLOW_HD float interpolated(float x1, float x0, float t) { return multiply_add(x1, t, x0 * (1.0f - t)); }

// velocity - (x1 - x0); a token that does not count may hold anything
UNIFLOW_HD float velocity_error(float velocity, float x1, float x0, float coefficient) {
  return coefficient == 0.0f ? 0.0f : velocity + (x0 - x1);
}

UNIFLOW_HD float velocity_gradient(float error, float coefficient) { return 2.0f * coefficient * error; }

}  // namespace uniflow
