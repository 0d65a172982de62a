"""Picture files and tensors: reading any kind as RGB, fitting to a size as the release does, writing."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from uniflow.atomic import replacing


class PictureError(ValueError):
    """A file that is no picture, or a damaged one."""


def open_picture(file: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Read a picture of any kind as 8-bit RGB, turned upright as its EXIF orientation says; errors call it `name`.

    Grey, palette, CMYK, 16-bit and transparent pictures are converted (16-bit ones by scaling, transparency dropped,
    as the release's `convert("RGB")` does).

    Raises:
        FileNotFoundError: if there is no such file.
        PictureError: if it is no picture, damaged or truncated, or of floating-point values.
    """
    name = str(file) if name is None else name
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)  # reads the pixels too
            if picture.mode.startswith("I"):
                # Pillow would clip 16-bit values at 255
                return Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8)).convert(
                    "RGB"
                )
            if picture.mode == "F":
                raise PictureError(f"{name}: pictures of floating-point values are not supported")
            return picture.convert("RGB")
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"{name} is not a picture that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(f"{name} is damaged: {error}") from None


def center_crop(picture: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Resize to just cover `size`, the side of a square or (H, W), and cut the middle out.

    Source: `center_crop_arr` of the release's quick start (from ADM), which makes squares: halved by box filter while
    at least twice too large, then bicubic.
    """
    height, width = (size, size) if isinstance(size, int) else size
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    across, down = (round(extent * scale) for extent in picture.size)
    picture = picture.resize((across, down), Image.Resampling.BICUBIC)
    left, top = (across - width) // 2, (down - height) // 2
    return picture.crop((left, top, left + width, top + height))


def fit_to_patches(picture: Image.Image, patch_size: int) -> Image.Image:
    """Resize both sides to the nearest multiple of the patch (at least one patch); unchanged where they are one."""
    width, height = (max(1, round(extent / patch_size)) * patch_size for extent in picture.size)
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BICUBIC)


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def save_picture(pixels: Tensor, path: Path) -> None:
    """Write uint8 [3, H, W] in the format of the file's suffix; the file is whole or not there."""
    with replacing(path) as temporary:
        Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(temporary)
