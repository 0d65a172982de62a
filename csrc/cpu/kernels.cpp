// The CPU part's loops, compiled once for each level of instructions, which UNIFLOW_LEVEL names. But for the level's table
// nothing has a name outside, since the linker would take an inline function of one level for all of them.
#include "kernels.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace uniflow_cpu::UNIFLOW_LEVEL {
namespace {

#include "../cosine.h"
#include "../host_device.h"
#include "../noise.h"
#include "../sums.h"
#include "../velocity.h"
// what stands on these
#include "elements.h"
#include "patches.h"

using uniflow::kLanes;

// What sums begin with: x + -0 is x. Zeros would be a memset, for which compilers take an instruction that is slow to begin.
constexpr float kNothing = -0.0f;

// --- noise ---

constexpr int kBlock = 32;  // counters at a time

inline void normals_of_block(uint64_t first, uniflow::Seed seed, float* __restrict out) {
  uint32_t x[kBlock], y[kBlock], z[kBlock], w[kBlock];
  const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t c0 = low + i, c1 = high + (c0 < low);
    const uniflow::Words words = uniflow::philox(static_cast<uint64_t>(c1) << 32 | c0, seed);
    x[i] = words.x, y[i] = words.y, z[i] = words.z, w[i] = words.w;
  }
  for (int i = 0; i < kBlock; ++i) {
    float a, b, c, d;
    uniflow::direct(uniflow::radius(x[i]), y[i], a, b);
    uniflow::direct(uniflow::radius(z[i]), w[i], c, d);
    out[4 * i] = a, out[4 * i + 1] = b, out[4 * i + 2] = c, out[4 * i + 3] = d;
  }
}

// `count` normals from a counter on.
inline void normals_from(uint64_t first, int64_t count, uniflow::Seed seed, float* out) {
  for (; count >= 4 * kBlock; first += kBlock, count -= 4 * kBlock, out += 4 * kBlock) normals_of_block(first, seed, out);
  if (count > 0) {
    float block[4 * kBlock];
    normals_of_block(first, seed, block);
    memcpy(out, block, count * sizeof(float));
  }
}

void noise(const Noise& job, int64_t begin, int64_t end) {
  const int64_t quads = (job.columns + 3) / 4, in_group = job.rows * quads;
  while (begin < end) {
    const int64_t group = begin / in_group, stop = end < (group + 1) * in_group ? end : (group + 1) * in_group;
    const uniflow::Seed seed = uniflow::seed_of(job.seeds[group], job.offset);
    const uint64_t first = static_cast<uint64_t>(job.first_row) * quads + (begin - group * in_group);
    if (job.columns % 4 == 0) {
      normals_from(first, 4 * (stop - begin), seed, job.out + 4 * begin);
    } else {
      for (int64_t start = begin; start < stop; start += kBlock) {
        float block[4 * kBlock];
        normals_of_block(first + (start - begin), seed, block);
        const int64_t here = start + kBlock < stop ? start + kBlock : stop;
        int64_t row = start / quads, quad = start - row * quads;
        for (int64_t i = start; i < here; ++i) {
          const int64_t column = 4 * quad, left = job.columns - column;
          float* to = job.out + row * job.columns + column;
          for (int64_t k = 0; k < (left < 4 ? left : 4); ++k) to[k] = block[4 * (i - start) + k];
          if (++quad == quads) quad = 0, ++row;
        }
      }
    }
    begin = stop;
  }
}

// --- x1 and x0 ---

struct Scratch {  // five rows
  float* rows[5];

  Scratch(float* memory, int64_t length) {
    for (int i = 0; i < 5; ++i) rows[i] = memory + i * scratch_row(length);
  }
};

// The patch of a token in float32, in scratch 0 or 1.
inline const float* pixels_of(const Source& source, const Place& place, int64_t token, const Scratch& scratch) {
  const Pictures& pictures = source.pictures;
  cut_patch(pictures, bytes_of(source.type), place, token, scratch.rows[0]);
  const float* x1 = floats(scratch.rows[0], source.type, pictures.length(), scratch.rows[1]);
  if (source.scale_and_shift == nullptr) return x1;
  const int64_t area = pictures.patch * pictures.patch;
  float* to = scratch.rows[1];
  for (int64_t channel = 0; channel < pictures.channels; ++channel) {
    const float scale = source.scale_and_shift[2 * channel], shift = source.scale_and_shift[2 * channel + 1];
    for (int64_t i = channel * area; i < (channel + 1) * area; ++i) to[i] = uniflow::multiply_add(x1[i], scale, shift);
  }
  return to;
}

