"""The flow head's blocks with their forward-mode derivative: value and tangent in one pass.

A tangent is the derivative along a direction; None where that is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from uniflow_kernels.choice import choose
from uniflow_kernels.ops.dual_activation import dual_activation
from uniflow_kernels.ops.dual_norm import MAX_WIDTH, Rows, dual_norm
from uniflow_kernels.ops.flow_blocks import Affine, Block, Form, in_order, layer_norm, split_modulation
from uniflow_kernels.ops.flow_choice import is_plain
from uniflow_kernels.torch_private import constant, has_autocast, is_forward_mode, is_transforming
from uniflow_kernels.triton_kernels import why_not_on

# up to so many rows, reading the weights takes longer than putting value and tangent side by side
FEW_ROWS = 32


class Dual(NamedTuple):
    """A value and its tangent."""

    value: Tensor
    tangent: Tensor | None

    def split(self, cut: Callable[[Tensor], Sequence[Tensor]]) -> list[Dual]:
        """Into parts of the last dimension."""
        values = cut(self.value)
        tangents = [None] * len(values) if self.tangent is None else cut(self.tangent)
        return [Dual(value, tangent) for value, tangent in zip(values, tangents, strict=True)]


class Rules(NamedTuple):
    """What each operation does to a tangent.

    Args:
        recorded: whether autograd sees what is done to tangents. Else they have no gradient, and nothing is kept.
    """

    recorded: bool = True

    def _apart(self) -> AbstractContextManager[object]:
        return nullcontext() if self.recorded else torch.no_grad()

    def linear(self, x: Dual, layer: Affine) -> Dual:
        """[..., in] -> [..., out]; few rows in one product, so that the weight is read once."""
        value, tangent = x
        if tangent is None:
            return Dual(F.linear(value, *layer), None)
        one = (self.recorded or not torch.is_grad_enabled()) and value.shape == tangent.shape
        if one and value.numel() <= FEW_ROWS * value.shape[-1]:
            out, along = F.linear(torch.stack([value, tangent]), layer.weight).unbind()
            return Dual(out if layer.bias is None else out + layer.bias, along)
        with self._apart():
            along = F.linear(tangent, layer.weight)
        return Dual(F.linear(value, *layer), along)

    def silu(self, x: Dual) -> Dual:
        """x * s with s = sigmoid(x), and s * (1 + x - x * s) times the tangent."""
        value, tangent = x
        out = F.silu(value)
        if tangent is not None:
            with self._apart():
                tangent = torch.sigmoid(value) * (1 + value - out) * tangent
        return Dual(out, tangent)

    def product(self, x: Dual, y: Dual) -> Dual:
        """x * y; shapes broadcast."""
        with self._apart():
            tangent = None if y.tangent is None else x.value * y.tangent
            if x.tangent is not None:
                tangent = x.tangent * y.value if tangent is None else torch.addcmul(tangent, x.tangent, y.value)
        return Dual(x.value * y.value, tangent)

    def sum(self, x: Dual, y: Dual) -> Dual:
        """x + y; shapes broadcast."""
        with self._apart():
            tangent = x.tangent if y.tangent is None else y.tangent
            if x.tangent is not None and y.tangent is not None:
                tangent = x.tangent + y.tangent
        return Dual(x.value + y.value, tangent)

    def joined(self, x: Dual, gate: Dual, y: Dual) -> Dual:
        """x + gate * y; shapes broadcast."""
        with self._apart():
            tangent = x.tangent
            for left, right in ((gate.value, y.tangent), (gate.tangent, y.value)):
                if left is not None and right is not None:
                    tangent = left * right if tangent is None else torch.addcmul(tangent, left, right)
        return Dual(torch.addcmul(x.value, gate.value, y.value), tangent)

    def norm(self, x: Dual, form: Form, affine: Affine | None) -> Dual:
        """The norm of each row; of n, the rows before weight and bias, the tangent is d - n * mean(n * d), scaled."""
        weight, bias = affine or (None, None)
        value, tangent = x
        layer = form.norm == "layer"
        if layer:
            out = layer_norm(value, weight, bias, form.eps)
        else:
            out = F.rms_norm(value, value.shape[-1:], weight, form.eps)
        if tangent is None:
            return Dual(out, None)
        with self._apart():
            wide = torch.promote_types(value.dtype, torch.float32)
            at, along = value.to(wide), tangent.to(wide)
            if layer:
                at, along = at - at.mean(-1, keepdim=True), along - along.mean(-1, keepdim=True)
            scale = (at.square().mean(-1, keepdim=True) + form.eps).rsqrt()
            normed = at * scale
            along = torch.addcmul(along, normed, (normed * along).mean(-1, keepdim=True), value=-1) * scale
            tangent = (along if weight is None else along * weight).to(out.dtype)
        return Dual(out, tangent)


def flow_blocks_with_tangents(
    x: Dual,
    y: Dual,
    blocks: Sequence[Block],
    modulations: Sequence[Affine],
    final: Affine | None,
    last: Affine,
    form: Form,
    rules: Rules,
) -> Dual:
    """`fused_flow_blocks` of x [M, W] and y [M or 1, W] and the product behind it, with the tangent.

    Args:
        x, y: with their tangents; y's is there.
        blocks: the blocks' tensors; at least one.
        modulations: of as many groups as blocks, or a divisor of their number.
        final: the layer of the last norm's modulation.
        last: the layer behind the last norm.
        form: of the head.
        rules: of tangents.
    """
    every = [tensor for affine in (*in_order(blocks, modulations, final), last) for tensor in affine]
    run = _by_kernels if _chosen(x, y, every) == "triton" else _plain
    return run(x, y, blocks, modulations, final, last, form, rules)


def _plain(
    x: Dual,
    y: Dual,
    blocks: Sequence[Block],
    modulations: Sequence[Affine],
    final: Affine | None,
    last: Affine,
    form: Form,
    rules: Rules,
) -> Dual:
    """The definition, in plain PyTorch."""
    order, a = form.modulation_order, rules.silu(y)
    per_group, thirds = len(blocks) // len(modulations), partial(split_modulation, order=order, parts=3)
    for i, block in enumerate(blocks):
        if i % per_group == 0:
            shift, scale, gate = rules.linear(a, modulations[i // per_group]).split(thirds)
        h = rules.joined(shift, Dual(1 + scale.value, scale.tangent), rules.norm(x, form, block.norm))
        p = rules.linear(h, block.up)
        if form.mlp == "silu":
            p = rules.silu(p)
        else:
            first, second = p.split(partial(torch.chunk, chunks=2, dim=-1))
            p = rules.product(rules.silu(first), second)
        x = rules.joined(x, gate, rules.linear(p, block.down))
    x = rules.norm(x, form, None)
    if final is not None:
        shift, scale = rules.linear(a, final).split(partial(split_modulation, order=order, parts=2))
        x = rules.joined(shift, Dual(1 + scale.value, scale.tangent), x)
    return rules.linear(x, last)


def _by_kernels(
    x: Dual,
    y: Dual,
    blocks: Sequence[Block],
    modulations: Sequence[Affine],
    final: Affine | None,
    last: Affine,
    form: Form,
    rules: Rules,
) -> Dual:
    """One row kernel between two products. Where tangents have gradients the rows of both are one product's."""
    rows, width, hidden = *x.value.shape, blocks[0].down.weight.shape[1]
    apart = not rules.recorded and torch.is_grad_enabled()

    def given(dual: Dual) -> Rows:
        tangent = torch.zeros_like(dual.value) if dual.tangent is None else dual.tangent
        return Rows([dual.value, tangent] if apart else [torch.stack([dual.value, tangent])])

    def linear(given: list[Tensor], layer: Affine) -> Rows:
        if not apart:
            return Rows([F.linear(given[0], layer.weight)], layer.bias)
        return Rows(list(rules.linear(Dual(*given), layer)))  # type: ignore[arg-type]

    def modulation(layer: Affine, parts: int) -> list[Rows]:
        made = linear(a.tensors, layer)
        return [part.expand(rows) for part in made.split(partial(split_modulation, order=order, parts=parts))]

    order, per_group = form.modulation_order, len(blocks) // len(modulations)
    a, now = dual_activation(given(y), width), given(x)
    residual: tuple[Rows, Rows] | None = None
    for i, block in enumerate(blocks):
        if i % per_group == 0:
            shift, scale, next_gate = modulation(modulations[i // per_group], 3)
        now, h = dual_norm(now, residual, (shift, scale), block.norm, form)
        u = dual_activation(linear(h.tensors, block.up), hidden)
        residual = next_gate, linear(u.tensors, block.down)
    parts = [] if final is None else modulation(final, 2)
    _, h = dual_norm(now, residual, (parts[0], parts[1]) if parts else None, None, form)
    (made, *along), bias = linear(h.tensors, last)
    if apart:
        return Dual(made, *along)
    value, tangent = made.unbind()
    return Dual(value if bias is None else value + bias, tangent)


def _chosen(x: Dual, y: Dual, weights: Sequence[Tensor | None]) -> str:
    """The backend."""
    width, dtype = x.value.shape[-1], x.value.dtype
    tensors = [tensor for tensor in (*x, *y, *weights) if tensor is not None]
    if is_plain(x.value.is_cuda):
        return "eager"
    reason = None
    if width > MAX_WIDTH:
        reason = f"they hold a row in one program: up to {MAX_WIDTH} wide, not {width}"
    elif any(type(tensor) not in (Tensor, Parameter) for tensor in tensors):
        reason = "a tensor is of a subclass with rules of its own"
    elif any(tensor.dtype != dtype for tensor in tensors):
        reason = "x, y and the weights are not of one dtype"
    served = _backend(x.value.device, dtype, reason)
    return served if x.value.numel() else "eager"


@constant
def _backend(device: torch.device, dtype: torch.dtype, reason: str | None) -> str:
    if is_transforming() or is_forward_mode():
        reason = "the Triton kernels have no rules for the transforms of torch.func, nor for dual numbers"
    elif has_autocast(device.type) and torch.is_autocast_enabled(device.type):
        reason = "autocast decides the dtype of every operation"
    return choose("flow_tangents", {"triton": why_not_on(device, dtype) or reason})
