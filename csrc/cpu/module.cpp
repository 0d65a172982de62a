// The Python module uniflow_kernels._cpu: addresses, shapes and strides in, work shared among torch's threads. It knows
// nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <vector>

#include "flow_blocks.h"
#include "kernels.h"
#include "threads.h"

namespace py = pybind11;
using namespace uniflow_cpu;

namespace {

constexpr int64_t kLeast = 1 << 14;  // elements that are worth a thread

const Threads& threads_of_torch() {
  static const Threads found;
  return found;
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct Freed {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

// Units of `elements` each, on up to so many threads; each has some rows of `length` floats.
template <class Job>
void share(void (*work)(const Job&, int64_t, int64_t, float*), const Job& job, int64_t units, int64_t elements, int64_t length,
           int threads, int rows = 5) {
  const Threads& all = threads_of_torch();
  const int64_t each = rows * scratch_row(length);
  threads = all.share(threads, units, (kLeast + elements - 1) / elements);
  const std::unique_ptr<float[], Freed> scratch(new (std::align_val_t{64}) float[threads * each]);
  all.run(threads, units, [&](int64_t begin, int64_t end, int thread) { work(job, begin, end, scratch.get() + thread * each); });
}

Pictures pictures_of(uintptr_t data, const std::array<int64_t, 4>& shape, const std::array<int64_t, 4>& strides, int64_t patch) {
  return {at<void>(data), strides[0], strides[1], strides[2], strides[3],
          shape[0], shape[1], shape[2] / patch, shape[3] / patch, patch};
}

Source source_of(uintptr_t images, int32_t type, const std::array<int64_t, 4>& shape, const std::array<int64_t, 4>& strides,
                 uintptr_t scale_and_shift, int64_t patch, int64_t repeats, const Rows& noise, uint64_t seed, uint64_t offset,
                 uintptr_t seed_at, int64_t first_row, int64_t columns) {
  return {pictures_of(images, shape, strides, patch), type, at<const float>(scale_and_shift), repeats, noise,
          seed_at == 0 ? seed : *at<const uint64_t>(seed_at), offset, first_row, columns};
}

// The kernels of one level of instructions.
class Level {
 public:
  Level(std::string name, const Kernels& kernels, const FlowKernels& flow) : name(std::move(name)), kernels_(kernels), flow_(flow) {}

  void seeded_noise(uintptr_t seeds, int64_t groups, uint64_t offset, int64_t first_row, int64_t rows, int64_t columns, uintptr_t out,
                    int threads) const {
    const Noise job{at<const uint64_t>(seeds), offset, first_row, rows, columns, at<float>(out)};
    const int64_t counters = groups * rows * ((columns + 3) / 4);
    const Threads& all = threads_of_torch();
    all.run(all.share(threads, counters, kLeast / 8), counters,
            [&](int64_t begin, int64_t end, int) { kernels_.noise(job, begin, end); });
  }

  void interpolate(const Source& source, uintptr_t t, bool per_token, uintptr_t x_t, int32_t type, int threads) const {
    const Interpolate job{source, at<const float>(t), per_token, at<void>(x_t), type};
    share(kernels_.interpolate, job, source.lines(), source.pictures.across * source.columns, source.columns, threads);
  }

  void velocity_loss(const Source& source, const Rows& velocity, uintptr_t each, float all, uintptr_t gradient, uintptr_t losses,
                     int threads) const {
    const Loss job{source, velocity, at<const float>(each), all, at<void>(gradient), at<float>(losses)};
    share(kernels_.loss, job, source.lines(), source.pictures.across * source.columns, source.columns, threads);
  }

  void move_patches(uintptr_t images, const std::array<int64_t, 4>& shape, const std::array<int64_t, 4>& strides, uintptr_t rows,
                    const std::array<int64_t, 3>& row_strides, int64_t patch, int32_t size, bool cut, int threads) const {
    const Move job{pictures_of(images, shape, strides, patch), at<void>(rows), row_strides[0], row_strides[1], row_strides[2], size,
                   cut};
    share(kernels_.move, job, job.pictures.lines(), job.pictures.across * job.pictures.length(), job.pictures.length(), threads);
  }

  void to_images(const Rows& rows, int64_t rows_column, const Rows& velocity, int64_t velocity_column, float dt,
                 uintptr_t mean_and_std, bool clamp, uintptr_t images, int32_t type, const std::array<int64_t, 4>& shape,
                 const std::array<int64_t, 4>& strides, int64_t patch, int threads) const {
    const Finish job{pictures_of(images, shape, strides, patch), type, rows, velocity, rows_column, velocity_column, dt,
                     at<const float>(mean_and_std), clamp};
    share(kernels_.finish, job, job.pictures.lines(), job.pictures.across * job.pictures.length(), job.pictures.length(), threads);
  }

  void cosine_distances(const std::vector<std::array<int64_t, 8>>& of_layers, int64_t batch, int64_t length, int64_t width, int64_t skip,
                        const std::array<int32_t, 2>& types, uintptr_t distances, int threads) const {
    std::vector<Layer> layers;
    for (const auto& [student, teacher, gradient, powers, student_batch, student_token, teacher_batch, teacher_token] : of_layers)
      layers.push_back({at<const void>(student), at<const void>(teacher), at<void>(gradient), at<float>(powers), student_batch,
                        student_token, teacher_batch, teacher_token});
    const Distances job{layers.data(), batch, length, width, skip, types[0], types[1], at<float>(distances)};
    share(kernels_.distances, job, static_cast<int64_t>(layers.size()) * batch * length, 2 * width, width, threads,
          2 * kTokens + 1);
  }

  // Of each tensor the addresses of its values and of its rows' factors, its rows, their width, and its type.
  void scale(const std::vector<std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int32_t>>& of_tensors, int threads) const {
    std::vector<Scaled> tensors;
    int64_t units = 0;
    for (const auto& [values, factors, rows, width, type] : of_tensors) {
      tensors.push_back({at<void>(values), at<const float>(factors), rows, width, type, units});
      units += tensors.back().units();
    }
    const Scale job{tensors.data()};
    share(kernels_.scale, job, units, kScaledAtOnce, kScaledAtOnce, threads);
  }

  // Addresses of weights and biases, 0 for what is not there: of the last norm's modulation, of each block's norm, up and
  // down, and of each group's modulation. `made` has what these would make, addresses and strides of rows, or is empty.
  void flow_blocks(uintptr_t x, uintptr_t a, const std::vector<uintptr_t>& weights, const std::vector<std::array<int64_t, 2>>& made,
                   uintptr_t out, const std::array<int64_t, 7>& sizes, const std::array<int32_t, 2>& types, float eps, bool rms,
                   bool swiglu, bool scale_first, int threads) const {
    const auto [rows, width, hidden, depth, groups, conditions, repeat] = sizes;
    Stack stack{};
    stack.rows = rows, stack.width = width, stack.hidden = hidden, stack.conditions = conditions, stack.repeat = repeat;
    stack.type = types[0], stack.norm_type = types[1];
    stack.eps = eps, stack.rms = rms, stack.swiglu = swiglu, stack.scale_first = scale_first;
    const auto affine = [&](size_t i) { return Affine{at<const void>(weights[2 * i]), at<const void>(weights[2 * i + 1])}; };
    for (int64_t i = 0; i < depth; ++i) {
      stack.norms.push_back(affine(1 + 3 * i));
      stack.ups.push_back(affine(2 + 3 * i));
      stack.downs.push_back(affine(3 + 3 * i));
    }
    for (size_t i = 1 + 3 * depth; i < weights.size() / 2; ++i) stack.layers.push_back(affine(i));
    if (weights[0] != 0) stack.layers.push_back(affine(0));
    stack.groups = groups;
    for (const auto& [address, row] : made) {
      stack.modulations.push_back(at<const void>(static_cast<uintptr_t>(address)));
      stack.modulation_rows.push_back(row);
    }
    stack.x = at<const void>(x), stack.a = at<const void>(a), stack.out = at<void>(out);
    FlowBlocks(flow_, threads_of_torch(), threads, stack).run();
  }

  const std::string name;

 private:
  const Kernels& kernels_;
  const FlowKernels& flow_;
};

// What this processor has, the fastest first.
std::vector<Level> levels() {
  std::vector<Level> found;
#ifdef __x86_64__
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.emplace_back("avx512", avx512::kernels, avx512::flow_kernels);
  if (has_avx2) found.emplace_back("avx2", avx2::kernels, avx2::flow_kernels);
#endif
  found.emplace_back("baseline", baseline::kernels, baseline::flow_kernels);
  return found;
}

}  // namespace

#define UNIFLOW_TEXT(name) #name
#define UNIFLOW_TEXT_OF(macro) UNIFLOW_TEXT(macro)

PYBIND11_MODULE(_cpu, module) {
#ifdef UNIFLOW_SOURCES  // uniflow_kernels/stamp.py
  module.attr("SOURCES") = UNIFLOW_TEXT_OF(UNIFLOW_SOURCES);
#endif
  module.attr("SHARES_THREADS") = threads_of_torch().found();
  py::class_<Rows>(module, "Rows").def(py::init([](uintptr_t data, int32_t type, int64_t image, int64_t token) {
    return Rows{at<void>(data), type, image, token};
  }));
  py::class_<Source>(module, "Source").def(py::init(&source_of));
  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<Level>(module, "Level")
      .def_readonly("name", &Level::name)
      .def("seeded_noise", &Level::seeded_noise, Released())
      .def("interpolate", &Level::interpolate, Released())
      .def("velocity_loss", &Level::velocity_loss, Released())
      .def("move_patches", &Level::move_patches, Released())
      .def("to_images", &Level::to_images, Released())
      .def("cosine_distances", &Level::cosine_distances, Released())
      .def("scale", &Level::scale, Released())
      .def("flow_blocks", &Level::flow_blocks, Released());
  module.def("levels", &levels);
}