// The noise of row `row` of [k*B*N], which is a token of an image; in place, or in scratch 2.
inline const float* noise_of(const Source& source, int64_t row, int64_t tokens, const Scratch& scratch) {
  const int64_t length = source.pictures.length();
  if (source.noise.data != nullptr) {
    const int64_t image = row / tokens, token = row - image * tokens;
    const int64_t elements = image * source.noise.image + token * source.noise.token;
    return floats(at(source.noise.data, elements * bytes_of(source.noise.type)), source.noise.type, length, scratch.rows[2]);
  }
  const int64_t quads = (length + 3) / 4;
  const uint64_t first = (static_cast<uint64_t>(source.first_row) + row) * quads;
  normals_from(first, length, uniflow::seed_of(source.seed, source.offset), scratch.rows[2]);
  return scratch.rows[2];
}

// The same right from the picture, for pixels and x_t in float32 and the patch's width P.
template <int P>
inline void interpolate_patch(const Source& source, const Place& place, int64_t across, const float* __restrict x0, float t,
                              float* __restrict x_t) {
  const Pictures& pictures = source.pictures;
  const float* corner = static_cast<const float*>(pictures.data) + place.image * pictures.image + place.down * P * pictures.row + across * P;
  for (int64_t channel = 0; channel < pictures.channels; ++channel) {
    const float scale = source.scale_and_shift == nullptr ? 1.0f : source.scale_and_shift[2 * channel];
    const float shift = source.scale_and_shift == nullptr ? -0.0f : source.scale_and_shift[2 * channel + 1];  // x + -0 is x
    for (int y = 0; y < P; ++y, x0 += P, x_t += P) {
      const float* __restrict line = corner + channel * pictures.channel + y * pictures.row;
      for (int block = 0; block < P; block += 8) {  // in whole vectors: the last two may overlap
        const int first = block < P - 8 ? block : P - 8;
        for (int x = first; x < first + 8; ++x)
          x_t[x] = uniflow::interpolated(uniflow::multiply_add(line[x], scale, shift), x0[x], t);
      }
    }
  }
}

void interpolate(const Interpolate& job, int64_t begin, int64_t end, float* memory) {
  const Source& source = job.source;
  const int64_t across = source.pictures.across, length = source.pictures.length(), columns = source.columns;
  const int64_t tokens = source.pictures.down * across, size = bytes_of(job.type);
  const bool right_away = source.type == kFloat32 && job.type == kFloat32 && source.pictures.column == 1;
  const Scratch scratch(memory, columns);
  for (int64_t line = begin; line < end; ++line) {
    const Place place = place_of(source.pictures, line % source.pictures.lines());
    touch(source.pictures, bytes_of(source.type), place);
    for (int64_t g = 0; g < across; ++g) {
      const int64_t row = line * across + g;
      const float t = job.t[job.per_token ? row : row / tokens];
      const float* __restrict x0 = noise_of(source, row, tokens, scratch);
      char* out = at(job.x_t, row * columns * size);
      float* __restrict x_t = job.type == kFloat32 ? reinterpret_cast<float*>(out) : scratch.rows[3];
      switch (right_away ? source.pictures.patch : 0) {
        case 8: interpolate_patch<8>(source, place, g, x0, t, x_t); break;
        case 14: interpolate_patch<14>(source, place, g, x0, t, x_t); break;
        case 16: interpolate_patch<16>(source, place, g, x0, t, x_t); break;
        default:
          const float* __restrict x1 = pixels_of(source, place, g, scratch);
          for (int64_t i = 0; i < length; ++i) x_t[i] = uniflow::interpolated(x1[i], x0[i], t);
      }
      if (job.type != kFloat32) store(x_t, job.type, length, out);
      memset(out + length * size, 0, (columns - length) * size);
    }
  }
}

