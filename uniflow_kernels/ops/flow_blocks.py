"""The flow head's blocks in plain PyTorch: adaptive norm, MLP and gated residual, and the last adaptive norm.

This is the definition that the kernels are held to, with the tensors that it is of and what is checked of them.

Source: `SimpleMLPAdaLN` of MAR, which the official release's `flow_head.net` copies, with the variants of its relatives
(DeCo, Ming-UniVision, VibeVoice, SphereAR) as options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORMS = ("layer", "rms")
MLPS = ("silu", "swiglu")
MODULATION_ORDERS = ("shift-scale-gate", "scale-shift-gate")


class Affine(NamedTuple):
    """A weight with the bias that may go with it: of a linear layer [out, in] and [out], of a norm [W] and [W]."""

    weight: Tensor
    bias: Tensor | None = None


class Block(NamedTuple):
    """The tensors of one flow block of width W and hidden size H.

    `up` is [H, W]; for a SwiGLU MLP [2H, W], the rows of the gate before those that it multiplies. `down` is [W, H].
    """

    norm: Affine
    up: Affine
    down: Affine


class Form(NamedTuple):
    """What kind of head it is."""

    norm: str = "layer"
    eps: float = 1e-6
    mlp: str = "silu"
    modulation_order: str = "shift-scale-gate"

    def check(self) -> None:
        """Raise a ValueError for a name that is not one of those there are."""
        check_choice("norm", self.norm, NORMS)
        check_choice("mlp", self.mlp, MLPS)
        check_choice("modulation_order", self.modulation_order, MODULATION_ORDERS)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ValueError that lists the choices if `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def flow_block(
    x: Tensor,
    modulation: Tensor,
    order: str,
    norm: Callable[[Tensor], Tensor],
    mlp: Callable[[Tensor], Tensor],
) -> Tensor:
    """One block: x + gate * mlp(norm(x) * (1 + scale) + shift).

    Args:
        x: [..., W].
        modulation: shift, scale and gate side by side in the given order, [..., 3W], broadcastable to x's rows.
        order: one of MODULATION_ORDERS.
        norm: [..., W] -> [..., W].
        mlp: [..., W] -> [..., W].
    """
    shift, scale, gate = split_modulation(modulation, order, 3)
    return torch.addcmul(x, gate, mlp(torch.addcmul(shift, norm(x), 1 + scale)))


def final_norm(x: Tensor, modulation: Tensor | None, order: str, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """What the output's linear layer is given: norm(x) * (1 + scale) + shift, or norm(x) without a modulation.

    Args:
        x: [..., W].
        modulation: shift and scale side by side in the given order, [..., 2W], broadcastable to x's rows; or None.
        order: one of MODULATION_ORDERS.
        norm: [..., W] -> [..., W].
    """
    if modulation is None:
        return norm(x)
    shift, scale = split_modulation(modulation, order, 2)
    return torch.addcmul(shift, norm(x), 1 + scale)


def split_modulation(modulation: Tensor, order: str, parts: int) -> tuple[Tensor, ...]:
    """Shift, scale (and the gate, of three parts), in this order, as views."""
    first, second, *gate = modulation.chunk(parts, dim=-1)
    return (first, second, *gate) if order == "shift-scale-gate" else (second, first, *gate)


def swiglu(p: Tensor) -> Tensor:
    """[..., 2H] -> [..., H]: SiLU of the first half times the second (Shazeer 2020)."""
    gate, up = p.chunk(2, dim=-1)
    return F.silu(gate) * up


def flow_blocks(
    x: Tensor,
    a: Tensor,
    blocks: Sequence[Block],
    modulations: Sequence[Affine],
    final_modulation: Affine | None,
    form: Form,
) -> Tensor:
    """The definition of `fused_flow_blocks` in plain PyTorch, behind SiLU: a = SiLU(y)."""
    layers = [*modulations, *([] if final_modulation is None else [final_modulation])]
    # each is made when its first block needs it, and none outlives its blocks
    made = (F.linear(a, *layer) for layer in layers)
    return modulated_blocks(x, made, blocks, len(blocks) // max(1, len(modulations)), form)


def modulated_blocks(
    x: Tensor, modulations: Iterable[Tensor], blocks: Sequence[Block], per_group: int, form: Form
) -> Tensor:
    """`flow_blocks` behind its modulations.

    Args:
        x: [..., W].
        modulations: [..., 3W] for each group of blocks and [..., 2W] for the last norm, if that has one.
        blocks: the blocks' tensors.
        per_group: how many blocks that follow each other share a modulation.
        form: of the head.
    """

    def norm(x: Tensor, affine: Affine | None) -> Tensor:
        weight, bias = affine or (None, None)
        if form.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], weight, bias, form.eps)
        return F.rms_norm(x, x.shape[-1:], weight, form.eps)

    activation = F.silu if form.mlp == "silu" else swiglu
    following = iter(modulations)
    for i, block in enumerate(blocks):
        if i % per_group == 0:
            modulation = next(following)
        x = flow_block(
            x,
            modulation,
            form.modulation_order,
            lambda x, block=block: norm(x, block.norm),  # type: ignore[misc]
            lambda h, block=block: F.linear(activation(F.linear(h, *block.up)), *block.down),  # type: ignore[misc]
        )
    return final_norm(x, next(following, None), form.modulation_order, lambda x: norm(x, None))


def check_shapes(
    x: Tensor, y: Tensor, blocks: Sequence[Block], modulations: Sequence[Affine], final: Affine | None, form: Form
) -> None:
    """Raise a ValueError, naming the argument, for tensors that do not fit together."""
    width = x.shape[-1] if x.ndim else 0
    if x.ndim == 0 or not x.dtype.is_floating_point:
        raise ValueError(f"x: expected [..., W] in a floating dtype, got shape {tuple(x.shape)} in {x.dtype}")
    fits = y.ndim and y.ndim <= x.ndim and y.shape[-1] == width
    rows = x.shape[x.ndim - y.ndim : -1]
    if not fits or any(mine not in (1, theirs) for mine, theirs in zip(y.shape[:-1], rows, strict=True)):
        raise ValueError(f"y: expected [..., {width}], broadcastable to x's {tuple(x.shape)}, got {tuple(y.shape)}")
    if not blocks:
        raise ValueError("blocks: expected at least one")
    if not modulations or len(blocks) % len(modulations):
        raise ValueError(f"modulations: expected a divisor of the {len(blocks)} blocks, got {len(modulations)}")
    hidden = blocks[0].down.weight.shape[-1]
    up = 2 * hidden if form.mlp == "swiglu" else hidden
    for i, block in enumerate(blocks):
        _check_affine(f"blocks[{i}].norm", block.norm, (width,))
        _check_affine(f"blocks[{i}].up", block.up, (up, width))
        _check_affine(f"blocks[{i}].down", block.down, (width, hidden))
    if form.norm == "rms" and any(block.norm.bias is not None for block in blocks):
        raise ValueError("blocks: an rms norm has no bias")
    for i, modulation in enumerate(modulations):
        _check_affine(f"modulations[{i}]", modulation, (3 * width, width))
    if final is not None:
        _check_affine("final_modulation", final, (2 * width, width))


def _check_affine(name: str, affine: Affine, shape: tuple[int, ...]) -> None:
    if affine.weight.shape != shape:
        raise ValueError(f"{name}.weight: expected shape {shape}, got {tuple(affine.weight.shape)}")
    if affine.bias is not None and affine.bias.shape != shape[:1]:
        raise ValueError(f"{name}.bias: expected shape {shape[:1]}, got {tuple(affine.bias.shape)}")


def in_order(
    blocks: Sequence[Block], modulations: Sequence[Affine], final_modulation: Affine | None
) -> list[Affine | tuple[None, None]]:
    """The one order in which the registered ops take the weights."""
    return [final_modulation or (None, None), *(affine for block in blocks for affine in block), *modulations]
