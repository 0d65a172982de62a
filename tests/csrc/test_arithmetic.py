"""The CUDA part's arithmetic, compiled for the host, against the plain definitions: all of it but the launches."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from uniflow_kernels import seeded_noise
from uniflow_kernels.ops.distillation import plain_cosine_distances
from uniflow_kernels.ops.patches import plain_patchify
from uniflow_kernels.ops.velocity import plain_interpolate, plain_velocity_loss
from uniflow_kernels.source import Source

CSRC = Path(__file__).parents[2] / "csrc"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = tmp_path_factory.mktemp("csrc") / "host.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    flags.append("-Wno-unknown-pragmas")  # those that unroll loops
    source = Path(__file__).parent / "host.cpp"
    subprocess.run(["g++", *flags, f"-I{CSRC}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr() if isinstance(tensor, torch.Tensor) else tensor.ctypes.data)


def i64(number):
    return ctypes.c_int64(number)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_integers(host, counter, key, expected):
    out = np.zeros(4, np.uint32)
    number = ctypes.c_uint64(counter[0] | counter[1] << 32)
    words = [ctypes.c_uint32(word) for word in (*key, *counter[2:])]
    host.philox_words(number, *words, address(out))
    assert " ".join(f"{word:08x}" for word in out) == expected


@pytest.mark.parametrize(("seed", "offset", "first"), [(0, 0, 0), (2**63 - 1, 2**62 + 5, 0), (3, 1, 2**40)])
def test_normals_are_those_of_the_definition(host, seed, offset, first):
    count = 1 << 16
    out = torch.empty(count, 4)
    host.normals_of(ctypes.c_uint64(first), i64(count), ctypes.c_uint64(seed), ctypes.c_uint64(offset), address(out))
    expected = seeded_noise(count, 4, seed, offset, first_row=first)
    assert (out - expected).abs().max() < 1e-6


def test_normals_of_extreme_words(host):
    """Against float64: the ends of the radius and of every quadrant, and many between."""
    ends = np.array([0, 1, 2, 2**31, 2**32 - 257, 2**32 - 129, 2**32 - 128, 2**32 - 1], np.uint32)
    corners = np.array([q * 2**30 + d for q in range(4) for d in (0, 1, 2**29, 2**30 - 1)], np.uint32)
    many = np.random.default_rng(0).integers(0, 2**32, (2, 1 << 18), dtype=np.uint32)
    lengths = np.concatenate([np.repeat(ends, len(corners)), many[0]])
    directions = np.concatenate([np.tile(corners, len(ends)), many[1]])
    out = np.empty((len(lengths), 2), np.float32)
    host.normals_of_words(i64(len(lengths)), address(lengths), address(directions), address(out))
    u = (lengths.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64)
    angle = (directions >> 30) * np.pi / 2 + ((directions & 0x3FFFFFFF).astype(np.float64) - 2**29) * np.pi / 2**31
    exact = np.sqrt(-2 * np.log(u))[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    assert np.abs(out - exact).max() < 1e-6


def test_division_by_multiplication_is_exact(host):
    assert host.wrong_quotients() == 0


@pytest.mark.parametrize(("repeats", "first"), [(1, 0), (3, 2**40 + 5)])
@pytest.mark.parametrize(
    ("shape", "patch", "width"), [((2, 3, 8, 20), 4, 2), ((3, 1, 9, 15), 3, 4), ((1, 2, 5, 7), 1, 7)]
)
def test_flow(host, within_twice, shape, patch, width, repeats, first):
    """x_t, loss and gradient of strided images with seeded noise, tile by tile."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, height, across = shape
    images = torch.randn(batch, height, across, channels, generator=generator).permute(0, 3, 1, 2)
    down, across = height // patch, across // patch
    rows, length = repeats * batch * down * across, channels * patch * patch
    t, coefficients = (torch.rand(rows, generator=generator) for _ in range(2))
    coefficients[1] = 0
    velocity = torch.randn(rows, length, generator=generator)
    velocity[1] = torch.nan
    x_t, gradient, losses = (torch.full(s, torch.nan) for s in ((rows, length), (rows, length), (rows,)))
    strides = np.array(images.stride(), np.int64)
    host.flow(
        i64(batch), channels, down, across, patch, width, address(strides), address(images), repeats,
        ctypes.c_uint64(7), ctypes.c_uint64(2), i64(first),
        *map(address, (t, velocity, coefficients, x_t, gradient, losses)),
    )  # fmt: skip
    grid = (repeats * batch, down * across)
    of = Source(images, None, None, None, None, 7, 2, first, patch, repeats)
    plain, plain_gradient, plain_losses = (torch.empty(*grid, *row) for row in ((length,), (length,), ()))
    plain_interpolate(of, t.view(grid), plain)
    assert (x_t.view_as(plain) - plain).abs().max() < 2e-6
    velocity, coefficients = velocity.view(*grid, length), coefficients.view(grid)
    plain_velocity_loss(of, velocity, coefficients, plain_gradient, plain_losses)
    assert torch.allclose(losses.view(grid), plain_losses, rtol=1e-5)
    assert (gradient.view_as(plain_gradient) - plain_gradient).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("shape", "patch", "width"), [((2, 3, 8, 20), 4, 2), ((3, 1, 9, 15), 3, 4), ((1, 2, 5, 7), 1, 7)]
)
def test_patches_there_and_back(host, shape, patch, width):
    """Of images with channels last to padded rows, tile by tile; what is between the rows stays as it was."""
    batch, channels, height, across = shape
    images = torch.randn(batch, height, across, channels, generator=torch.Generator().manual_seed(0))
    images = images.permute(0, 3, 1, 2)
    down, across, length = height // patch, across // patch, channels * patch * patch
    padded = torch.full((batch, down * across, length + 3), torch.nan)
    rows, back = padded[..., :length], torch.full_like(images, torch.nan)
    for pixels, cut in ((images, 1), (back, 0)):
        strides, row_strides = (np.array(x.stride(), np.int64) for x in (pixels, rows))
        host.move_patches(
            i64(batch), channels, down, across, patch, width, *map(address, (strides, pixels, row_strides, rows)), cut
        )
        assert torch.equal(rows, plain_patchify(images, patch))
        assert padded[..., length:].isnan().all()
    assert torch.equal(back, images)


