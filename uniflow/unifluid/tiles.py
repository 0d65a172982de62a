"""How pictures are shown to a vision encoder: each as one tile of its size, or a large one as a grid of tiles."""

from __future__ import annotations

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from uniflow.pictures import center_crop, cut, to_tensor

LARGEST_GRID = 64  # tiles


def most_tiles(most: int) -> int:
    """How many tiles a picture can have where a grid has at most `most`: those, and one of the whole picture."""
    return most + 1 if most > 1 else 1


def tile_grid(picture: tuple[int, int], size: tuple[int, int], most: int) -> tuple[int, int]:
    """Lines of tiles, and tiles a line, that a picture is resized to.

    Of all grids of at most `most` tiles, with no more lines and columns than the picture has heights and widths of a
    tile, rounded, it is the one that changes the picture's aspect ratio least; of several the one of most tiles. So a
    picture that is at most half as large again as a tile is one tile.

    Args:
        picture: width and height, in pixels.
        size: (H, W) of a tile.
        most: 1 for no grid.

    Source: the dynamic resolution of InternVL 1.5, which takes the nearest ratio too, whatever is enlarged for it.
    """
    (width, height), (tall, wide) = picture, size
    down, across = (max(1, (2 * extent + tile) // (2 * tile)) for extent, tile in ((height, tall), (width, wide)))
    grids = [
        (lines, columns)
        for lines in range(1, min(down, most) + 1)
        for columns in range(1, min(across, most // lines) + 1)
    ]

    def change(grid: tuple[int, int]) -> tuple[float, int]:
        lines, columns = grid
        one, other = width * lines * tall, height * columns * wide
        return max(one, other) / min(one, other), -lines * columns

    return min(grids, key=change)


def one_tile(picture: Image.Image, size: tuple[int, int], mirrored: bool = False) -> Tensor:
    """The middle of a picture, uint8 [1, 3, H, W], see `center_crop`; mirrored if wanted."""
    pixels = to_tensor(center_crop(picture, size)).unsqueeze(0)
    return pixels.flip(-1) if mirrored else pixels


def tiles_of(picture: Image.Image, size: tuple[int, int], most: int = 1, mirrored: bool = False) -> Tensor:
    """What is seen of a picture that is read.

    Args:
        picture: RGB, of any size.
        size: (H, W) of a tile.
        most: tiles of a grid. With 1 the picture is its middle, `one_tile`; with more it is resized as a whole, its
            aspect ratio changed, to the size of its `tile_grid`.
        mirrored: whether left and right are exchanged.

    Returns:
        uint8 [T, 3, H, W]: the one tile; or the whole picture as a tile, then the tiles of the grid, line by line.
    """
    if most == 1:
        return one_tile(picture, size, mirrored)
    lines, columns = tile_grid(picture.size, size, most)

    def whole(lines: int, columns: int) -> Tensor:
        pixels = to_tensor(cut(picture, (0, 0, *picture.size), (lines * size[0], columns * size[1])))
        return rearrange(pixels.flip(-1) if mirrored else pixels, "c (l h) (k w) -> (l k) c h w", l=lines, k=columns)

    parts = [whole(lines, columns)]
    return torch.cat(parts if lines * columns == 1 else [whole(1, 1), *parts])
