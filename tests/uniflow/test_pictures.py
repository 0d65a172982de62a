import io
import logging
import os
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, features
from PIL.JpegImagePlugin import JpegImageFile

from tests.conftest import smooth_picture
from uniflow.cli.files import picture_suffixes
from uniflow.normalization import IMAGENET_MEAN, IMAGENET_STD, denormalize, normalize, to_uint8
from uniflow.pictures import (
    FORMATS,
    PictureError,
    TooLargeError,
    center_crop,
    cut,
    fit_to_patches,
    open_part,
    open_picture,
    save_picture,
    to_tensor,
)


def test_normalization_is_imagenets():
    pixels = torch.rand(2, 3, 4, 5)
    expected = torch.stack([(pixels[:, c] - IMAGENET_MEAN[c]) / IMAGENET_STD[c] for c in range(3)], dim=1)
    assert torch.allclose(normalize(pixels), expected)
    assert torch.allclose(denormalize(normalize(pixels)), pixels, atol=1e-6)
    assert (IMAGENET_MEAN, IMAGENET_STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_uint8_round_trip_is_exact():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    assert normalize(pixels).dtype == torch.float32
    assert torch.equal(to_uint8(normalize(pixels)), pixels)
    assert torch.equal(to_uint8(torch.full((3, 1, 1), 99.0)), torch.full((3, 1, 1), 255, dtype=torch.uint8))
    assert torch.equal(to_uint8(torch.full((3, 1, 1), -99.0)), torch.zeros(3, 1, 1, dtype=torch.uint8))


def test_normalization_is_differentiable_after_inference_mode():
    with torch.inference_mode():
        normalize(torch.rand(3, 2, 2, dtype=torch.float64))
    x = torch.rand(3, 2, 2, dtype=torch.float64, requires_grad=True)
    denormalize(normalize(x)).sum().backward()
    assert torch.allclose(x.grad, torch.ones_like(x))


def test_compiled_normalization_holds_mean_and_std():
    """They are part of the graph, and not made in each call."""
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph

    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(torch.compile(normalize, fullgraph=True, backend=look)(pixels), normalize(pixels))
    kinds = [node.op for node in graphs[0].graph.nodes]
    assert kinds.count("get_attr") == 2
    assert not any(node.target is torch.tensor for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("wrong", [torch.rand(1, 4, 4), torch.rand(3, 4), torch.zeros(3, 4, 4, dtype=torch.int32)])
def test_normalization_refuses_other_shapes(wrong):
    with pytest.raises(ValueError, match="images: expected"):
        normalize(wrong)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpg"), ("1", "png"), ("LA", "png")],
)
def test_every_kind_becomes_rgb(tmp_path, mode, suffix):
    original = smooth_picture((20, 10), 0)
    path = tmp_path / f"x.{suffix}"
    original.convert(mode).save(path)
    picture = open_picture(path)
    assert picture.mode == "RGB"
    assert picture.size == (20, 10)
    if mode in ("RGBA", "CMYK"):
        assert np.abs(np.asarray(picture, float) - np.asarray(original, float)).mean() < 12


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    read = np.asarray(open_picture(tmp_path / "x.png"))
    assert np.array_equal(read, np.repeat((values / 257).round().astype(np.uint8)[..., None], 3, axis=2))


def test_exif_orientation_is_applied(tmp_path):
    original = smooth_picture((20, 10), 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    original.save(tmp_path / "x.png", exif=exif)
    assert open_picture(tmp_path / "x.png").size == (10, 20)


@pytest.fixture
def decoded(monkeypatch):
    """The sizes at which JPEGs were decoded."""
    sizes = []
    plain = JpegImageFile.load

    def load(self):
        if self.tile:
            sizes.append(self.size)
        return plain(self)

    monkeypatch.setattr(JpegImageFile, "load", load)
    return sizes


def unlike(picture, other):
    """The largest difference of any two values."""
    return np.abs(np.asarray(picture, int) - np.asarray(other, int)).max()


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}], ids=str)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_part_of_a_jpeg_is_that_of_the_whole(tmp_path, decoded, orientation, how):
    """Decoded smaller, however it is turned, of sides that 8 does not divide: the same part, within a few values."""
    how = dict(how)
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth_picture((331, 203), 0).convert(how.pop("mode", "RGB")).save(tmp_path / "x.jpg", quality=95, exif=exif, **how)
    whole, asked = open_picture(tmp_path / "x.jpg"), []

    def part(width, height):
        asked.append((width, height))
        return 0.2 * width + 0.3, 0.1 * height, 0.2 * width + 150.3, 0.1 * height + 150

    for size, smaller in ((80, 1), (30, 2), (18, 4), (9, 8)):
        decoded.clear()
        made = open_part(tmp_path / "x.jpg", part, size)
        assert decoded == [(-(-331 // smaller), -(-203 // smaller))]
        expected = cut(whole, part(*whole.size), size)
        assert (made.mode, made.size) == ("RGB", (size, size))
        assert unlike(made, expected) <= (4 if smaller > 1 else 0)
    assert set(asked) == {whole.size}


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 60), st.floats(0.01, 1), st.data())
def test_twice_as_many_pixels_are_left(width, height, size, share, data):
    """Of any part of any picture, whose box stays inside of what is decoded."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(file, "jpeg")
    side = share * min(width, height)
    left, top = (data.draw(st.floats(0, 1)) * (extent - side) for extent in (width, height))
    found = []

    def look(picture, box, size):
        found.append((picture.size, box))
        return cut(picture, box, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uniflow.pictures.cut", look)
        made = open_part(file, lambda *_: (left, top, left + side, top + side), size, "x.jpg")
    ((decoded, box),) = found
    assert decoded == (width, height) or box[2] - box[0] >= 2 * size * 0.999
    assert made.getpixel((0, 0)) == made.getpixel((size - 1, size - 1))


def test_parts_of_other_pictures_are_decoded_whole(tmp_path):
    original = smooth_picture((200, 120), 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "webp", "tif"):
        original.save(tmp_path / f"x.{suffix}", exif=exif)
        whole = open_picture(tmp_path / f"x.{suffix}")
        assert whole.size == (120, 200)
        made = open_part(tmp_path / f"x.{suffix}", lambda width, height: (0, 80, width, 200), 10)
        assert unlike(made, cut(whole, (0, 80, 120, 200), 10)) == 0


def test_a_part_of_a_damaged_jpeg(tmp_path):
    path = tmp_path / "x.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    with pytest.raises(TooLargeError, match=r"x\.jpg is too large: 64x64 pixels, at most 4000 are allowed"):
        open_part(path, lambda *_: (0, 0, 64, 64), 4, largest=4000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(PictureError, match=r"x\.jpg is damaged"):
        open_part(path, lambda *_: (0, 0, 64, 64), 4)


def test_pixels_that_do_not_change_are_not_copied(tmp_path, monkeypatch):
    """A copy of a photograph takes as long as decoding it."""
    for suffix in ("jpg", "png"):
        smooth_picture((40, 20), 0).save(tmp_path / f"x.{suffix}")
    monkeypatch.setattr(Image.Image, "copy", None)
    assert {open_picture(tmp_path / name).size for name in ("x.jpg", "x.png")} == {(40, 20)}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp", "gif"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(PictureError, match=r"x\.\w+ is (damaged|not a picture)"):
        open_picture(path)


def test_what_is_no_picture_is_refused(tmp_path):
    path = tmp_path / "x.png"
    for content in (b"", b"hello", struct.pack(">I", 0x89504E47), b"\x89PNG\r\n\x1a\n" + bytes(40)):
        path.write_bytes(content)
        with pytest.raises(PictureError):
            open_picture(path)
    with pytest.raises(FileNotFoundError):
        open_picture(tmp_path / "none.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(PictureError, match="floating-point"):
        open_picture(tmp_path / "x.tif")


@pytest.mark.skipif(not features.check("avif"), reason="needs a Pillow with AVIF")
def test_avif_is_read_where_pillow_has_it(tmp_path):
    smooth_picture((20, 10), 0).save(tmp_path / "x.avif")
    assert open_picture(tmp_path / "x.avif").size == (20, 10)
    assert ".avif" in picture_suffixes()


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO"])
def test_only_documented_formats_are_opened_whatever_a_file_is_called(tmp_path, kind):
    """EPS would start another program."""
    smooth_picture((20, 10), 0).save(tmp_path / "photo.jpg", kind)
    with pytest.raises(PictureError, match=r"photo\.jpg is not a picture that can be read \(BMP, GIF"):
        open_picture(tmp_path / "photo.jpg")


@pytest.mark.parametrize(
    "error", [NotImplementedError, RuntimeError, TypeError, AttributeError, IndexError, MemoryError]
)
def test_however_a_reader_fails_the_picture_is_damaged(tmp_path, monkeypatch, error):
    smooth_picture((20, 10), 0).save(tmp_path / "x.png")

    def load(self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(PictureError, match=rf"x\.png is damaged: {error.__name__}"):
        open_picture(tmp_path / "x.png")


def test_too_large_is_not_damaged(tmp_path, monkeypatch):
    smooth_picture((20, 10), 0).save(tmp_path / "x.png")
    assert open_picture(tmp_path / "x.png", largest=200).size == (20, 10)
    with pytest.raises(TooLargeError, match=r"x\.png is too large: 20x10 pixels, at most 199 are allowed"):
        open_picture(tmp_path / "x.png", largest=199)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(TooLargeError, match=r"x\.png is too large: .*exceeds limit"):
        open_picture(tmp_path / "x.png")


def test_a_file_of_terabytes_is_not_read(tmp_path):
    """The reader of WebP takes all of it into memory."""
    with (tmp_path / "x.webp").open("wb") as file:
        file.write(b"RIFF\xff\xff\xff\xffWEBPVP8 ")
        file.truncate(1 << 40)
    with pytest.raises(TooLargeError, match=r"x\.webp is too large: 1099511627776 bytes, at most 2147483648 are read"):
        open_picture(tmp_path / "x.webp")


def test_warnings_name_the_file(tmp_path, monkeypatch):
    smooth_picture((20, 10), 0).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    with pytest.warns(Image.DecompressionBombWarning, match=r"x\.png: Image size \(200 pixels\)"):
        open_picture(tmp_path / "x.png")


def test_threads_hear_every_warning(tmp_path, monkeypatch):
    for name in "abcd":
        smooth_picture((20, 10), 0).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    with warnings.catch_warnings(record=True) as heard, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: open_picture(tmp_path / f"{'abcd'[i % 4]}.png"), range(100)))
        warnings.warn("afterwards", UserWarning, stacklevel=1)
    names = [str(warning.message).split(":")[0] for warning in heard]
    assert sorted(names[:-1]) == sorted(25 * [str(tmp_path / f"{name}.png") for name in "abcd"])
    assert names[-1] == "afterwards"


def test_what_pillow_logs_is_not_printed_beside_the_error(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.tif"
    smooth_picture((20, 10), 0).save(path)
    samples = struct.pack("<HHI", 277, 3, 1)  # a tag, its type and count; how many colours a pixel has
    path.write_bytes(path.read_bytes().replace(samples + b"\3", samples + b"\x80"))
    monkeypatch.setattr(logging.root, "handlers", [])
    with pytest.raises(PictureError, match=r"x\.tif is (damaged|not a picture)"):
        open_picture(path)
    assert not capsys.readouterr().err


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(PictureError, match="expected a file, got a pipe or device"):
        open_picture(tmp_path / "x.png")


@given(st.sampled_from([kind.lower() for kind in FORMATS]), st.data())
def test_a_damaged_picture_is_read_or_refused_in_one_line(kind, data):
    buffer = io.BytesIO()
    smooth_picture((11, 7), 0).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(len(content) // 2, len(content)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            outcome = open_picture(io.BytesIO(content), "x", largest=10_000_000).mode
        except PictureError as error:
            outcome = str(error)
    assert outcome == "RGB" or (outcome.startswith("x is ") and "\n" not in outcome)


def release_center_crop(picture, size):
    """The steps of the release's `center_crop_arr`, on arrays."""
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.Resampling.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.Resampling.BICUBIC)
    array = np.array(picture)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("extent", [(32, 32), (33, 50), (100, 31), (7, 9), (301, 130), (1, 1)])
