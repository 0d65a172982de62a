"""The flow head's blocks in plain PyTorch: adaptive norm, MLP and gated residual, and the last adaptive norm.

This is the definition that the kernels are held to, with the tensors that it is of and what is checked of them.

Source: `SimpleMLPAdaLN` of MAR, which the official release's `flow_head.net` copies, with the variants of its relatives
(DeCo, Ming-UniVision, VibeVoice, SphereAR) as options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from uniflow_kernels.torch_private import is_forward_mode, is_transforming

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
    own: bool = False,
) -> Tensor:
    """One block: x + gate * mlp(norm(x) * (1 + scale) + shift).

    Args:
        x: [..., W].
        modulation: shift, scale and gate side by side in the given order, [..., 3W], broadcastable to x's rows.
        order: one of MODULATION_ORDERS.
        norm: [..., W] -> [..., W].
        mlp: [..., W] -> [..., W].
        own: whether nobody else has what the norm gives; where nothing is recorded it is then written over.
    """
    shift, scale, gate = split_modulation(modulation, order, 3)
    return torch.addcmul(x, gate, mlp(_modulated(norm(x), shift, scale, own)))


def final_norm(
    x: Tensor, modulation: Tensor | None, order: str, norm: Callable[[Tensor], Tensor], own: bool = False
) -> Tensor:
    """What the output's linear layer is given: norm(x) * (1 + scale) + shift, or norm(x) without a modulation.

    Args:
        x: [..., W].
        modulation: shift and scale side by side in the given order, [..., 2W], broadcastable to x's rows; or None.
        order: one of MODULATION_ORDERS.
        norm: [..., W] -> [..., W].
        own: as of `flow_block`.
    """
    if modulation is None:
        return norm(x)
    shift, scale = split_modulation(modulation, order, 2)
    return _modulated(norm(x), shift, scale, own)


def _modulated(normed: Tensor, shift: Tensor, scale: Tensor, own: bool) -> Tensor:
    recorded = torch.is_grad_enabled() or is_transforming() or is_forward_mode() or torch.compiler.is_compiling()
    to = normed if own and not recorded and normed.dtype == shift.dtype else None
    return torch.addcmul(shift, normed, 1 + scale, out=to)


def split_modulation(modulation: Tensor, order: str, parts: int) -> tuple[Tensor, ...]:
    """Shift, scale (and the gate, of three parts), in this order, as views."""
    made = modulation.chunk(parts, -1)
    return made if order == "shift-scale-gate" else (made[1], made[0], *made[2:])


def swiglu(p: Tensor) -> Tensor:
    """[..., 2H] -> [..., H]: SiLU of the first half times the second (Shazeer 2020)."""
    gate, up = p.chunk(2, dim=-1)
    return F.silu(gate) * up


class FromLayers(NamedTuple):
    """Modulations that linear layers make of the conditions, each when it is needed.

    Args:
        a: SiLU(y), [..., W], broadcastable to x's rows.
        groups: for each group of consecutive blocks the layer, [3W, W].
        final: the layer of the last norm, [2W, W], if that has one.
    """

    a: Tensor
    groups: Sequence[Affine]
    final: Affine | None

    def of_group(self, i: int) -> Tensor:
        """Shift, scale and gate of the i-th group, [..., 3W]."""
        return F.linear(self.a, *self.groups[i])

    def of_last_norm(self) -> Tensor | None:
        """Its shift and scale, [..., 2W]."""
        return None if self.final is None else F.linear(self.a, *self.final)


class Given(NamedTuple):
    """Modulations that were made before: each group's [..., 3W], and the last norm's [..., 2W], if that has one."""

    groups: Sequence[Tensor]
    final: Tensor | None

    def of_group(self, i: int) -> Tensor:
        """Shift, scale and gate of the i-th group."""
        return self.groups[i]

    def of_last_norm(self) -> Tensor | None:
        """Its shift and scale."""
        return self.final


def flow_blocks(
    x: Tensor, blocks: Sequence[Block], modulations: FromLayers | Given, form: Form, recompute: bool = False
) -> Tensor:
    """The definition of `fused_flow_blocks` in plain PyTorch, wherever the modulations come from.

    Args:
        x: [..., W].
        blocks: the blocks' tensors; at least one.
        modulations: of as many groups as blocks, or a divisor of their number.
        form: of the head.
        recompute: see `block_after_block`.
    """
    groups = len(modulations.groups)
    per_group = len(blocks) // groups
    made = [partial(modulations.of_group, i) for i in range(groups)]
    each = [partial(_block, form, block, made[i // per_group]) for i, block in enumerate(blocks)]
    x = block_after_block(x, each, made if per_group > 1 else (), recompute)
    return final_norm(x, modulations.of_last_norm(), form.modulation_order, partial(_norm, form), own=True)


def block_after_block(
    x: Tensor,
    blocks: Sequence[Callable[[Tensor, Tensor | None], Tensor]],
    shared: Sequence[Callable[[], Tensor]] = (),
    recompute: bool = False,
) -> Tensor:
    """All blocks, whatever each of them is: the one loop of every plain form.

    Args:
        x: [..., W].
        blocks: each takes x and its group's modulation, which is None where every block has its own, and gives x.
        shared: for each group of consecutive blocks what makes its modulation; called when the group's first block
            needs it, so that no modulation outlives its blocks.
        recompute: whether the backward pass computes each block again instead of keeping what is inside it; not where
            the transforms of torch.func or forward-mode derivatives are at work, which would not be there then.
    """
    recompute = recompute and not (is_transforming() or is_forward_mode())
    per_group = len(blocks) // max(1, len(shared))
    modulation = None
    for i, block in enumerate(blocks):
        if shared and i % per_group == 0:
            modulation = None  # before the next one is made
            modulation = shared[i // per_group]()
        x = checkpoint(block, x, modulation, use_reentrant=False) if recompute else block(x, modulation)
    return x


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's layer norm of [..., W]; written out where forward-mode derivatives are carried along.

    Of those torch's own gives wrong derivatives in a backward pass (pytorch issue 196700).
    """
    if not is_forward_mode():
        return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = exact - exact.mean(-1, keepdim=True)
    normed = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = normed if weight is None else normed * weight
    return (normed if bias is None else normed + bias).to(x.dtype)


