import pytest
import torch

from uniflow_kernels import interpolate, patchify, velocity_loss


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 8, 12, generator=generator).to(dtype)
    noise, prediction = (torch.randn(2, 6, 48, generator=generator).to(dtype) for _ in range(2))
    return images, noise, prediction


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_interpolate(within_twice, per_token, dtype):
    images, noise, _ = inputs(dtype)
    t = torch.rand((2, 6) if per_token else (2,), generator=torch.Generator().manual_seed(1))
    s = t[..., None] if per_token else t[:, None, None]
    x1 = patchify(images, 4)
    exact = s.double() * x1.double() + (1 - s.double()) * noise.double()
    out = interpolate(images, t, 4, noise)
    assert out.dtype == dtype
    within_twice(out, (s * x1 + (1 - s) * noise).to(dtype), exact)


def test_ends_of_the_path():
    images, noise, _ = inputs()
    assert torch.equal(interpolate(images, torch.zeros(2), 4, noise), noise)
    assert torch.equal(interpolate(images, torch.ones(2), 4, noise), patchify(images, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient(within_twice, dtype):
    images, noise, prediction = inputs(dtype)
    prediction.requires_grad_()
    loss = velocity_loss(prediction, images, 4, noise)
    assert loss.dtype == torch.float32
    target = patchify(images, 4).double() - noise.double()
    exact = (prediction.double() - target).square().mean()
    within_twice(loss, loss, exact, floor=1e-6)
    (gradient,) = torch.autograd.grad(loss, prediction)
    expected = 2 * (prediction.double() - target) / target.numel()
    within_twice(gradient, expected.to(dtype), expected.detach())


def test_perfect_prediction_costs_nothing():
    images, noise, _ = inputs()
    assert velocity_loss(patchify(images, 4) - noise, images, 4, noise) == 0


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda i, n, v: interpolate(i, torch.zeros(3), 4, n), "t"),
        (lambda i, n, v: interpolate(i, torch.zeros(2), 4, n[:, :5]), "noise"),
        (lambda i, n, v: velocity_loss(v[..., :47], i, 4, n), "velocity"),
        (lambda i, n, v: velocity_loss(v, i, 4, n[:1]), "noise"),
        (lambda i, n, v: velocity_loss(v, i, 5, n), "images"),
    ],
)
def test_wrong_shapes_name_the_argument(call, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(*inputs())
