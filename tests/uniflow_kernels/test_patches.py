import pytest
import torch

from uniflow_kernels import backend, patchify, unpatchify
from uniflow_kernels.ops.patches import patchify_op, unpatchify_op

pytestmark = pytest.mark.usefixtures("on_all_backends")


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.float64, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_is_channel_row_column(dtype):
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).to(dtype)
    rows = patchify(images, 2)
    assert rows.shape == (2, 6, 12)
    assert rows.dtype == dtype
    for b in range(2):
        for n in range(6):
            top, left = 2 * (n // 3), 2 * (n % 3)
            expected = [images[b, c, top + i, left + j] for c in range(3) for i in range(2) for j in range(2)]
            assert torch.equal(rows[b, n], torch.stack(expected))


@pytest.mark.parametrize("size", [(14, 14), (28, 42), (70, 14)])
def test_back_and_forth(size):
    images = torch.randn(3, 3, *size)
    assert torch.equal(unpatchify(patchify(images, 14), 14, size), images)


def test_square_without_a_size_and_strided():
    images = torch.randn(2, 8, 8, 3).permute(0, 3, 1, 2)
    assert torch.equal(unpatchify(patchify(images, 4), 4), images)
    assert patchify(images[:0], 4).shape == (0, 4, 48)


@pytest.mark.parametrize("patch", [1, 3, 7])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_strides_on_both_sides(patch, channels):
    """Images with channels last, cut out of larger ones, broadcast; rows that are padded, transposed or broadcast."""
    generator = torch.Generator().manual_seed(0)
    grid = (2 * patch, 3 * patch)
    base = torch.randn(2, channels, grid[0] + 2, grid[1] + 3, generator=generator)
    cut = base[:, :, 1 : grid[0] + 1, 2 : grid[1] + 2]
    same = cut[:1, :, :, :1].expand(2, channels, *grid)
    for images in (cut, cut.contiguous(memory_format=torch.channels_last), cut.flip(2).transpose(0, 1), same):
        with backend("eager"):
            expected = patchify(images.contiguous(), patch)
        rows = patchify(images, patch)
        assert torch.equal(rows, expected)
        padded = torch.cat([rows, rows], -1)[..., : rows.shape[-1]]
        turned = rows.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        for given in (padded, turned):
            assert torch.equal(unpatchify(given, patch, grid), images)
    rows = torch.randn(1, 1, channels * patch * patch, generator=generator).expand(2, 6, -1)
    with backend("eager"):
        expected = unpatchify(rows.contiguous(), patch, grid)
    assert torch.equal(unpatchify(rows, patch, grid), expected)


def test_gradient():
    images = torch.randn(1, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpatchify(patchify(x, 2).sin(), 2, (2, 4)), images)
    few = images[:, :1, :2, :2].detach().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: unpatchify(patchify(x, 2).sin(), 2), few)


def test_each_is_the_gradient_of_the_other():
    images, rows = torch.randn(2, 3, 8, 12, requires_grad=True), torch.randn(2, 6, 48, requires_grad=True)
    incoming = torch.randn_like(rows)
    assert torch.equal(torch.autograd.grad(patchify(images, 4), images, incoming)[0], unpatchify(incoming, 4, (8, 12)))
    incoming = torch.randn_like(images)
    (gradient,) = torch.autograd.grad(unpatchify(rows, 4, (8, 12)), rows, incoming)
    assert torch.equal(gradient, patchify(incoming, 4))
    ones = torch.autograd.grad(patchify(images, 4).sum(), images)[0]  # which comes in with strides of zero
    assert torch.equal(ones, torch.ones_like(images))


def test_registered_ops_are_sound():
    images, rows = torch.randn(2, 3, 8, 12, requires_grad=True), torch.randn(2, 6, 48, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.uniflow_kernels.patchify, (images, 4), test_utils=tests)
    torch.library.opcheck(torch.ops.uniflow_kernels.unpatchify, (rows, 4, 2, 3), test_utils=tests)
    assert torch.equal(patchify_op(images, 4), patchify(images, 4))
    assert torch.equal(unpatchify_op(rows, 4, 2, 3), unpatchify(rows, 4, (8, 12)))


def test_compiles_whole_and_once():
    def step(images, height):
        rows = patchify(images, 4)
        return unpatchify(rows.square(), 4, (height, 12))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for attempt, (batch, height) in enumerate(((2, 8), (3, 12), (5, 20))):
        images = torch.randn(batch, 3, height, 12, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=attempt > 0):
            out = compiled(images, height)
        gradients = torch.autograd.grad(out.sum(), images)
        assert torch.equal(out, images.square())
        assert torch.equal(gradients[0], 2 * images)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patchify(torch.zeros(3, 8, 8), 4), r"images: expected 4 dimensions .* \(3, 8, 8\)"),
        (lambda: patchify(torch.zeros(1, 3, 8, 9), 4), r"images: .* multiples of the patch \(4\), got 8x9"),
        (lambda: patchify(torch.zeros(1, 3, 8, 8), 0), "patch_size: expected a positive number of pixels, got 0"),
        (lambda: unpatchify(torch.zeros(1, 4, 48), 0), "patch_size: expected a positive number of pixels, got 0"),
        (lambda: unpatchify(torch.zeros(1, 4, 47), 4), r"rows: expected \[B, N, C\*4\*4\]"),
        (lambda: unpatchify(torch.zeros(1, 5, 48), 4), "size: 5 tokens form no square"),
        (lambda: unpatchify(torch.zeros(1, 4, 48), 4, (8, 12)), "size: 8x12 has 6 patches of 4, got 4 tokens"),
        (lambda: unpatchify(torch.zeros(1, 4, 48), 4, (8, 9)), "size: expected positive multiples"),
    ],
)
def test_wrong_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
