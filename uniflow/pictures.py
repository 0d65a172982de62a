"""Picture files and tensors: reading any kind as RGB, fitting to a size as the release does, writing."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from uniflow.atomic import replacing
from uniflow.reading import check_file

try:
    from PIL import AvifImagePlugin
except ImportError:  # before Pillow 11.3
    _HAS_AVIF = False
else:
    _HAS_AVIF = AvifImagePlugin.SUPPORTED

# by Pillow's names: those whose readers are Pillow's own and start no other program, as that of EPS would
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", *(["AVIF"] if _HAS_AVIF else []))
_LARGEST_FILE = 1 << 31  # bytes, unless more pixels are allowed than fit; readers of some formats take it whole
# EXIF orientations that exchange width and height, and those whose first column, or line, is shown as the last one
_TURNED, _FROM_RIGHT, _FROM_BELOW = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
_SMALLER = (8, 4, 2, 1)  # times that a JPEG can be decoded smaller
_LEFT = 2.0  # pixels a side that are left for each of the result's when a part is made smaller before it is resampled
_STRIP = 64  # times as long as the size that is cut out of it

# what Pillow logs it raises as well, but where no one listens Python would print it, without the picture's name
logging.getLogger("PIL").addHandler(logging.NullHandler())


T = TypeVar("T")
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


class PictureError(ValueError):
    """A file that is no picture, or a damaged one."""


class TooLargeError(PictureError):
    """A picture of more pixels, or bytes, than are allowed."""


class _Warnings:
    """Warnings of Pillow begin with the name of the picture that their thread reads.

    What Python has to record them takes those of all threads, and where two overlap none is heard afterwards.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: dict[int, str] = {}  # by thread
        self._changed = ExitStack()

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        thread = threading.get_ident()
        with self._lock:
            if not self._names:
                self._change()
            self._names[thread] = name
        try:
            yield
        finally:
            with self._lock:
                del self._names[thread]
                if not self._names:
                    self._changed.close()

    def _change(self) -> None:
        show = warnings.showwarning

        def named(message: Warning | str, *rest: Any, **options: Any) -> None:
            name = self._names.get(threading.get_ident())
            show(message if name is None else f"{name}: {message}", *rest, **options)

        self._changed.enter_context(warnings.catch_warnings())
        warnings.showwarning = named
        # a text that was there before is another one with another name; what the user filters comes first
        warnings.filterwarnings("always", module="PIL", append=True)


_warnings = _Warnings()


def open_picture(file: Path | BinaryIO, name: str | None = None, largest: int | None = None) -> Image.Image:
    """Read a picture of any kind as 8-bit RGB, turned upright as its EXIF orientation says; errors call it `name`.

    Grey, palette, CMYK, 16-bit and transparent pictures are converted (16-bit ones by scaling, transparency dropped,
    as the release's `convert("RGB")` does).

    Args:
        file: one of `FORMATS`, whatever it is called.
        name: for errors and warnings; the file's path if not given.
        largest: how many pixels it may have. Pillow's own limit, twice `Image.MAX_IMAGE_PIXELS`, holds beside it; and
            a file may have 2 GiB, or 8 bytes for each of the pixels if these are more.

    Raises:
        FileNotFoundError: if there is no such file.
        TooLargeError: if it has more pixels or bytes.
        PictureError: if it is no picture, damaged or truncated, or of floating-point values; or no file to read from
            but a pipe or a device.
    """
    return _opened(file, name, largest, _upright)


