"""Derivatives of every public op and module beyond one backward pass, against finite differences in float64.

As few-step objectives need them: forward mode, and what is derived from its results.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from tests.conftest import randomize
from uniflow.transformer import TransformerLayer
from uniflow_kernels import (
    FlowHead,
    LayerwiseDistillation,
    attention,
    flow_matching_loss,
    fused_flow_blocks,
    gated_residual_norm,
    interpolate,
    layerwise_distillation,
    modulated_norm,
    patchify,
    residual_norm,
    to_images,
    unpatchify,
    velocity_loss,
)
from uniflow_kernels.ops.velocity import interpolate_op, source_of


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64)


def of_head(**options):
    head = randomize(FlowHead(4, 8, 4, 6, 2, **options)).double()
    return head, (numbers(3, 4), torch.rand(3, dtype=torch.float64), numbers(3, 6))


def sampled(head, condition, noise):
    return head.sample(condition, 2, noise=noise, cfg=1.5)


def of_weights():
    head, inputs = of_head()
    names = ["res_blocks.0.in_ln.weight", "res_blocks.1.mlp.0.weight", "final_layer.adaLN_modulation.1.bias"]
    held = [head.get_parameter(name).detach().clone() for name in names]
    return lambda *given: functional_call(head, dict(zip(names, given, strict=True)), inputs), held


def of_blocks():
    head, _ = of_head(norm="rms", mlp="swiglu")
    return lambda x, y: fused_flow_blocks(x, y, *head.tensors(), norm="rms", mlp="swiglu"), (numbers(3, 8), numbers(8))


def of_layer(**options):
    layer = randomize(TransformerLayer(8, 2, 16, **options)).double()
    return layer, (numbers(1, 5, 8),)


MODULATION = numbers(2, 1, 8)
OPS = {
    "FlowHead": of_head,
    "FlowHead, rms": partial(of_head, norm="rms", mlp="swiglu", recompute="block"),
    "FlowHead's weights": of_weights,
    "FlowHead.sample": lambda: (partial(sampled, of_head()[0]), (numbers(3, 6), numbers(3, 4))),
    "fused_flow_blocks": of_blocks,
    "modulated_norm": lambda: (modulated_norm, (numbers(2, 3, 8), MODULATION, MODULATION.cos())),
    "gated_residual_norm": lambda: (
        lambda x, gate, q: torch.cat(gated_residual_norm(x, gate, q, MODULATION, MODULATION, norm="rms")),
        (numbers(2, 3, 8), MODULATION, numbers(2, 3, 8)),
    ),
    "residual_norm": lambda: (
        lambda x, q, gate: torch.cat(residual_norm(x, q, gate)),
        (numbers(2, 3, 8), numbers(2, 3, 8), numbers(8)),
    ),
    "patchify": lambda: (lambda x: patchify(x, 2).square(), (numbers(1, 3, 4, 4),)),
    "unpatchify": lambda: (lambda x: unpatchify(x, 2).square(), (numbers(1, 4, 12),)),
    "to_images": lambda: (
        lambda x, v: to_images(x, 2, velocity=v, mean=[1, 2, 3], std=[3, 2, 1]).square(),
        (numbers(1, 4, 12), numbers(1, 4, 12)),
    ),
    "attention": lambda: (attention, tuple(numbers(3, 1, 5, 2, 4))),
    "encoder layer": partial(of_layer, layer_scale=0.5),
    "encoder layer, rms": partial(of_layer, norm_type="rms_norm", qk_normalization=True),
}


def weighed(values):
    return (values * torch.linspace(-1, 1, values.numel(), dtype=values.dtype).view_as(values)).sum()


def tangents(function, inputs, directions):
    return jvp(function, inputs, directions)[1]


def by_dual_numbers(function, inputs, directions):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, inputs, directions))).tangent


def in_a_row(function, inputs, directions):
    return vmap(partial(tangents, function, inputs))(tuple(torch.stack([d, d]) for d in directions))[1]


def gradients(function, inputs):
    return torch.cat([g.flatten() for g in grad(lambda *x: weighed(function(*x)), tuple(range(len(inputs))))(*inputs)])


def gradients_by_backward(function, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    value = weighed(function(*inputs))
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, inputs, materialize_grads=True)])


def change(function, inputs, directions, step=1e-5):
    """By finite differences."""
    ahead, behind = ([x + s * step * d for x, d in zip(inputs, directions, strict=True)] for s in (1, -1))
    return (function(*ahead) - function(*behind)) / (2 * step)


def close(found, exact, tolerance=1e-6):
    assert exact.abs().max() > 0
    assert (found - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("op", OPS)
def test_derivatives_of_forward_mode(op):
    torch.manual_seed(0)
    function, inputs = OPS[op]()
    inputs = tuple(inputs)
    along, across = (tuple(numbers(*x.shape) for x in inputs) for _ in range(2))

    exact = change(function, inputs, along)
    for forward in (tangents, by_dual_numbers, in_a_row):
        close(forward(function, inputs, along), exact)

    def of_tangents(*x):
        return tangents(function, x, along)

    close(tangents(of_tangents, inputs, across), change(of_tangents, inputs, across))
    exact = change(lambda *x: weighed(of_tangents(*x)), inputs, across)
    found = gradients_by_backward(of_tangents, inputs)
    close(found @ torch.cat([d.flatten() for d in across]), exact)
    # Hessian times vector, forward over reverse
    close(
        tangents(lambda *x: gradients(function, x), inputs, along),
        change(lambda *x: gradients_by_backward(function, x), inputs, along),
    )


IMAGES, TIMES, NOISE = numbers(2, 3, 4, 4), torch.rand(2, 4, dtype=torch.float64), numbers(2, 4, 12)
WEIGHTS, MASK = torch.rand(2, 4), torch.tensor([[True, False, True, True]] * 2)
HEAD = randomize(FlowHead(12, 8, 12, 6, 1)).double()
STATES, TEACHER = numbers(2, 1, 4, 8), numbers(2, 1, 4, 8)


def streamed(student):
    layers = LayerwiseDistillation(2, skip_tokens=1, detach_weights=False)
    for layer in (1, 2):
        layers.push(layer, student[layer - 1], TEACHER[layer - 1])
    return layers.result()[0]


def plain_velocity_loss(velocity, images):
    error = velocity - (patchify(images, 2) - NOISE)
    return ((error**2).mean(-1) * WEIGHTS)[MASK]


def plain_distillation(student):
    alpha = 1 - F.cosine_similarity(student, TEACHER, dim=-1)[..., 1:].flatten(1).mean(1)
    weights = torch.tensor([1.0, 2.0]) * torch.exp(2 * alpha)
    return (weights / weights.sum() * alpha).sum()


def plain_flow_matching(condition, images):
    times = TIMES[..., None]
    x_t = times * patchify(images, 2) + (1 - times) * NOISE
    velocity = HEAD(x_t.flatten(0, 1), TIMES.flatten(), condition.flatten(0, 1)).view_as(x_t)
    return (velocity - (patchify(images, 2) - NOISE)).square().mean()


# ops whose results are in float32, with what they are in float64
IN_FLOAT32 = {
    "interpolate": (
        lambda x, t, x0: interpolate(x, t, 2, x0, columns=16)[..., :12],
        lambda x, t, x0: torch.lerp(x0, patchify(x, 2), t[..., None]),
        (IMAGES, TIMES, NOISE),
    ),
    "interpolate, seeded": (
        lambda x: interpolate(x, TIMES, 2, seed=3, mean=[1, 2, 3], std=[2, 2, 4]) ** 2,
        lambda x: (
            (
                interpolate(x.detach(), TIMES, 2, seed=3, mean=[1, 2, 3], std=[2, 2, 4])
                + TIMES[..., None] * patchify((x - x.detach()) / torch.tensor([2.0, 2, 4])[:, None, None], 2)
            )
            ** 2
        ),
        (IMAGES,),
    ),
    "velocity_loss": (
        lambda v, x: velocity_loss(v, x, 2, NOISE, weights=WEIGHTS, mask=MASK, reduction="none")[MASK],
        plain_velocity_loss,
        (numbers(2, 4, 12), IMAGES),
    ),
    "layerwise_distillation": (
        lambda s: layerwise_distillation(s, TEACHER, detach_weights=False, skip_tokens=1)[0],
        plain_distillation,
        (STATES,),
    ),
    "LayerwiseDistillation": (streamed, plain_distillation, (STATES,)),
    "flow_matching_loss": (
        lambda c, x: flow_matching_loss(HEAD, c, x, TIMES, 2, NOISE),
        plain_flow_matching,
        (numbers(2, 4, 6), IMAGES),
    ),
}


@pytest.mark.parametrize("op", IN_FLOAT32)
def test_derivatives_of_forward_mode_in_float32(op):
    """Of those torch took zeros, in silence."""
    torch.manual_seed(0)
    function, exact, inputs = IN_FLOAT32[op]
    along = tuple(numbers(*x.shape) for x in inputs)
    expected = tangents(exact, inputs, along)
    for forward in (tangents, by_dual_numbers, in_a_row):
        close(forward(function, inputs, along), expected)
    for derivative in (gradients, gradients_by_backward):
        close(*(derivative(lambda *x, f=f: tangents(f, x, along), inputs) for f in (function, exact)))
    hessian = [tangents(lambda *x, f=f: gradients(f, x), inputs, along) for f in (function, exact)]
    close(*hessian)


def test_what_has_no_such_derivative_raises():
    images, times = IMAGES.float(), torch.rand(2)
    condition = torch.randn(2, 4, 6)
    head = randomize(FlowHead(12, 8, 12, 6, 1))
    with pytest.raises(ValueError, match="chunk_tokens: expected None inside torch"):
        jvp(lambda c: flow_matching_loss(head, c, images, times, 2, seed=1, chunk_tokens=2), (condition,), (condition,))
    source = source_of(images, 2, None, 1, 0, 0, None, None, 1)
    for forward in (tangents, by_dual_numbers):
        with pytest.raises(RuntimeError, match="interpolate: it has no forward-mode derivative"):
            forward(lambda x: interpolate_op(source._replace(images=x), times, 12, x.dtype), (images,), (images,))
    twice = images.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="interpolate: it has no second derivative"):
        torch.autograd.grad(interpolate(twice, times, 2, seed=1).sum(), twice, create_graph=True)