def test_center_crop_is_the_releases(extent):
    picture = smooth_picture(extent, 1)
    assert np.array_equal(np.asarray(center_crop(picture, 32)), release_center_crop(picture, 32))


@pytest.mark.parametrize("extent", [(10_000, 1), (1, 10_000), (20_000, 3)])
def test_of_a_strip_only_the_middle_is_resized(extent):
    """The whole of it, resized to cover 448 pixels, would have 2 billion."""
    across, down = extent
    strip = np.zeros((down, across, 3), np.uint8)
    strip[..., 0] = np.linspace(0, 200, across) if across > down else np.linspace(0, 200, down)[:, None]
    crop = np.asarray(center_crop(Image.fromarray(strip), 448), float)
    assert crop.shape == (448, 448, 3)
    assert np.abs(crop[..., 0] - 100).max() <= 1
    small = np.asarray(center_crop(Image.fromarray(strip), 4), float)
    assert np.abs(small[..., 0] - 100).max() <= 1


@pytest.mark.parametrize("extent", [(32, 16), (100, 90), (90, 200), (64, 32), (20, 13)])
def test_center_crop_to_a_rectangle_shows_the_middle_undistorted(extent):
    across, down = extent
    gradient = np.zeros((down, across, 3), np.uint8)
    gradient[..., 0] = np.linspace(0, 255, across)
    gradient[..., 1] = np.linspace(0, 255, down)[:, None]
    crop = np.asarray(center_crop(Image.fromarray(gradient), (16, 32)), float)
    assert crop.shape == (16, 32, 3)
    assert np.abs(crop[..., :2].mean((0, 1)) - 127.5).max() < 127.5 / 16  # at most half a pixel off the middle
    slopes = [np.diff(crop[..., 0].mean(0)).mean() * across, np.diff(crop[..., 1].mean(1)).mean() * down]
    assert slopes[0] == pytest.approx(slopes[1], rel=0.25)  # as steep in pixels of the original


@pytest.mark.parametrize(("extent", "expected"), [((40, 30), (40, 32)), ((3, 1), (4, 4)), ((41, 43), (40, 44))])
def test_fit_to_patches(extent, expected):
    assert fit_to_patches(smooth_picture(extent, 0), 4).size == expected
    picture = smooth_picture((40, 32), 0)
    assert fit_to_patches(picture, 4) is picture


def test_saving_is_exact_and_leaves_nothing_behind(tmp_path):
    pixels = to_tensor(smooth_picture((20, 10), 0))
    save_picture(pixels, tmp_path / "x.png")
    assert torch.equal(to_tensor(open_picture(tmp_path / "x.png")), pixels)
    with pytest.raises(ValueError, match="unknown file extension"):
        save_picture(pixels, tmp_path / "x.nonsense")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