def test_places_beyond_2_to_the_31(host):
    """Index arithmetic of a batch of 3000 images of 3 x 1792 x 1792: 2.9e10 elements, none of them in memory."""
    batch, channels, height, patch, width = 3000, 3, 1792, 14, 8
    across = height // patch
    strides = np.array([channels * height * height, height * height, height, 1], np.int64)
    row_strides = np.array([across * across * 600, 600, 1], np.int64)
    out = np.zeros(6, np.int64)
    random = np.random.default_rng(0)
    tiles = batch * across * (across // width)
    for number in [0, tiles - 1, *random.integers(0, tiles, 200)]:
        row, x, repeat = (int(random.integers(0, n)) for n in (channels * patch, width * patch, 4))
        host.place(
            i64(batch), channels, across, across, patch, width, address(strides), address(row_strides),
            i64(int(number)), row, x, repeat, address(out),
        )  # fmt: skip
        image, rest = divmod(int(number), across * (across // width))
        line, tile = divmod(rest, across // width)
        channel, inner = divmod(row, patch)
        pixel = ((image * channels + channel) * height + line * patch + inner) * height + tile * width * patch + x
        length = channels * patch * patch
        assert out[0] == pixel
        assert out[1] == x // patch * length + row * patch + x % patch
        assert out[2] == (repeat * batch + image) * across * across + line * across + tile * width
        assert out[3] == width
        assert out[4] == tiles
        token = image * across * across + line * across + tile * width + x // patch
        assert out[5] == token * 600 + row * patch + x % patch


@pytest.mark.parametrize("width", [1, 24, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cosine(host, width, dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(40, width, generator=generator) for _ in range(2))
    student[0], teacher[1], student[2], teacher[2] = 0, 0, 0, 0
    student[3] = 0
    teacher[3] *= 1e-10
    largest = torch.finfo(dtype).max
    distances, gradient, powers = torch.full((40,), torch.nan), torch.full_like(student, torch.nan), torch.ones(40)
    host.cosine(
        i64(40),
        width,
        address(student),
        address(teacher),
        ctypes.c_float(largest),
        address(distances),
        address(gradient),
        address(powers) if dtype == torch.float16 else None,
    )
    plain_distances, plain_gradient = torch.empty(1, 40), torch.empty(1, 40, width, dtype=dtype)
    plain_powers = torch.ones(1, 1, 40)
    given = plain_powers if dtype == torch.float16 else None
    plain_cosine_distances([student[None]], [teacher[None]], 0, [plain_gradient], given, plain_distances[None])
    # a norm that is all but a power of two may be one, by the order of its sum
    assert (powers.log2() - plain_powers[0, 0].log2()).abs().max() <= 1
    assert (dtype == torch.float32) == bool((powers == 1).all())
    gradient, plain_gradient = gradient / powers[:, None], plain_gradient.float() / plain_powers[0].mT
    assert torch.allclose(distances, plain_distances[0], rtol=1e-5, atol=1e-6)
    scale = (1 / student.norm(dim=1, keepdim=True).clamp(min=1e-8)).clamp(max=largest)
    assert ((gradient - plain_gradient[0]).abs() / scale).max() < (1e-5 if dtype == torch.float32 else 1e-3)
    assert torch.isfinite(gradient).all()


def test_cosine_against_float64(host, within_twice):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(64, 1024, generator=generator) for _ in range(2))
    distances, gradient = torch.empty(64), torch.empty_like(student)
    largest = ctypes.c_float(torch.finfo(torch.float32).max)
    host.cosine(i64(64), 1024, address(student), address(teacher), largest, address(distances), address(gradient), None)
    exact_input, plain_input = student.double().requires_grad_(), student.clone().requires_grad_()
    exact = 1 - torch.cosine_similarity(exact_input, teacher.double(), dim=-1)
    plain = 1 - torch.cosine_similarity(plain_input, teacher, dim=-1)
    within_twice(distances, plain.detach(), exact.detach())
    exact_gradient = torch.autograd.grad(exact.sum(), exact_input)[0]
    within_twice(gradient, torch.autograd.grad(plain.sum(), plain_input)[0], exact_gradient)
