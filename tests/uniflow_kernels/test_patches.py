import pytest
import torch

from uniflow_kernels import patchify, unpatchify


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
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


def test_gradient():
    images = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpatchify(patchify(x, 2).sin(), 2), images)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patchify(torch.zeros(3, 8, 8), 4), r"images: expected 4 dimensions .* \(3, 8, 8\)"),
        (lambda: patchify(torch.zeros(1, 3, 8, 9), 4), r"images: .* multiples of the patch \(4\), got 8x9"),
        (lambda: unpatchify(torch.zeros(1, 4, 47), 4), r"rows: expected \[B, N, C\*4\*4\]"),
        (lambda: unpatchify(torch.zeros(1, 5, 48), 4), "size: 5 tokens form no square"),
        (lambda: unpatchify(torch.zeros(1, 4, 48), 4, (8, 12)), "size: 8x12 has 6 patches of 4, got 4 tokens"),
        (lambda: unpatchify(torch.zeros(1, 4, 48), 4, (8, 9)), "size: expected positive multiples"),
    ],
)
def test_wrong_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
