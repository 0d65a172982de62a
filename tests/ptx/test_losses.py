"""Every kernel of the losses as it is compiled, by Triton or as CUDA C++: forward and backward, the 2x rule."""

import pytest
import torch
from torch import Tensor

from tests.ptx.session import unwritten_is_nan
from uniflow_kernels import (
    backend,
    interpolate,
    layerwise_distillation,
    patchify,
    seeded_noise,
    to_images,
    unpatchify,
    velocity_loss,
)

BATCH, ACROSS, DOWN, PATCH = 2, 5, 3, 6  # 15 tokens of 108 columns: both end inside a tile
NORMALISED = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


@pytest.fixture(autouse=True)
def compiled():
    with unwritten_is_nan(), backend("triton"):
        yield


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, noise, velocity, t."""
    length = 3 * PATCH**2
    images = torch.randn(BATCH, 3, DOWN * PATCH, ACROSS * PATCH).to(dtype)
    noise, velocity = torch.randn(2, BATCH, DOWN * ACROSS, length).to(dtype)
    return images, noise, velocity, torch.rand(BATCH, DOWN * ACROSS)


def made(seed: int, offset: int = 0) -> Tensor:
    with backend("eager"):
        return seeded_noise(BATCH * DOWN * ACROSS, 3 * PATCH**2, seed, offset).view(BATCH, DOWN * ACROSS, -1)


@pytest.mark.parametrize(("dtype", "seeded"), [(torch.float32, False), (torch.bfloat16, True)])
def test_interpolate(within_twice, dtype, seeded):
    images, noise, _, t = inputs(dtype)
    how = {"seed": 5} if seeded else {"noise": noise}
    ours = interpolate(images, t, PATCH, **how, **NORMALISED)
    noise = made(5) if seeded else noise
    results = []
    for precision in (torch.float32, torch.float64):
        with backend("eager"):
            x1 = patchify(images.to(precision), PATCH)
        by_channel = x1.unflatten(-1, (3, -1))
        mean, std = (torch.tensor(NORMALISED[name]).to(precision)[:, None] for name in ("mean", "std"))
        x1 = ((by_channel - mean) / std).flatten(-2)
        s = t.to(precision)[..., None]
        results.append(s * x1 + (1 - s) * noise.to(precision))
    within_twice(ours, results[0].to(dtype), results[1])


@pytest.mark.parametrize(("dtype", "seeded"), [(torch.float32, False), (torch.bfloat16, True)])
def test_velocity_loss(within_twice, dtype, seeded):
    images, noise, velocity, _ = inputs(dtype)
    how = {"seed": 7} if seeded else {"noise": noise}
    mask = torch.rand(BATCH, DOWN * ACROSS) < 0.7
    velocity.requires_grad_()
    ours = velocity_loss(velocity, images, PATCH, **how, mask=mask)
    (gradient,) = torch.autograd.grad(0.3 * ours, velocity)  # a factor that is not 1 is multiplied in by a kernel
    with backend("eager"):
        target = patchify(images.double(), PATCH) - (made(7) if seeded else noise).double()
    leaf = velocity.detach().double().requires_grad_()
    exact = ((leaf - target).square().mean(-1) * mask).sum() / mask.sum()
    (expected,) = torch.autograd.grad(0.3 * exact, leaf)
    within_twice(ours, ours, exact.detach())
    within_twice(gradient, expected.to(dtype), expected, floor=2**-8 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 72), (torch.bfloat16, 70)])
def test_distillation(within_twice, dtype, width):
    student, teacher = torch.randn(2, 3, 2, 7, width).to(dtype)
    leaf = student.clone().requires_grad_()
    ours, alpha, _ = layerwise_distillation(list(leaf), list(teacher), skip_tokens=1)
    (gradient,) = torch.autograd.grad(0.3 * ours, leaf)
    results = []
    for precision in (dtype, torch.float64):
        again = student.to(precision).requires_grad_()
        with backend("eager"):
            value, plain, _ = layerwise_distillation(list(again), list(teacher.to(precision)), skip_tokens=1)
            results.append((value.detach(), plain, *torch.autograd.grad(0.3 * value, again)))
    # float16 and bfloat16: what was stored is rounded once more by the factor
    floor = 2**-8 if dtype == torch.bfloat16 else 1e-6
    for mine, (plain, exact) in zip((ours.detach(), alpha, gradient), zip(*results, strict=True), strict=True):
        within_twice(mine, plain, exact.double(), floor=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_patches_there_and_back(dtype):
    images = (torch.rand(BATCH, 3, DOWN * PATCH, ACROSS * PATCH) * 255).to(dtype)
    rows = patchify(images, PATCH)
    with backend("eager"):
        assert torch.equal(rows, patchify(images, PATCH))
    assert torch.equal(unpatchify(rows, PATCH, images.shape[-2:]), images)


def test_seeded_noise(request):
    if request.config.getoption("--emulate").startswith("csrc"):
        pytest.skip("the CUDA part has no such kernel")
    for rows, columns, seed in ((17, 108, 3), (5, 37, 2**40)):
        with backend("eager"):
            expected = seeded_noise(rows, columns, seed)
        torch.testing.assert_close(seeded_noise(rows, columns, seed), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_to_images(dtype):
    _, rows, velocity, _ = inputs(torch.bfloat16)
    how = {"velocity": velocity, "dt": 0.3, "dtype": dtype, "clamp": True, **NORMALISED}
    size = (DOWN * PATCH, ACROSS * PATCH)
    ours = to_images(rows, PATCH, size, **how)
    with backend("eager"):
        expected = to_images(rows, PATCH, size, **how)
    assert torch.equal(ours, expected) if dtype == torch.uint8 else torch.allclose(ours, expected, atol=1e-6)
