// Where things are: tiles of neighbouring patches, pixels in them, and rows of tokens. All offsets are in elements.
#pragma once

#include "host_device.h"

namespace uniflow {

// A tile is a run of `width` patches of one line of patches of one image (the last one of a line may be shorter).
struct Tiling {
  int64_t batch;
  int32_t channels, down, across, patch;
  int32_t width, tiles_across;
  int32_t length;  // of a row: channels * patch^2
  int32_t quads;   // counters of a row: ceil(length / 4)
  SmallDivisor by_patch;

  UNIFLOW_HD int64_t tokens() const { return static_cast<int64_t>(down) * across; }
  UNIFLOW_HD int64_t tiles() const { return batch * down * tiles_across; }
};

UNIFLOW_HD Tiling tiling_of(int64_t batch, int32_t channels, int32_t down, int32_t across, int32_t patch, int32_t width) {
  Tiling tiling{};
  tiling.batch = batch;
  tiling.channels = channels;
  tiling.down = down;
  tiling.across = across;
  tiling.patch = patch;
  tiling.width = width;
  tiling.tiles_across = (across + width - 1) / width;
  tiling.length = channels * patch * patch;
  tiling.quads = (tiling.length + 3) / 4;
  tiling.by_patch = SmallDivisor(patch);
  return tiling;
}

struct Tile {
  int64_t image;
  int32_t line, left, count;  // of patches
};

UNIFLOW_HD Tile tile_at(const Tiling& tiling, int64_t number) {
  Tile tile;
  const int64_t line = number / tiling.tiles_across;
  tile.left = static_cast<int32_t>(number - line * tiling.tiles_across) * tiling.width;
  tile.image = line / tiling.down;
  tile.line = static_cast<int32_t>(line - tile.image * tiling.down);
  tile.count = tiling.across - tile.left < tiling.width ? tiling.across - tile.left : tiling.width;
  return tile;
}

struct ImageStrides {
  int64_t image, channel, row, column;
};

// Offset of pixel `x` (from the left edge of the tile) of the tile's pixel row `row` = channel * patch + line in the patch.
UNIFLOW_HD int64_t pixel_offset(const Tiling& tiling, const Tile& tile, const ImageStrides& strides, uint32_t row, uint32_t x) {
  const uint32_t channel = tiling.by_patch.quotient(row);
  const int64_t y = static_cast<int64_t>(tile.line) * tiling.patch + (row - channel * tiling.patch);
  return tile.image * strides.image + channel * strides.channel + y * strides.row +
         (static_cast<int64_t>(tile.left) * tiling.patch + x) * strides.column;
}

struct RowStrides {
  int64_t image, token, column;
};

// Offset of a column of the tile's token `g` among rows [B, N, length].
UNIFLOW_HD int64_t row_offset(const Tiling& tiling, const Tile& tile, const RowStrides& strides, uint32_t g, uint32_t column) {
  const int64_t token = static_cast<int64_t>(tile.line) * tiling.across + tile.left + g;
  return tile.image * strides.image + token * strides.token + column * strides.column;
}

// Where a pixel stands in the tile's rows, which are 4 * quads apart.
UNIFLOW_HD uint32_t place_in_rows(const Tiling& tiling, uint32_t row, uint32_t x) {
  const uint32_t token = tiling.by_patch.quotient(x);
  return token * 4 * tiling.quads + row * tiling.patch + (x - token * tiling.patch);
}

// Row of the tile's first token in the given repeat, among all k*B*N.
UNIFLOW_HD int64_t first_row(const Tiling& tiling, const Tile& tile, int32_t repeat) {
  return (repeat * tiling.batch + tile.image) * tiling.tokens() + static_cast<int64_t>(tile.line) * tiling.across + tile.left;
}

}  // namespace uniflow
