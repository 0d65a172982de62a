"""Every op against its definition in float64, on shapes, strides, dtypes and options that hypothesis makes up.

Some of the examples run on the Triton kernels in the interpreter; `make fuzz` tries many of both.
"""

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import randomize
from uniflow_kernels import (
    FlowHead,
    attention,
    backend,
    flow_matching_loss,
    fused_flow_blocks,
    interpolate,
    layerwise_distillation,
    patchify,
    seeded_noise,
    to_images,
    unpatchify,
    velocity_loss,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")


@st.composite
def tensors(draw, *shape, dtype=None, scale=1.0):
    """A tensor of this shape and any strides that a row's neighbours in memory allow, of numbers about `scale`."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(FLOATS)) if dtype is None else dtype
    padding = [draw(st.sampled_from((0, 0, 1, 3))) for _ in shape]
    order = [*draw(st.permutations(range(len(shape) - 1))), len(shape) - 1]
    numbers = torch.randn([shape[i] + padding[i] for i in order], generator=generator) * scale
    numbers = (numbers * 64 + 128).clamp(0, 255) if dtype == torch.uint8 else numbers
    placed = numbers.to(dtype).permute([order.index(i) for i in range(len(shape))])
    cut = placed[tuple(slice(0, size) for size in shape)]
    if shape[0] > 1 and draw(st.booleans()):
        cut = cut[:1].expand(shape)  # a stride of zero
    return cut


@st.composite
def pictures(draw, dtypes=(*FLOATS, torch.uint8)):
    """Images [B, C, H, W] of whole patches, and the patch; pixels may lie apart too."""
    batch, channels, patch = draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    down, across = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shape, dtype = (batch, channels, patch * down, patch * across), draw(st.sampled_from(dtypes))
    if draw(st.booleans()):
        return draw(tensors(*shape, dtype=dtype)), patch
    b, c, h, w = shape
    return draw(tensors(b, h, w, c, dtype=dtype)).permute(0, 3, 1, 2), patch


def on(name):
    """A backend that every example has, or the kernels in the interpreter."""
    return backend("triton" if name == "triton" and INTERPRETED else "eager")


BACKENDS = st.sampled_from(("eager", "eager", "eager", "triton"))


def near(ours: Tensor, exact: Tensor, floor: float = 2e-6, least: float = 1e-30) -> None:
    """Within twice the rounding to its dtype, and the floor for what is computed in float32.

    Both are relative to the largest number, or to `least`, as large as the terms that it is a sum of.
    """
    scale = exact.abs().max().clamp(min=least) if exact.numel() else 1.0
    error = (ours.double() - exact).abs() / scale
    allowed = 2 * (exact.to(ours.dtype).double() - exact).abs().max() / scale + floor if exact.numel() else 0.0
    assert ours.shape == exact.shape
    assert (error <= allowed).all(), f"error {error.max():.3e}, allowed {allowed:.3e}"


def cut(images: Tensor, patch: int) -> Tensor:
    """`patchify` by unfolding; of float64."""
    b, c, h, w = images.shape
    rows = images.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return rows.reshape(b, (h // patch) * (w // patch), c * patch * patch)


@given(pictures((*FLOATS, torch.uint8, torch.float64, torch.int64)), BACKENDS)
def test_patches_there_and_back(made, name):
    images, patch = made
    with on(name):
        rows = patchify(images, patch)
        assert torch.equal(rows, cut(images, patch))
        assert torch.equal(unpatchify(rows, patch, tuple(images.shape[-2:])), images)


@st.composite
def flows(draw):
    """What `interpolate` and `velocity_loss` take of a source, its patches x1 and its noise x0 in float64."""
    images, patch = draw(pictures())
    repeats, channels = draw(st.integers(1, 2)), images.shape[1]
    pixels = images.double() / (255 if images.dtype == torch.uint8 else 1)
    how = {"repeats": repeats}
    if draw(st.booleans()):
        how |= {"mean": [0.1 * c for c in range(channels)], "std": [0.5 + 0.1 * c for c in range(channels)]}
        mean, std = (torch.tensor(how[name], dtype=torch.float64)[:, None, None] for name in ("mean", "std"))
        pixels = (pixels - mean) / std
    x1 = cut(pixels, patch).repeat(repeats, 1, 1)
    if draw(st.booleans()):
        how["noise"] = draw(tensors(*x1.shape)) if len(x1) else x1.float()
        x0 = how["noise"].double()
    else:
        how |= {"seed": draw(st.integers(0, 2**63 - 1)), "offset": draw(st.integers(0, 2**40))}
        how["first_row"] = draw(st.integers(0, 2**40))
        x0 = seeded_noise(
            x1.shape[0] * x1.shape[1], x1.shape[2], **{k: how[k] for k in ("seed", "offset", "first_row")}
        )
        x0 = x0.view(x1.shape).double()
    return images, patch, how, x1, x0, x1.shape[2] + draw(st.integers(0, 5))


@given(flows(), st.data(), BACKENDS)
def test_interpolate(flow, data, name):
    images, patch, how, x1, x0, columns = flow
    dtype = data.draw(st.sampled_from(FLOATS))
    t = torch.rand(x1.shape[:2] if data.draw(st.booleans()) else x1.shape[:1])
    with on(name):
        x_t = interpolate(images, t, patch, **how, columns=columns, dtype=dtype)
    s = t.double().reshape(*t.shape, *(1,) * (3 - t.ndim))
    near(x_t[..., : x1.shape[2]], s * x1 + (1 - s) * x0, 4e-6)
    assert (x_t[..., x1.shape[2] :] == 0).all()


@given(flows(), st.data(), BACKENDS)
def test_velocity_loss(flow, data, name):
    images, patch, how, x1, x0, columns = flow
    rows, length = x1.shape[:2], x1.shape[2]
    velocity = data.draw(tensors(*rows, columns)) if len(x1) else torch.zeros(*rows, columns)
    velocity = velocity.detach().requires_grad_()
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    weights = torch.rand(rows, generator=generator) if data.draw(st.booleans()) else None
    mask = torch.rand(rows, generator=generator) < 0.6 if data.draw(st.booleans()) else None
    reduction, scale = data.draw(st.sampled_from(REDUCTIONS)), 2.0 ** data.draw(st.integers(0, 16))
    with on(name):
        options = {"weights": weights, "mask": mask, "reduction": reduction, "columns": columns}
        loss = velocity_loss(velocity, images, patch, **how, **options)
        (ours,) = torch.autograd.grad((scale * loss).sum(), velocity)
    exact = velocity.detach().double().requires_grad_()
    tokens = (exact[..., :length] - (x1 - x0)).square().mean(-1) * (1 if weights is None else weights.double())
    counted = torch.ones(rows, dtype=torch.bool) if mask is None else mask
    tokens = torch.where(counted, tokens, 0.0)
    expected = {"none": tokens, "sum": tokens.sum(), "mean": tokens.sum() / max(1, int(counted.sum()))}[reduction]
    (gradient,) = torch.autograd.grad((scale * expected).sum(), exact)
    near(loss.detach(), expected.detach(), 1e-5)
    if gradient.abs().max() < torch.finfo(ours.dtype).max if gradient.numel() else True:
        near(ours, gradient, 1e-5)


@given(st.data(), BACKENDS)
def test_layerwise_distillation(data, name):
    layers, shape = data.draw(st.integers(1, 3)), [data.draw(st.integers(1, most)) for most in (3, 6, 40)]
    dtype, skip = data.draw(st.sampled_from(FLOATS)), data.draw(st.integers(0, shape[1] - 1))
    scale = data.draw(st.sampled_from((1e-2, 1.0, 100.0)))
    student = [data.draw(tensors(*shape, dtype=dtype, scale=scale)).detach().requires_grad_() for _ in range(layers)]
    teacher = [data.draw(tensors(*shape, dtype=dtype)) for _ in range(layers)]
    with on(name):
        loss, alpha, weights = layerwise_distillation(student, teacher, skip_tokens=skip)
        ours = torch.autograd.grad(1024 * loss, student)
    exact = [s.detach().double().requires_grad_() for s in student]
    pairs = zip(exact, teacher, strict=True)
    alphas = [1 - F.cosine_similarity(s[:, skip:], t[:, skip:].double(), dim=-1).mean() for s, t in pairs]
    deep = torch.stack([(k + 1) * torch.exp(2 * a.detach()) for k, a in enumerate(alphas)])
    expected = (deep / deep.sum() * torch.stack(alphas)).sum()
    near(loss.detach(), expected.detach(), least=1.0)  # 1 less a cosine
    near(alpha, torch.stack(alphas).detach(), least=1.0)
    near(weights, deep / deep.sum(), 1e-5)
    gradients = torch.autograd.grad(1024 * expected, exact)
    for s, mine, theirs, weight in zip(exact, ours, gradients, deep / deep.sum(), strict=True):
        # of parallel tokens nothing is left but the rounding of what is as large as one over the norm
        term = 1024 * weight / (shape[0] * (shape[1] - skip)) / s.detach()[:, skip:].norm(dim=-1).min()
        near(mine, theirs, 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps, term.item())


@given(st.data(), BACKENDS)
def test_to_images(data, name):
    patch, channels, down, across = (data.draw(st.integers(1, most)) for most in (5, 4, 3, 4))
    rows = data.draw(tensors(data.draw(st.integers(1, 3)), down * across, channels * patch * patch))
    velocity = data.draw(tensors(*rows.shape)) if data.draw(st.booleans()) else None
    mean, std = ([0.4] * channels, [0.3] * channels) if data.draw(st.booleans()) else (None, None)
    dtype, size = data.draw(st.sampled_from((*FLOATS, torch.uint8))), (patch * down, patch * across)
    with on(name):
        images = to_images(rows, patch, size, velocity=velocity, dt=0.25, mean=mean, std=std, clamp=True, dtype=dtype)
    exact = rows.double() + (0 if velocity is None else 0.25 * velocity.double())
    exact = (exact * 0.3 + 0.4 if mean else exact).clamp(0, 1)
    if dtype == torch.uint8:
        off = (cut(images.double(), patch) - 255 * exact).abs()
        assert (off <= 0.5 + 1e-4).all()
    else:
        near(cut(images, patch), exact)


@given(st.integers(0, 12), st.integers(0, 9), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), BACKENDS)
def test_noise_of_any_piece_is_that_of_the_whole(rows, columns, seed, offset, name):
    with on(name):
        whole = seeded_noise(rows, columns, seed, offset)
        for first in range(0, rows, 5):
            piece = seeded_noise(min(5, rows - first), columns, seed, offset, first_row=first)
            assert torch.equal(piece, whole[first : first + 5])
    wider = seeded_noise(rows, 4 * -(-columns // 4), seed, offset)[:, :columns]
    near(whole, wider.double(), 1e-6)


@given(st.data())
def test_attention(data):
    shape = [data.draw(st.integers(1, most)) for most in (2, 9, 3, 16)]
    dtype = data.draw(st.sampled_from(FLOATS))
    q, k, v = (data.draw(tensors(*shape, dtype=dtype)) for _ in range(3))
    scores = torch.einsum("bshd,bthd->bhst", q.double(), k.double()) / shape[-1] ** 0.5
    exact = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v.double())
    near(attention(q, k, v), exact, 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


HEADS = [
    randomize(FlowHead(12, 16, 12, 6, 2, **options))
    for options in ({}, {"norm": "rms", "mlp": "swiglu", "bias": False}, {"modulation_groups": 1})
]


@given(st.data(), st.sampled_from(range(len(HEADS))), BACKENDS)
def test_fused_flow_blocks(data, which, name):
    """Rows in any layout, with conditions of their own or shared ones."""
    head, shape = HEADS[which], (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5)), 16)
    x = data.draw(tensors(*shape, dtype=torch.float32))
    shared = data.draw(st.sampled_from((shape, (1, *shape[1:]), (shape[0], 1, 16), (1, 1, 16))))
    y = data.draw(tensors(*shared, dtype=torch.float32))
    options = {"norm": head.form.norm, "mlp": head.form.mlp, "eps": head.form.eps}
    with on(name), torch.no_grad():
        ours = fused_flow_blocks(x, y, *head.tensors(), **options)
    double = [[double_of(affine) for affine in block] for block in head.tensors()[0]]
    with backend("eager"), torch.no_grad():
        blocks, modulations, final = head.tensors()
        blocks = [type(block)(*pairs) for block, pairs in zip(blocks, double, strict=True)]
        modulations, final = [double_of(affine) for affine in modulations], double_of(final)
        exact = fused_flow_blocks(x.double(), y.double(), blocks, modulations, final, **options)
    near(ours, exact, 2e-5)


def double_of(affine):
    return type(affine)(*(None if tensor is None else tensor.double() for tensor in affine))


@given(flows(), st.data())
def test_flow_matching_loss_in_any_chunks(flow, data):
    """Loss and gradient do not depend on how many tokens are worked on at a time."""
    images, patch, how, x1, _, _ = flow
    how.pop("repeats")
    batch, tokens, length = len(images), x1.shape[1], x1.shape[2]
    if how.get("noise") is not None:
        how["noise"] = how["noise"][:batch]
    torch.manual_seed(0)
    head = randomize(FlowHead(length, 16, length, 6, 1))
    condition = torch.randn(batch, tokens, 6, requires_grad=True)
    t = torch.rand(batch, tokens) if data.draw(st.booleans()) else torch.rand(batch)
    results = []
    for chunk_tokens in (None, data.draw(st.integers(1, 12))):
        loss = flow_matching_loss(head, condition, images, t, patch, **how, chunk_tokens=chunk_tokens)
        results.append([loss.detach(), *torch.autograd.grad(loss, [condition, *head.parameters()])])
    for whole, chunked in zip(*results, strict=True):
        near(chunked, whole.double(), 2e-5)
