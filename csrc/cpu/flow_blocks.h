// The whole stack of the flow head's blocks for few rows: what stands in flow.h, one after the other on torch's threads.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "flow.h"
#include "threads.h"

namespace uniflow_cpu {

struct Stack {
  int64_t rows, width, hidden;
  int32_t type, norm_type;  // of all products with their inputs and outputs, and of the norms
  float eps;
  bool rms, swiglu, scale_first;
  std::vector<Affine> norms, ups, downs;  // of the blocks
  std::vector<Affine> layers;             // of the groups, each [3W, W], and of the last norm, [2W, W], if it has one
  std::vector<const void*> modulations;   // what they would make, [C, 3W] and [C, 2W]; else what follows makes it
  std::vector<int64_t> modulation_rows;   // strides
  const void* a;                          // [C, W]
  int64_t groups, conditions, repeat;     // row r has the condition r / repeat % C
  const void* x;                          // [R, W]
  void* out;
};

class FlowBlocks {
 public:
  FlowBlocks(const FlowKernels& kernels, const Threads& all, int threads, const Stack& stack)
      : kernels_(kernels), all_(all), threads_(threads), stack_(stack), width_(scratch_row(stack.width)),
        hidden_(scratch_row(stack.hidden)), parts_(3 * stack.groups + (has_last() ? 2 : 0)) {}

  void run() {
    const int64_t rows = stack_.rows, depth = static_cast<int64_t>(stack_.norms.size()), per_group = depth / stack_.groups;
    const int64_t widest = std::max(width_, hidden_);
    std::vector<float> memory(rows * (2 * width_ + 2 * widest) + stack_.conditions * (width_ + parts_ * stack_.width));
    float* next = memory.data();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    x_ = take(rows * width_), h_ = take(rows * width_), u_ = take(rows * widest), other_ = take(rows * widest);
    a_ = take(stack_.conditions * width_), made_ = take(stack_.conditions * parts_ * stack_.width);
    const int64_t size = stack_.type == kFloat32 ? 4 : 2;
    for (int64_t r = 0; r < rows; ++r) kernels_.widen(at(stack_.x, r * stack_.width * size), stack_.type, stack_.width, x_ + r * width_);
    make_modulations(size);
    for (int64_t i = 0; i < depth; ++i) {
      const int64_t place = 3 * (i / per_group), shift = stack_.scale_first ? 1 : 0;
      modulated(stack_.norms[i], place + shift, place + 1 - shift, h_);
      multiply({{h_, rows, stack_.width, stack_.hidden, stack_.ups[i], stack_.type, stack_.swiglu ? Then::kSwiglu : Then::kSilu, u_,
                 hidden_, stack_.swiglu ? other_ : nullptr, nullptr}});
      const std::vector<const float*> gates = of_rows(place + 2);
      multiply({{u_, rows, stack_.hidden, stack_.width, stack_.downs[i], stack_.type, Then::kGatedResidual, x_, width_, other_,
                 gates.data()}});
    }
    const int64_t place = has_last() ? 3 * stack_.groups : -1, shift = stack_.scale_first ? 1 : 0;
    modulated({nullptr, nullptr}, place + shift, place + 1 - shift, h_, has_last());
    for (int64_t r = 0; r < rows; ++r)
      kernels_.narrow(h_ + r * width_, stack_.type, stack_.width, at(stack_.out, r * stack_.width * size));
  }

 private:
  static const void* at(const void* data, int64_t bytes) { return static_cast<const char*>(data) + bytes; }
  static void* at(void* data, int64_t bytes) { return static_cast<char*>(data) + bytes; }

  bool has_last() const {
    return static_cast<int64_t>(std::max(stack_.layers.size(), stack_.modulations.size())) > stack_.groups;
  }

  // Shift, scale and gate of each group, and the last shift and scale, of each condition side by side.
  void make_modulations(int64_t size) {
    const int64_t row = parts_ * stack_.width;
    for (size_t i = 0; i < stack_.modulations.size(); ++i) {
      const int64_t columns = (static_cast<int64_t>(i) < stack_.groups ? 3 : 2) * stack_.width;
      for (int64_t c = 0; c < stack_.conditions; ++c)
        kernels_.widen(at(stack_.modulations[i], c * stack_.modulation_rows[i] * size), stack_.type, columns,
                       made_ + c * row + 3 * i * stack_.width);
    }
    if (!stack_.modulations.empty()) return;
    for (int64_t c = 0; c < stack_.conditions; ++c)
      kernels_.widen(at(stack_.a, c * stack_.width * size), stack_.type, stack_.width, a_ + c * width_);
    std::vector<Product> products;
    for (size_t i = 0; i < stack_.layers.size(); ++i) {
      const int64_t columns = (static_cast<int64_t>(i) < stack_.groups ? 3 : 2) * stack_.width;
      products.push_back({a_, stack_.conditions, stack_.width, columns, stack_.layers[i], stack_.type, Then::kNothing,
                          made_ + 3 * i * stack_.width, row, nullptr, nullptr});
    }
    multiply(products);
  }

  // A part of the modulations, of each row.
  std::vector<const float*> of_rows(int64_t part) const {
    std::vector<const float*> found;
    for (int64_t r = 0; r < stack_.rows; ++r)
      found.push_back(made_ + (r / stack_.repeat % stack_.conditions * parts_ + part) * stack_.width);
    return found;
  }

  void modulated(const Affine& norm, int64_t shift, int64_t scale, float* to, bool is_modulated = true) {
    std::vector<const float*> shifts, scales;
    if (is_modulated) shifts = of_rows(shift), scales = of_rows(scale);
    kernels_.modulated({x_, stack_.width, width_, norm, stack_.norm_type, stack_.eps, stack_.rms,
                        is_modulated ? shifts.data() : nullptr, is_modulated ? scales.data() : nullptr, to},
                       0, stack_.rows);
  }

  // Products that do not need each other.
  void multiply(const std::vector<Product>& products) {
    int64_t runs = 0;
    for (const Product& product : products) runs += (product.out + kRun - 1) / kRun;
    const int64_t least = std::max<int64_t>(1, kLeastWeights / (kRun * products[0].in));
    all_.run(all_.share(threads_, runs, least), runs, [&](int64_t begin, int64_t end, int) {
      int64_t first = 0;
      for (const Product& product : products) {
        const int64_t own = (product.out + kRun - 1) / kRun, from = std::max(begin - first, int64_t{0}), to = std::min(end - first, own);
        if (from < to) kernels_.product(product, from * kRun, std::min(to * kRun, product.out));
        first += own;
      }
    });
  }

  static constexpr int64_t kRun = 16;               // columns: a cache line of what is written
  static constexpr int64_t kLeastWeights = 1 << 15;  // that are worth a thread

  const FlowKernels& kernels_;
  const Threads& all_;
  const int threads_;
  const Stack& stack_;
  const int64_t width_, hidden_, parts_;  // of rows in scratch; parts of a condition's modulations
  float *x_, *h_, *u_, *other_, *a_, *made_;
};

}  // namespace uniflow_cpu