// The error of a row, times `factor` into `gradient`; gives the sum of its squares.
inline float squared_error(const float* __restrict velocity, const float* __restrict x1, const float* __restrict x0, int64_t length,
                           float coefficient, float* __restrict gradient) {
  float sums[kLanes];
  for (float& sum : sums) sum = kNothing;
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const float error = uniflow::velocity_error(velocity[i + lane], x1[i + lane], x0[i + lane], coefficient);
      gradient[i + lane] = uniflow::velocity_gradient(error, coefficient);
      sums[lane] = uniflow::multiply_add(error, error, sums[lane]);
    }
  for (int lane = 0; i + lane < length; ++lane) {
    const float error = uniflow::velocity_error(velocity[i + lane], x1[i + lane], x0[i + lane], coefficient);
    gradient[i + lane] = uniflow::velocity_gradient(error, coefficient);
    sums[lane] = uniflow::multiply_add(error, error, sums[lane]);
  }
  return uniflow::butterfly(sums);
}

void loss(const Loss& job, int64_t begin, int64_t end, float* memory) {
  const Source& source = job.source;
  const int64_t across = source.pictures.across, length = source.pictures.length(), columns = source.columns;
  const int64_t tokens = source.pictures.down * across, size = bytes_of(job.velocity.type);
  const Scratch scratch(memory, columns);
  for (int64_t line = begin; line < end; ++line) {
    const Place place = place_of(source.pictures, line % source.pictures.lines());
    touch(source.pictures, bytes_of(source.type), place);
    for (int64_t g = 0; g < across; ++g) {
      const int64_t row = line * across + g;
      const float coefficient = job.each == nullptr ? job.all : job.each[row];
      char* out = job.gradient == nullptr ? nullptr : at(job.gradient, row * columns * size);
      if (coefficient == 0.0f) {  // a token that does not count may hold anything
        job.losses[row] = 0.0f;
        if (out != nullptr) memset(out, 0, columns * size);
        continue;
      }
      const int64_t image = row / tokens, token = row - image * tokens;
      const int64_t elements = image * job.velocity.image + token * job.velocity.token;
      const float* velocity = floats(at(job.velocity.data, elements * size), job.velocity.type, length, scratch.rows[3]);
      const float* x1 = pixels_of(source, place, g, scratch);
      const float* x0 = noise_of(source, row, tokens, scratch);
      const bool in_place = out != nullptr && job.velocity.type == kFloat32;
      float* gradient = in_place ? reinterpret_cast<float*>(out) : scratch.rows[4];
      job.losses[row] = coefficient * squared_error(velocity, x1, x0, length, coefficient, gradient);
      if (out == nullptr) continue;
      if (!in_place) store(gradient, job.velocity.type, length, out);
      memset(out + length * size, 0, (columns - length) * size);
    }
  }
}

// --- patches ---

void move(const Move& job, int64_t begin, int64_t end, float* memory) {
  const Pictures& pictures = job.pictures;
  const int64_t length = pictures.length();
  for (int64_t line = begin; line < end; ++line) {
    const Place place = place_of(pictures, line);
    char* first = at(job.rows, (place.image * job.image + place.down * pictures.across * job.token) * job.size);
    if (job.cut) {  // rows that are written have no gaps
      touch(pictures, job.size, place);
      for (int64_t g = 0; g < pictures.across; ++g) cut_patch(pictures, job.size, place, g, first + g * job.token * job.size);
    } else {
      for (int64_t g = 0; g < pictures.across; ++g) {
        void* dense = without_gaps(first + g * job.token * job.size, job.size, job.column, length, memory);
        paste_patches(pictures, job.size, place, g, 1, dense, 0);
      }
    }
  }
}

// A row in float32: where it is, or in one of two rows of scratch.
inline const float* row_of(const Rows& rows, int64_t column, int64_t image, int64_t token, int64_t length, float* dense,
                           float* scratch) {
  const int64_t size = bytes_of(rows.type);
  char* row = at(rows.data, (image * rows.image + token * rows.token) * size);
  return floats(without_gaps(row, size, column, length, dense), rows.type, length, scratch);
}

