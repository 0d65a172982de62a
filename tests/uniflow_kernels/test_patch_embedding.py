"""Patch embedding as a product: against the convolution that it is."""

import pytest
import torch
import torch.nn.functional as F

from uniflow_kernels import backend, patchify
from uniflow_kernels.ops.patch_embedding import embeds_by_product, patch_embedding


def make(dtype=torch.float64, channels=3, patch=4, size=(8, 12)):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, channels, *size), (7, channels, patch, patch), (7,)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def convolution(images, weight, bias):
    return F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "patch", "size"), [(3, 4, (8, 12)), (1, 14, (14, 42)), (5, 3, (9, 3))])
def test_numbers(within_twice, dtype, channels, patch, size):
    given = make(dtype, channels, patch, size)
    found = patch_embedding(*given)
    assert found.dtype == dtype
    within_twice(found, convolution(*given), convolution(*(x.double() for x in given)))
    assert torch.equal(found, patch_embedding(*given))


@pytest.mark.parametrize("biased", [True, False])
def test_gradients(biased):
    given = [x.requires_grad_() for x in make()]
    given = given if biased else given[:2]
    made = [form(*given) if biased else form(*given, None) for form in (patch_embedding, convolution)]
    incoming = torch.randn_like(made[0])
    for ours, theirs in zip(*(torch.autograd.grad(y, given, incoming) for y in made), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_of_patches_that_are_there_the_images_are_not_read():
    images, weight, bias = make()
    expected, patches = patch_embedding(images, weight, bias), patchify(images, 4)
    assert torch.equal(patch_embedding(images.fill_(torch.nan), weight, bias, patches), expected)


def test_strided_and_empty():
    images, weight, bias = make()
    strided = images.contiguous(memory_format=torch.channels_last).flip(0)
    assert torch.equal(
        patch_embedding(strided, weight, bias), patch_embedding(images.flip(0).contiguous(), weight, bias)
    )
    assert patch_embedding(images[:0], weight, bias).shape == (0, 6, 7)


def test_compiled_in_one_graph_for_any_number_of_tokens():
    torch._dynamo.reset()
    compiled = torch.compile(patch_embedding, fullgraph=True, backend="eager", dynamic=True)
    for attempt, size in enumerate(((8, 12), (20, 24))):
        given = make(size=size)
        with torch._dynamo.config.patch(error_on_recompile=attempt > 0):
            torch.testing.assert_close(compiled(*given), convolution(*given), rtol=1e-12, atol=1e-12)


def test_where_it_is_the_faster_form():
    weight = make(torch.float32)[1]
    assert not embeds_by_product(weight)
    assert not embeds_by_product(weight.double())
    assert embeds_by_product(weight.bfloat16())
    assert embeds_by_product(weight.half())
    with torch.autocast("cpu", torch.bfloat16):
        assert embeds_by_product(weight)
    with backend("eager"):
        assert not embeds_by_product(weight.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[0], w, b), r"images: expected shape \[B, 3, H, W\], got \(3, 8, 12\)"),
        (lambda x, w, b: (x[:, :2], w, b), r"images: expected shape \[B, 3, H, W\], got \(2, 2, 8, 12\)"),
        (
            lambda x, w, b: (x[..., :10], w, b),
            r"images: .* multiples of the patch \(4\), got 8x10",
        ),
        (lambda x, w, b: (x, w[..., :3], b), r"weight: expected shape \[D, C, P, P\], got \(7, 3, 4, 3\)"),
        (lambda x, w, b: (x, w, b, patchify(x, 2)), r"patches: expected shape \(2, 6, 48\), .* got \(2, 24, 12\)"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        patch_embedding(*change(*make()))