def open_part(
    file: Path | BinaryIO,
    part: Callable[[int, int], Box],
    size: int,
    name: str | None = None,
    largest: int | None = None,
) -> Image.Image:
    """Read a part of a picture, resized to a square, as `cut` makes it of `open_picture`; errors as there.

    A JPEG is decoded at a half, a quarter or an eighth of its size where the part is so much larger than the result
    that twice as many pixels a side are left: this takes a part of the time, and comes as near to exact resampling as
    `cut` of the whole. The part is the same.

    Args:
        file: as of `open_picture`.
        part: given width and height of the picture as it is shown, says which part; it is asked once.
        size: side of the square.
        name, largest: as of `open_picture`.
    """

    def read(opened: Image.Image, name: str) -> Image.Image:
        if not isinstance(opened, JpegImageFile):
            picture = _upright(opened, name)
            return cut(picture, part(*picture.size), size)
        orientation = opened.getexif().get(ExifTags.Base.Orientation)
        width, height = reversed(opened.size) if orientation in _TURNED else opened.size
        left, top, right, bottom = part(width, height)
        side = min(right - left, bottom - top)
        times = next((times for times in _SMALLER if times * _LEFT * size <= side), 1)
        if times > 1 and opened.draft(None, (opened.width // times, opened.height // times)) is None:
            times = 1
        picture = _upright(opened, name)
        # a last pixel stands for less than the others where `times` does not divide the side
        x = picture.width - width / times if orientation in _FROM_RIGHT else 0.0
        y = picture.height - height / times if orientation in _FROM_BELOW else 0.0
        return cut(picture, (left / times + x, top / times + y, right / times + x, bottom / times + y), size)

    return _opened(file, name, largest, read)


def picture_size(file: Path | BinaryIO, name: str | None = None, largest: int | None = None) -> tuple[int, int]:
    """(height, width) of a picture as it is shown, of which the header alone is read; else as `open_picture`."""

    def read(opened: Image.Image, _: str) -> tuple[int, int]:
        # a PNG's own getexif would decode it, to find what stands behind its pixels
        turned = Image.Image.getexif(opened).get(ExifTags.Base.Orientation) in _TURNED
        return (opened.width, opened.height) if turned else (opened.height, opened.width)

    return _opened(file, name, largest, read)


def _opened(file: Path | BinaryIO, name: str | None, largest: int | None, read: Callable[[Image.Image, str], T]) -> T:
    """What `read` makes of a picture, whose header was read, and its name; with the errors of `open_picture`."""
    name = str(file) if name is None else name
    if isinstance(file, Path):
        try:
            check_file(file)
        except FileNotFoundError:
            raise
        except ValueError as error:
            raise PictureError(str(error)) from None
        if (size := file.stat().st_size) > (most := max(_LARGEST_FILE, 8 * (largest or 0))):
            raise TooLargeError(f"{name} is too large: {size} bytes, at most {most} are read")
    try:
        with _warnings.naming(name), Image.open(file, formats=FORMATS) as opened:
            width, height = opened.size
            if largest is not None and width * height > largest:
                raise TooLargeError(f"{name} is too large: {width}x{height} pixels, at most {largest} are allowed")
            return read(opened, name)
    except (FileNotFoundError, PermissionError, PictureError):
        raise
    except UnidentifiedImageError:
        raise PictureError(f"{name} is not a picture that can be read ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{name} is too large: {error}") from None
    except Exception as error:  # a reader of Pillow may end in any on a damaged file
        raise PictureError(f"{name} is damaged: {str(error) or type(error).__name__}") from None


def _upright(opened: Image.Image, name: str) -> Image.Image:
    """Read the pixels, as 8-bit RGB and turned as EXIF says; copied only where they change."""
    ImageOps.exif_transpose(opened, in_place=True)  # reads the pixels too
    if opened.mode.startswith("I"):
        # Pillow would clip 16-bit values at 255
        return Image.fromarray((np.asarray(opened).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if opened.mode == "F":
        raise PictureError(f"{name}: pictures of floating-point values are not supported")
    return opened if opened.mode == "RGB" else opened.convert("RGB")


def cut(picture: Image.Image, box: Box, size: int | tuple[int, int]) -> Image.Image:
    """A part of a picture, resized to `size`, the side of a square or (H, W).

    Bicubic, on what is made smaller before, while twice as many pixels a side are left.
    """
    height, width = (size, size) if isinstance(size, int) else size
    return picture.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=_LEFT)


def center_crop(picture: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Resize to just cover `size`, the side of a square or (H, W), and cut the middle out.

    Source: `center_crop_arr` of the release's quick start (from ADM), which makes squares: halved by box filter while
    at least twice too large, then bicubic. Of a strip 64 times as long as the size only the middle is resized.
    """
    height, width = (size, size) if isinstance(size, int) else size
    ratio = picture.width * height / (picture.height * width)
    if not 1 / _STRIP < ratio < _STRIP:  # to cover the size with a whole strip could take gigabytes
        picture = _middle(picture, height, width)
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    across, down = (round(extent * scale) for extent in picture.size)
    picture = picture.resize((across, down), Image.Resampling.BICUBIC)
    left, top = (across - width) // 2, (down - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _middle(picture: Image.Image, height: int, width: int) -> Image.Image:
    """What a crop of (height, width) shows of a strip, and some pixels around it."""
    across = min(picture.width, -(-picture.height * width // height) + 8)
    down = min(picture.height, -(-picture.width * height // width) + 8)
    left, top = (picture.width - across) // 2, (picture.height - down) // 2
    return picture.crop((left, top, left + across, top + down))


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