void finish(const Finish& job, int64_t begin, int64_t end, float* memory) {
  const Pictures& pictures = job.pictures;
  const int64_t length = pictures.length(), area = pictures.patch * pictures.patch;
  const Scratch scratch(memory, length);
  for (int64_t line = begin; line < end; ++line) {
    const Place place = place_of(pictures, line);
    for (int64_t g = 0; g < pictures.across; ++g) {
      const int64_t token = place.down * pictures.across + g;
      const float* __restrict rows = row_of(job.rows, job.rows_column, place.image, token, length, scratch.rows[0], scratch.rows[1]);
      float* __restrict values = scratch.rows[2];
      if (job.velocity.data == nullptr) {
        memcpy(values, rows, length * sizeof(float));
      } else {
        const float* __restrict velocity =
            row_of(job.velocity, job.velocity_column, place.image, token, length, scratch.rows[3], scratch.rows[4]);
        for (int64_t i = 0; i < length; ++i) values[i] = uniflow::multiply_add(velocity[i], job.dt, rows[i]);
      }
      if (job.mean_and_std != nullptr)
        for (int64_t channel = 0; channel < pictures.channels; ++channel) {
          const float mean = job.mean_and_std[2 * channel], std = job.mean_and_std[2 * channel + 1];
          for (int64_t i = channel * area; i < (channel + 1) * area; ++i) values[i] = uniflow::multiply_add(values[i], std, mean);
        }
      if (job.clamp)  // a NaN stays one
        for (int64_t i = 0; i < length; ++i) {
          const float value = values[i];
          values[i] = value < 0.0f ? 0.0f : value > 1.0f ? 1.0f : value;
        }
      if (job.type == kFloat32) {
        paste_patches(pictures, 4, place, g, 1, values, 0);
      } else {
        store(values, job.type, length, scratch.rows[3]);
        paste_patches(pictures, bytes_of(job.type), place, g, 1, scratch.rows[3], 0);
      }
    }
  }
}

// --- distillation ---

// Several tokens are taken at once: what is added up over lanes, and the roots and quotients, are vectors of all of them.
constexpr int kLanesOfTokens = kTokens * kLanes;
constexpr int64_t kNear = 1 << 12;  // elements of each side, 32 KB of both

// The lanes of a token's product, student and teacher, kLanesOfTokens apart. Not inlined: they then stay in registers.
[[gnu::noinline]] void lanes_of(const float* __restrict student, const float* __restrict teacher, int64_t width, float* __restrict lanes) {
  float product[kLanes], students[kLanes], teachers[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) product[lane] = students[lane] = teachers[lane] = kNothing;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const float s = student[i + lane], t = teacher[i + lane];
      product[lane] = uniflow::multiply_add(s, t, product[lane]);
      students[lane] = uniflow::multiply_add(s, s, students[lane]);
      teachers[lane] = uniflow::multiply_add(t, t, teachers[lane]);
    }
  for (int lane = 0; i + lane < width; ++lane) {
    const float s = student[i + lane], t = teacher[i + lane];
    product[lane] = uniflow::multiply_add(s, t, product[lane]);
    students[lane] = uniflow::multiply_add(s, s, students[lane]);
    teachers[lane] = uniflow::multiply_add(t, t, teachers[lane]);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    lanes[lane] = product[lane];
    lanes[kLanesOfTokens + lane] = students[lane];
    lanes[2 * kLanesOfTokens + lane] = teachers[lane];
  }
}

// `uniflow::butterfly` of COUNT sums at once, whose lanes lie one sum's behind another's: the narrow steps are vectors of many sums.
template <int COUNT, int STEP = kLanes / 2>
inline void butterflies(const float* __restrict lanes, float* __restrict out) {
  float sums[COUNT * STEP];
  for (int sum = 0; sum < COUNT; ++sum)
    for (int lane = 0; lane < STEP; ++lane) sums[sum * STEP + lane] = lanes[2 * sum * STEP + lane] + lanes[(2 * sum + 1) * STEP + lane];
  if constexpr (STEP == 1)
    for (int sum = 0; sum < COUNT; ++sum) out[sum] = sums[sum];
  else
    butterflies<COUNT, STEP / 2>(sums, out);
}

struct Terms {  // `uniflow::CosineTerms` of kTokens tokens
  float distance[kTokens], along[kTokens], across[kTokens], student_least[kTokens];
};

[[gnu::noinline]] void terms_of(const float* __restrict lanes, Terms& __restrict terms) {
  float sums[3 * kTokens];
  butterflies<3 * kTokens>(lanes, sums);
  for (int k = 0; k < kTokens; ++k) {
    const uniflow::CosineTerms of = uniflow::cosine_terms({sums[k], sums[kTokens + k], sums[2 * kTokens + k]});
    terms.distance[k] = of.distance, terms.along[k] = of.along, terms.across[k] = of.across;
    terms.student_least[k] = of.student_least;
  }
}

