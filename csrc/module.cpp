// The Python module uniflow_kernels._cuda: addresses and numbers in, launches out. It knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "launch.h"

namespace py = pybind11;

namespace {

using Strides = std::array<int64_t, 4>;

void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}

uniflow::Rows rows_of(uintptr_t data, int32_t type, std::array<int64_t, 2> strides) {
  return {reinterpret_cast<const void*>(data), type, strides[0], strides[1]};
}

// Neighbouring patches of a tile: even, so that pairs of rows stay together; as many as leave room for several blocks on a
// multiprocessor, or fewer where a patch is large. 0 where not even one fits.
int32_t tile_width(int64_t length, int64_t columns, int64_t across) {
  constexpr int64_t kPlenty = 5000;
  const int64_t each = (length + 3) / 4 * 4 + (columns + 3) / 4;
  int64_t width = kPlenty / each;
  width = width > 1 ? width / 2 * 2 : uniflow::kMostPixels / each > 0 ? 1 : 0;
  return static_cast<int32_t>(width < across ? width : across);
}

// The tiles of images, where each pixel of a row and each of `more` values takes four bytes.
uniflow::Tiling tiling_of(const std::array<int64_t, 4>& shape, int32_t patch, int64_t more, int64_t pixel_size = 4) {
  const int64_t across = shape[3] / patch, pixels = (shape[1] * patch * patch + 3) / 4 * 4;
  const int32_t width = tile_width((pixels * pixel_size + 3) / 4, more, across);
  if (width == 0) throw std::invalid_argument("images: a patch does not fit into shared memory");
  return uniflow::tiling_of(shape[0], static_cast<int32_t>(shape[1]), static_cast<int32_t>(shape[2] / patch),
                            static_cast<int32_t>(across), patch, width);
}

uniflow::Source source_of(uintptr_t images, int32_t image_type, std::array<int64_t, 4> shape, const Strides& strides,
                          uintptr_t scale_and_shift, int32_t patch, int32_t repeats, const uniflow::Rows& noise,
                          uint64_t seed, uint64_t offset, uintptr_t seed_at, int64_t first_row, int32_t columns) {
  return {tiling_of(shape, patch, columns),
          reinterpret_cast<const void*>(images),
          image_type,
          {strides[0], strides[1], strides[2], strides[3]},
          reinterpret_cast<const float*>(scale_and_shift),
          repeats,
          noise,
          seed,
          offset,
          reinterpret_cast<const uint64_t*>(seed_at),
          first_row,
          columns};
}

void move_patches(uintptr_t images, const std::array<int64_t, 4>& shape, const Strides& strides, uintptr_t rows,
                  const std::array<int64_t, 3>& row_strides, int32_t patch, int32_t size, bool cut, uintptr_t stream) {
  const uniflow::Patches move{tiling_of(shape, patch, 0, size),
                              reinterpret_cast<void*>(images),
                              {strides[0], strides[1], strides[2], strides[3]},
                              reinterpret_cast<void*>(rows),
                              {row_strides[0], row_strides[1], row_strides[2]}};
  check(uniflow::move_patches(move, size, cut, stream));
}

void cosine_distances(const std::vector<std::array<int64_t, 8>>& layers, int64_t batch, int64_t length, int32_t width,
                      int64_t skip, int32_t type, uintptr_t distances, uintptr_t stream) {
  const int64_t tokens = batch * (length - skip);
  for (size_t start = 0; start < layers.size(); start += uniflow::kMostLayers) {
    uniflow::Layer some[uniflow::kMostLayers];
    const size_t count = std::min<size_t>(uniflow::kMostLayers, layers.size() - start);
    for (size_t i = 0; i < count; ++i) {
      const auto& [student, teacher, gradient, powers, student_batch, student_token, teacher_batch, teacher_token] = layers[start + i];
      some[i] = {reinterpret_cast<const void*>(student), reinterpret_cast<const void*>(teacher),
                 reinterpret_cast<void*>(gradient),      reinterpret_cast<float*>(powers),
                 student_batch, student_token, teacher_batch, teacher_token};
    }
    check(uniflow::cosine_distances(some, static_cast<int32_t>(count), batch, length, width, skip, type,
                                    reinterpret_cast<float*>(distances) + start * tokens, stream));
  }
}

}  // namespace

#define UNIFLOW_TEXT(name) #name
#define UNIFLOW_TEXT_OF(macro) UNIFLOW_TEXT(macro)

PYBIND11_MODULE(_cuda, module) {
#ifdef UNIFLOW_SOURCES  // uniflow_kernels/stamp.py
  module.attr("SOURCES") = UNIFLOW_TEXT_OF(UNIFLOW_SOURCES);
#endif
  module.attr("MOST_PIXELS") = uniflow::kMostPixels;
  py::class_<uniflow::Rows>(module, "Rows").def(py::init(&rows_of));
  py::class_<uniflow::Source>(module, "Source").def(py::init(&source_of));
  module.def("tile_width", &tile_width);
  module.def("interpolate", [](const uniflow::Source& source, uintptr_t t, bool per_token, uintptr_t x_t, int32_t type, uintptr_t stream) {
    check(uniflow::interpolate(source, reinterpret_cast<const float*>(t), per_token, reinterpret_cast<void*>(x_t), type, stream));
  });
  module.def("velocity_loss", [](const uniflow::Source& source, const uniflow::Rows& velocity, uintptr_t coefficients,
                                 float coefficient, uintptr_t gradient, uintptr_t losses, uintptr_t stream) {
    check(uniflow::velocity_loss(source, velocity, {reinterpret_cast<const float*>(coefficients), coefficient},
                                 reinterpret_cast<void*>(gradient), reinterpret_cast<float*>(losses), stream));
  });
  module.def("move_patches", &move_patches);
  module.def("cosine_distances", &cosine_distances);
  module.def("scale", [](uintptr_t values, int32_t type, int64_t count, uintptr_t factor, uintptr_t stream) {
    check(uniflow::scale(reinterpret_cast<void*>(values), type, count, reinterpret_cast<const float*>(factor), stream));
  });
}
