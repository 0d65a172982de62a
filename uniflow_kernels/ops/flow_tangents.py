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

from uniflow_kernels.ops.flow_blocks import Affine, Block, Form, layer_norm, split_modulation

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
    a: Dual,
    blocks: Sequence[Block],
    modulations: Sequence[Affine],
    final: Affine | None,
    form: Form,
    rules: Rules,
) -> Dual:
    """`fused_flow_blocks` of x [..., W] and a = SiLU(y) [..., W], broadcastable to x's rows, with the tangent.

    Args:
        x, a: with their tangents.
        blocks: the blocks' tensors.
        modulations: of as many groups as blocks, or a divisor of their number.
        final: the layer of the last norm's modulation.
        form: of the head.
        rules: of tangents.
    """
    order = form.modulation_order
    per_group, thirds = len(blocks) // max(1, len(modulations)), partial(split_modulation, order=order, parts=3)
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
    if final is None:
        return x
    shift, scale = rules.linear(a, final).split(partial(split_modulation, order=order, parts=2))
    return rules.joined(shift, Dual(1 + scale.value, scale.tangent), x)