void distances(const Distances& job, int64_t begin, int64_t end, float* memory) {
  const int64_t in_layer = job.batch * job.length, row = scratch_row(job.width);
  const int64_t size = bytes_of(job.type), teacher_size = bytes_of(job.teacher_type);
  const int64_t near = job.width == 0 ? kTokens : kNear / job.width;  // both sides are read twice, then from the nearest cache
  const int64_t at_once = near < 1 ? 1 : near < kTokens ? near : kTokens;
  const float largest = job.type == kFloat16 ? 65504.0f : job.type == kBFloat16 ? 3.3895313892515355e38f : 3.4028234663852886e38f;
  alignas(64) float lanes[3 * kLanesOfTokens] = {};  // of tokens that are not there zeros, or those of earlier ones
  Terms terms;
  for (int64_t unit = begin, count = 1; unit < end; unit += count) {
    const int64_t number = unit / in_layer, place = unit - number * in_layer;
    const int64_t image = place / job.length, token = place - image * job.length;
    const Layer& layer = job.layers[number];
    char* out = layer.gradient == nullptr ? nullptr : at(layer.gradient, place * job.width * size);
    count = 1;
    if (token < job.skip) {
      if (out != nullptr) memset(out, 0, job.width * size);
      continue;
    }
    while (count < at_once && unit + count < end && token + count < job.length) ++count;
    const float *students[kTokens], *teachers[kTokens];
    for (int64_t k = 0; k < count; ++k) {
      const int64_t of_student = image * layer.student_batch + (token + k) * layer.student_token;
      const int64_t of_teacher = image * layer.teacher_batch + (token + k) * layer.teacher_token;
      students[k] = floats(at(layer.student, of_student * size), job.type, job.width, memory + 2 * k * row);
      teachers[k] = floats(at(layer.teacher, of_teacher * teacher_size), job.teacher_type, job.width, memory + (2 * k + 1) * row);
      lanes_of(students[k], teachers[k], job.width, lanes + k * kLanes);
    }
    terms_of(lanes, terms);
    float* found = job.distances + (number * job.batch + image) * (job.length - job.skip) + token - job.skip;
    for (int64_t k = 0; k < count; ++k) found[k] = terms.distance[k];
    if (out == nullptr) continue;
    for (int64_t k = 0; k < count; ++k) {
      float power = 1.0f;
      if (layer.powers != nullptr) layer.powers[place + k] = power = uniflow::gradient_power(terms.student_least[k]);
      char* here = out + k * job.width * size;
      float* __restrict gradient = job.type == kFloat32 ? reinterpret_cast<float*>(here) : memory + 2 * kTokens * row;
      const float *__restrict student = students[k], *__restrict teacher = teachers[k];
      const uniflow::CosineTerms of{terms.distance[k], terms.along[k], terms.across[k], terms.student_least[k]};
      for (int64_t i = 0; i < job.width; ++i) gradient[i] = power * uniflow::cosine_gradient(of, student[i], teacher[i], largest);
      if (job.type != kFloat32) store(gradient, job.type, job.width, here);
    }
  }
}

// --- gradients times what comes in ---

void scale(const Scale& job, int64_t begin, int64_t end, float* memory) {
  const Scaled* tensor = job.tensors;
  for (int64_t unit = begin; unit < end; ++unit) {
    while (unit >= tensor->first + tensor->units()) ++tensor;
    const int64_t size = bytes_of(tensor->type), count = tensor->rows * tensor->width;
    const int64_t first = (unit - tensor->first) * kScaledAtOnce, left = count - first;
    const int64_t stop = first + (left < kScaledAtOnce ? left : kScaledAtOnce);
    for (int64_t here = first, next; here < stop; here = next) {
      const int64_t row = here / tensor->width, row_stop = (row + 1) * tensor->width;
      next = row_stop < stop ? row_stop : stop;
      const float factor = tensor->factors[row];
      if (factor == 1.0f) continue;
      void* values = at(tensor->values, here * size);
      float* __restrict products = tensor->type == kFloat32 ? static_cast<float*>(values) : memory;
      floats(values, tensor->type, next - here, memory);  // in place, or into `memory`
      for (int64_t i = 0; i < next - here; ++i) products[i] *= factor;
      if (tensor->type != kFloat32) store(products, tensor->type, next - here, values);
    }
  }
}

}  // namespace

const Kernels kernels = {noise, interpolate, loss, move, finish, distances, scale};

}  // namespace uniflow_cpu::UNIFLOW_LEVEL
