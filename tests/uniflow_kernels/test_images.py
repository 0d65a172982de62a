"""The last update into images: plain PyTorch and the kernel in the interpreter, against the steps one by one."""

import os

import pytest
import torch

from uniflow import denormalize
from uniflow.normalization import IMAGENET_MEAN, IMAGENET_STD, to_uint8
from uniflow_kernels import backend, patchify, to_images, unpatchify
from uniflow_kernels.ops.pixels import _per_channel


@pytest.fixture(params=["eager", "triton"], autouse=True)
def on_all_backends(request):
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("tests/gpu runs the kernel on a GPU")
    with backend(request.param):
        yield request.param


NORMALISED = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def inputs(dtype=torch.float32, batch=2, tokens=6, columns=48):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(batch, tokens, columns, generator=generator).to(dtype) for _ in range(2))


def step_by_step(rows, velocity, dt, patch=4, size=(8, 12)):
    return denormalize(unpatchify(rows + dt * velocity, patch, size)).clamp(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("patch", [4, 2, 1])
def test_everything_at_once(within_twice, dtype, patch):
    rows, velocity = inputs(dtype, tokens=6, columns=3 * patch**2)
    size = (2 * patch, 3 * patch)
    out = to_images(rows, patch, size, velocity=velocity, dt=0.3, clamp=True, **NORMALISED)
    assert out.dtype == dtype
    assert out.is_contiguous()
    exact = step_by_step(rows.double(), velocity.double(), 0.3, patch, size)
    within_twice(out, step_by_step(rows, velocity, 0.3, patch, size), exact)


def test_what_is_left_out_is_not_done():
    rows, velocity = inputs()
    assert torch.equal(to_images(rows, 4, (8, 12)), unpatchify(rows, 4, (8, 12)))
    moved = to_images(rows, 4, (8, 12), velocity=velocity, dt=-2.0)
    assert torch.allclose(moved, unpatchify(rows - 2 * velocity, 4, (8, 12)), atol=1e-6)
    assert moved.min() < 0
    assert moved.max() > 1
    assert torch.equal(to_images(rows, 4, (8, 12), clamp=True), unpatchify(rows, 4, (8, 12)).clamp(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_once(dtype):
    """The sum is made in float32 whatever the rows are; the state may be wider than the velocity."""
    rows, velocity = inputs()
    velocity = velocity.to(dtype)
    wide = to_images(rows, 4, (8, 12), velocity=velocity, dt=0.7, **NORMALISED)
    assert wide.dtype == torch.float32
    assert torch.allclose(wide, denormalize(unpatchify(rows + 0.7 * velocity.float(), 4, (8, 12))), atol=1e-6)
    narrow = to_images(rows, 4, (8, 12), velocity=velocity, dt=0.7, dtype=dtype, **NORMALISED)
    assert torch.equal(narrow, wide.to(dtype))


def test_bytes():
    values = torch.linspace(-0.2, 1.2, 4 * 48).view(1, 4, 48)
    expected = (unpatchify(values, 4).clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.equal(to_images(values, 4, dtype=torch.uint8), expected)
    # ties go to the even one, and every byte comes back
    ties = ((torch.arange(192) + 0.5) / 255).view(1, 4, 48)
    assert torch.equal(to_images(ties, 4, dtype=torch.uint8), (unpatchify(ties, 4) * 255).round().to(torch.uint8))
    pictures = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    assert torch.equal(to_images(patchify(pictures.float() / 255, 4), 4, dtype=torch.uint8), pictures)


def test_bytes_of_normalised_rows_are_those_of_to_uint8():
    rows, velocity = inputs()
    images = unpatchify(rows + 0.5 * velocity, 4, (8, 12))
    ours = to_images(rows, 4, (8, 12), velocity=velocity, dt=0.5, dtype=torch.uint8, **NORMALISED)
    assert (ours.int() - to_uint8(images).int()).abs().max() <= 1
    assert (ours != to_uint8(images)).float().mean() < 0.01


def test_squares_wide_rows_strides_and_nothing():
    rows, velocity = inputs(tokens=4)
    assert torch.equal(to_images(rows, 4), unpatchify(rows, 4))
    wide = torch.randn(1, 150, 48)  # more pixels than a program takes
    assert torch.equal(to_images(wide, 4, (4, 600)), unpatchify(wide, 4, (4, 600)))
    padded, columns_first = torch.randn(2, 9, 60), torch.randn(2, 48, 4).transpose(1, 2)
    assert torch.equal(to_images(padded[:, 1:5, 5:53], 4), unpatchify(padded[:, 1:5, 5:53], 4))
    expected = unpatchify(columns_first + velocity, 4)
    assert torch.equal(to_images(columns_first, 4, velocity=velocity), expected)
    assert torch.equal(to_images(velocity, 4, velocity=columns_first), expected)
    assert torch.equal(to_images(rows, 4, velocity=velocity[:1].expand(2, -1, -1)), unpatchify(rows + velocity[:1], 4))
    assert to_images(rows[:0], 4).shape == (0, 3, 8, 8)


def test_the_rows_are_left_alone_and_bits_repeat():
    rows, velocity = inputs(tokens=1)
    kept = rows.clone()
    results = [to_images(rows, 4, velocity=velocity, dtype=torch.uint8, **NORMALISED) for _ in range(3)]
    results += [to_images(rows, 4, clamp=True) * 0 + results[0]]  # one token: unpatchify is then a view
    assert torch.equal(rows, kept)
    assert all(torch.equal(results[0].float(), result.float()) for result in results)


def test_compiles_whole():
    rows, velocity = inputs()

    def end(rows, velocity):
        return to_images(rows, 4, (8, 12), velocity=velocity, dt=0.5, dtype=torch.uint8, **NORMALISED)

    assert torch.equal(torch.compile(end, fullgraph=True, backend="eager")(rows, velocity), end(rows, velocity))


def test_mean_and_std_are_brought_to_the_device_once(on_all_backends):
    rows, _ = inputs(torch.float64 if on_all_backends == "eager" else torch.float32)
    exact = denormalize(unpatchify(rows.double(), 4, (8, 12)))
    assert torch.allclose(to_images(rows, 4, (8, 12), **NORMALISED).double(), exact, rtol=0, atol=1e-6)
    if on_all_backends == "eager":  # float64 is not rounded on the way
        assert torch.allclose(to_images(rows, 4, (8, 12), **NORMALISED), exact, rtol=0, atol=1e-14)
    made = _per_channel.cache_info().misses
    for _ in range(3):
        to_images(rows, 4, (8, 12), **NORMALISED)
    assert _per_channel.cache_info().misses == made


def test_opcheck(on_all_backends):
    if on_all_backends == "eager":
        pytest.skip("plain PyTorch is not behind the op")
    rows, velocity = inputs()
    for wanted in ((velocity, 0.5, IMAGENET_MEAN, IMAGENET_STD, 4, 8, 12, True, torch.uint8),
                   (None, 1.0, None, None, 4, 8, 12, False, torch.float32)):  # fmt: skip
        torch.library.opcheck(torch.ops.uniflow_kernels.to_images.default, (rows, *wanted))


def test_gradients_take_the_plain_form():
    rows, velocity = (x.double().requires_grad_() for x in inputs(batch=1, tokens=2, columns=12))

    def end(rows, velocity):
        return to_images(rows, 2, (2, 4), velocity=velocity, dt=0.5, **NORMALISED)

    with backend("auto"):
        assert torch.autograd.gradcheck(end, (rows, velocity))
    with backend("triton"), pytest.raises(ValueError, match="to_images: backend 'triton' cannot serve"):
        end(rows, velocity)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: to_images(r[0], 4), ValueError, r"rows: expected \[B, N, C\*4\*4\]"),
        (lambda r: to_images(r, 5), ValueError, r"rows: expected \[B, N, C\*5\*5\]"),
        (lambda r: to_images(r, 0), ValueError, "patch_size: expected a positive number"),
        (lambda r: to_images(r, 4), ValueError, "size: 6 tokens form no square"),
        (lambda r: to_images(r, 4, (8, 8)), ValueError, "size: 8x8 has 4 patches of 4, got 6 tokens"),
        (lambda r: to_images(r, 4, (8, 12), velocity=r[:1]), ValueError, r"velocity: expected shape \(2, 6, 48\)"),
        (lambda r: to_images(r, 4, (8, 12), mean=(0, 0, 0)), ValueError, "mean, std: expected both or neither"),
        (lambda r: to_images(r, 4, (8, 12), mean=(0,), std=(1,)), ValueError, "mean: expected 3 numbers"),
        (lambda r: to_images(r.int(), 4, (8, 12)), TypeError, "rows: expected a floating point dtype"),
        (lambda r: to_images(r, 4, (8, 12), dtype=torch.int8), TypeError, "dtype: expected a floating point dtype or"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    rows, _ = inputs()
    with pytest.raises(error, match=f"^{message}"):
        call(rows)
