// The kernels' arithmetic, compiled for the host: loops over it that Python calls. The loops of velocity and cosine go
// through memory in the same order as the kernels do.
#include <vector>

#include "cosine.h"
#include "noise.h"
#include "patches.h"
#include "sums.h"
#include "velocity.h"

using namespace uniflow;

extern "C" {

void philox_words(uint64_t number, uint32_t key0, uint32_t key1, uint32_t offset0, uint32_t offset1, uint32_t* out) {
  const Words words = philox(number, {key0, key1, offset0, offset1});
  const uint32_t all[] = {words.x, words.y, words.z, words.w};
  memcpy(out, all, sizeof all);
}

void normals_of(uint64_t first, int64_t count, uint64_t seed, uint64_t offset, float* out) {
  const Seed words = seed_of(seed, offset);
  for (int64_t i = 0; i < count; ++i) normals(first + i, words, out + 4 * i);
}

void normals_of_words(int64_t count, const uint32_t* lengths, const uint32_t* directions, float* out) {
  for (int64_t i = 0; i < count; ++i) direct(radius(lengths[i]), directions[i], out[2 * i], out[2 * i + 1]);
}

int wrong_quotients() {
  int wrong = 0;
  for (uint32_t divisor = 1; divisor < 1u << 16; divisor = divisor < 300 ? divisor + 1 : divisor * 17 / 16 + 1) {
    const SmallDivisor by(divisor);
    for (uint32_t number = 0; number < 1u << 16; ++number) wrong += by.quotient(number) != number / divisor;
  }
  return wrong;
}

// Index arithmetic alone: the tile `number`, the offset of one of its pixels, its place in the tile's rows, the first row,
// and the pixel's offset in rows of their own.
void place(int64_t batch, int channels, int down, int across, int patch, int width, const int64_t* strides,
           const int64_t* row_strides, int64_t number, uint32_t row, uint32_t x, int repeat, int64_t* out) {
  const Tiling tiling = tiling_of(batch, channels, down, across, patch, width);
  const Tile tile = tile_at(tiling, number);
  out[0] = pixel_offset(tiling, tile, {strides[0], strides[1], strides[2], strides[3]}, row, x);
  out[1] = place_in_rows(tiling, row, x);
  out[2] = first_row(tiling, tile, repeat);
  out[3] = tile.count;
  out[4] = tiling.tiles();
  const RowStrides to{row_strides[0], row_strides[1], row_strides[2]};
  out[5] = row_offset(tiling, tile, to, x / patch, row * patch + x % patch);
}

// Images to rows and back, tile by tile through memory like the kernels' shared one.
void move_patches(int64_t batch, int channels, int down, int across, int patch, int width, const int64_t* strides, float* images,
                  const int64_t* row_strides, float* rows, int cut) {
  const Tiling tiling = tiling_of(batch, channels, down, across, patch, width);
  const RowStrides to{row_strides[0], row_strides[1], row_strides[2]};
  std::vector<float> shared(size_t(width) * 4 * tiling.quads);
  for (int64_t number = 0; number < tiling.tiles(); ++number) {
    const Tile tile = tile_at(tiling, number);
    for (int pass = 0; pass < 2; ++pass) {
      if (bool(pass) != bool(cut)) {
        for (uint32_t row = 0; row < uint32_t(channels * patch); ++row)
          for (uint32_t x = 0; x < uint32_t(tile.count * patch); ++x) {
            float& pixel = images[pixel_offset(tiling, tile, {strides[0], strides[1], strides[2], strides[3]}, row, x)];
            float& place = shared[place_in_rows(tiling, row, x)];
            cut ? place = pixel : pixel = place;
          }
      } else {
        for (uint32_t g = 0; g < uint32_t(tile.count); ++g)
          for (uint32_t column = 0; column < uint32_t(tiling.length); ++column) {
            float& there = rows[row_offset(tiling, tile, to, g, column)];
            float& here = shared[g * 4 * tiling.quads + column];
            cut ? there = here : here = there;
          }
      }
    }
  }
}

// x_t and the loss of seeded noise, tile by tile, as the kernels take them.
void flow(int64_t batch, int channels, int down, int across, int patch, int width, const int64_t* strides, const float* images,
          int repeats, uint64_t seed, uint64_t offset, int64_t first, const float* t, const float* velocity, const float* coefficients,
          float* x_t, float* gradient, float* losses) {
  const Tiling tiling = tiling_of(batch, channels, down, across, patch, width);
  const Seed words = seed_of(seed, offset);
  std::vector<float> rows(size_t(width) * 4 * tiling.quads), partials(size_t(tiling.quads));
  for (int64_t number = 0; number < tiling.tiles(); ++number) {
    const Tile tile = tile_at(tiling, number);
    for (uint32_t row = 0; row < uint32_t(channels * patch); ++row)
      for (uint32_t x = 0; x < uint32_t(tile.count * patch); ++x)
        rows[place_in_rows(tiling, row, x)] =
            images[pixel_offset(tiling, tile, {strides[0], strides[1], strides[2], strides[3]}, row, x)];
    for (int repeat = 0; repeat < repeats; ++repeat) {
      for (int g = 0; g < tile.count; ++g) {
        const int64_t token = first_row(tiling, tile, repeat) + g;
        for (int quad = 0; quad < tiling.quads; ++quad) {
          float x0[4], sum = 0.0f;
          normals(counter_of(first + token, tiling.quads, quad), words, x0);
          for (int k = 0; k < 4 && 4 * quad + k < tiling.length; ++k) {
            const int64_t at = token * tiling.length + 4 * quad + k;
            const float x1 = rows[g * 4 * tiling.quads + 4 * quad + k];
            x_t[at] = interpolated(x1, x0[k], t[token]);
            const float error = velocity_error(velocity[at], x1, x0[k], coefficients[token]);
            gradient[at] = velocity_gradient(error, coefficients[token]);
            sum = fmaf(error, error, sum);
          }
          partials[quad] = sum;
        }
        float lanes[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane_sum(partials.data(), tiling.quads, lane);
        losses[token] = coefficients[token] * butterfly(lanes);
      }
    }
  }
}

void cosine(int64_t tokens, int width, const float* student, const float* teacher, float largest, float* distances, float* gradient,
            float* powers) {
  for (int64_t token = 0; token < tokens; ++token) {
    const float *s = student + token * width, *t = teacher + token * width;
    CosineSums lanes[kLanes];
    for (int column = 0; column < width; ++column) lanes[column % kLanes].add(s[column], t[column]);
    float product[kLanes], students[kLanes], teachers[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
      product[lane] = lanes[lane].product, students[lane] = lanes[lane].student, teachers[lane] = lanes[lane].teacher;
    CosineSums sums;
    sums.product = butterfly(product), sums.student = butterfly(students), sums.teacher = butterfly(teachers);
    const CosineTerms terms = cosine_terms(sums);
    distances[token] = terms.distance;
    const float power = powers == nullptr ? 1.0f : powers[token] = gradient_power(terms.student_least);
    for (int column = 0; column < width; ++column)
      gradient[token * width + column] = power * cosine_gradient(terms, s[column], t[column], largest);
  }
}
}