def _block(form: Form, block: Block, own: Callable[[], Tensor], x: Tensor, shared: Tensor | None) -> Tensor:
    """One block, with its group's modulation or its own."""

    def mlp(h: Tensor) -> Tensor:
        p = F.linear(h, *block.up)
        del h  # where nothing is recorded nobody else has it, nor p
        p = swiglu(p) if form.mlp == "swiglu" else F.silu(p, inplace=not torch.is_grad_enabled())
        return F.linear(p, *block.down)

    modulation = own() if shared is None else shared
    return flow_block(x, modulation, form.modulation_order, lambda x: _norm(form, x, *block.norm), mlp, own=True)


def _norm(form: Form, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    if form.norm == "layer":
        return layer_norm(x, weight, bias, form.eps)
    return F.rms_norm(x, x.shape[-1:], weight, form.eps)


def check_shapes(
    x: Tensor, y: Tensor, blocks: Sequence[Block], modulations: Sequence[Affine], final: Affine | None, form: Form
) -> None:
    """Raise a ValueError, naming the argument, for tensors that do not fit together."""
    width = x.shape[-1] if x.ndim else 0
    if x.ndim == 0 or not x.dtype.is_floating_point:
        raise ValueError(f"x: expected [..., W] in a floating dtype, got shape {tuple(x.shape)} in {x.dtype}")
    if not y.dtype.is_floating_point:
        raise TypeError(f"y: expected a floating point dtype, got {y.dtype}")
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


def conditions_of(x: Tensor, y: Tensor) -> tuple[int, int]:
    """How many conditions C the rows of x [..., W] have, and how many rows that follow each other share one.

    Row r takes condition (r // repeat) % C, which covers a condition for each leading index, for each trailing one,
    and one for all; where y [..., W] is of any other pattern, each row has one of its own.
    """
    of_x, of_y = x.shape[:-1], (1,) * (x.ndim - y.ndim) + tuple(y.shape[:-1])
    own = [i for i, size in enumerate(of_y) if size != 1]
    first, last = (own[0], own[-1] + 1) if own else (0, 0)
    if any(of_y[i] != of_x[i] for i in range(first, last)):
        first, last = 0, len(of_x)
    return math.prod(of_x[first:last]), math.prod(of_x[last:])


def flat_rows(rows: Tensor) -> Tensor:
    """[..., W] -> [R, W], whose elements follow each other in memory."""
    rows = rows.reshape(-1, rows.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
