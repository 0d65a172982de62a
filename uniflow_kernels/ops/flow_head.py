"""The flow head's blocks as one operation: everything between `input_proj` and `final_layer.linear`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from uniflow_kernels.ops import flow_choice
from uniflow_kernels.ops.flow_blocks import (
    Affine,
    Block,
    Form,
    check_choice,
    check_shapes,
    flow_blocks,
    in_order,
)
from uniflow_kernels.ops.flow_choice import forced_path, rows_known, served_by, why_not_tensors
from uniflow_kernels.ops.flow_passes import ModulatedPass, Pass, unit_stride
from uniflow_kernels.packing import packed

RECOMPUTE = ("none", "gate", "block")


def fused_flow_blocks(
    x: Tensor,
    y: Tensor,
    blocks: Sequence[Block],
    modulations: Sequence[Affine],
    final_modulation: Affine | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    mlp: str = "silu",
    modulation_order: str = "shift-scale-gate",
    recompute: str = "none",
    activated: bool = False,
) -> Tensor:
    """All blocks of a flow head and its last norm: everything between `input_proj` and `final_layer.linear`.

    Args:
        x: [..., W], float32, bfloat16 or float16.
        y: the condition before SiLU, [..., W], broadcastable to x's rows. What several rows share is computed once.
        blocks: the blocks' tensors, the first block's first; at least one.
        modulations: for each group of consecutive blocks the linear layer [3W, W] that makes their shift, scale and
            gate from SiLU(y); as many groups as blocks, or a divisor of their number.
        final_modulation: the linear layer [2W, W] that makes the last shift and scale; None for a plain last norm.
        norm: "layer" or "rms".
        eps: of the norms.
        mlp: "silu" or "swiglu".
        modulation_order: "shift-scale-gate" or "scale-shift-gate": how the modulations lie side by side.
        recompute: what the backward pass computes again instead of keeping it: "none", "gate" (gates and the MLPs'
            outputs) or "block" (everything but the blocks' inputs).
        activated: whether y is the condition behind SiLU.

    Returns:
        [..., W], in x's dtype; under autocast in autocast's.

    Raises:
        ValueError: for an unknown name, or tensors that do not fit together, naming the argument.

    Source: see the module's head.
    """
    form = Form(norm, eps, mlp, modulation_order)
    form.check()
    check_choice("recompute", recompute, RECOMPUTE)
    check_shapes(x, y, blocks, modulations, final_modulation, form)
    a = y if activated else F.silu(y)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, a = x.to(dtype), a.to(dtype)
        blocks, modulations, final_modulation = _cast(blocks, modulations, final_modulation, dtype)
    why_not = why_not_tensors(x, a, blocks, modulations, final_modulation)
    if served_by(x.device, x.dtype, x.shape[-1], rows_known(x), why_not) == "eager" or x.numel() == 0:
        return flow_blocks(x, a, blocks, modulations, final_modulation, form)
    rows, conditions, repeat = _flatten(x, a)
    weights = [tensor for affine in in_order(blocks, modulations, final_modulation) for tensor in affine]
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, a, *weights))
    if trained:
        out = _FlowBlocks.apply(rows, conditions, (len(blocks), repeat, *form, _KEEP[recompute]), *weights)
    else:
        out, _ = torch.ops.uniflow_kernels.flow_blocks(
            rows, conditions, weights, len(blocks), repeat, *form, keep="nothing"
        )
    return out.view(x.shape)


class ModulatedBlocks:
    """The blocks for steps whose conditions are all known before the first one: few rows, without gradients.

    The modulations of many steps are one product each, so their weights, three fifths of a block's, are read once and
    not once a step; what runs, and under autocast in which dtype, is decided once.

    Args:
        blocks, modulations, final_modulation, form: as `fused_flow_blocks` takes them, and fitting together.
        like: a tensor of the device and dtype of x.
        rows: R, of one step.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        modulations: Sequence[Affine],
        final_modulation: Affine | None,
        form: Form,
        like: Tensor,
        rows: int,
    ) -> None:
        self.form, self.rows, self.dtype = form, rows, like.dtype
        self.per_group = len(blocks) // len(modulations)
        if torch.is_autocast_enabled(like.device.type):
            self.dtype = torch.get_autocast_dtype(like.device.type)
            blocks, modulations, final_modulation = _cast(blocks, modulations, final_modulation, self.dtype)
        self.blocks, self.layers = blocks, [*modulations, *([] if final_modulation is None else [final_modulation])]
        like = like.new_empty(0, dtype=self.dtype)
        why_not = why_not_tensors(like, like, blocks, modulations, final_modulation)
        self.fused = served_by(like.device, self.dtype, blocks[0].down.weight.shape[0], rows, why_not) == "triton"

    def modulations(self, y: Tensor) -> list[tuple[Tensor, ...]]:
        """The modulations of S steps.

        Args:
            y: conditions before SiLU, [S, C, W] with C at most R: the last one serves all rows from it on.

        Returns:
            For each step those of the blocks' groups [R, 3W] and of the last norm, if it has one, [R, 2W].
        """
        a = F.silu(y).to(self.dtype)
        made = []
        for layer in self.layers:
            modulation = F.linear(a, *layer)
            if missing := self.rows - modulation.shape[1]:
                modulation = torch.cat([modulation, modulation[:, -1:].expand(-1, missing, -1)], 1)
            made.append(modulation.unbind())
        return list(zip(*made, strict=True))

    def __call__(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """x [R, W] and the modulations of its rows at one step -> [R, W], as `fused_flow_blocks` makes it."""
        if not self.fused:
            groups = len(self.blocks) // self.per_group
            last = modulations[groups] if len(modulations) > groups else None
            return flow_blocks(x, x, self.blocks, modulations[:groups], last, self.form)
        x = unit_stride(x.to(self.dtype))
        weights = [tensor for block in self.blocks for affine in block for tensor in affine]
        return torch.ops.uniflow_kernels.modulated_flow_blocks(x, modulations, weights, self.per_group, *self.form)


def _cast(
    blocks: Sequence[Block], modulations: Sequence[Affine], final: Affine | None, dtype: torch.dtype
) -> tuple[list[Block], list[Affine], Affine | None]:
    """All tensors of products in `dtype`; without gradients they are cast once and kept while no parameter changes."""
    products = [*(affine for block in blocks for affine in (block.up, block.down)), *modulations]
    tensors = [tensor for affine in (*products, final or (None, None)) for tensor in affine]

    def cast(*tensors: Tensor | None) -> list[Tensor | None]:
        return [None if tensor is None else tensor.to(dtype, copy=not torch.is_grad_enabled()) for tensor in tensors]

    if torch.is_grad_enabled():
        tensors = cast(*tensors)
    elif any(tensor is not None and tensor.dtype != dtype for tensor in tensors):
        tensors = packed(("cast", dtype), tensors, cast)
    pairs = [Affine(*tensors[i : i + 2]) for i in range(0, len(tensors), 2)]  # type: ignore[arg-type]
    depth = len(blocks)
    return (
        [Block(block.norm, *pairs[2 * i : 2 * i + 2]) for i, block in enumerate(blocks)],
        pairs[2 * depth : -1],
        None if final is None else pairs[-1],
    )


def _flatten(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor, int]:
    """x as [R, W] and a as [C, W], and how many rows that follow each other share a condition.

    Row r takes condition (r // repeat) % C, which covers a condition for each leading index, for each trailing one,
    and one for all; a of any other pattern is expanded to all rows.
    """
    of_x, of_a = x.shape[:-1], (1,) * (x.ndim - a.ndim) + tuple(a.shape[:-1])
    own = [i for i, size in enumerate(of_a) if size != 1]
    first, last = (own[0], own[-1] + 1) if own else (0, 0)
    if any(of_a[i] != of_x[i] for i in range(first, last)):
        a, first, last = a.expand(x.shape), 0, len(of_x)
    repeat = math.prod(of_x[last:])
    rows, conditions = x.reshape(-1, x.shape[-1]), a.reshape(-1, a.shape[-1])
    return unit_stride(rows), unit_stride(conditions), repeat


# What the forward pass keeps for the backward pass. Of a block "all" is the sum that it makes, h, scale, gate, p and q
# (see `_activations`), 6 W a row; "no gate" is without gate and q; "inputs" is the sum alone.
_KEEP = {"none": "all", "gate": "no gate", "block": "inputs"}


def _flow_blocks(
    x: Tensor,
    a: Tensor,
    weights: Sequence[Tensor | None],
    depth: int,
    repeat: int,
    norm: str,
    eps: float,
    mlp: str,
    modulation_order: str,
    keep: str,
) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        return Pass(x, a, weights, depth, repeat, Form(norm, eps, mlp, modulation_order), keep).forward()


def _flow_blocks_fake(
    x: Tensor, a: Tensor, weights: Sequence[Tensor | None], depth: int, repeat: int, *form_and_keep: Any
) -> tuple[Tensor, list[Tensor]]:
    *form, keep = form_and_keep
    this = Pass(x, a, weights, depth, repeat, Form(*form), keep)
    return this.empty(*x.shape), [this.empty(*shape) for shape in this.kept_shapes()]


def _modulated_flow_blocks(
    x: Tensor,
    modulations: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    per_group: int,
    norm: str,
    eps: float,
    mlp: str,
    modulation_order: str,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        return ModulatedPass(x, modulations, weights, per_group, Form(norm, eps, mlp, modulation_order)).forward()[0]


def _flow_blocks_backward(
    dout: Tensor,
    x: Tensor,
    a: Tensor,
    weights: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    depth: int,
    repeat: int,
    norm: str,
    eps: float,
    mlp: str,
    modulation_order: str,
    keep: str,
    weight_gradients: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        this = Pass(x, a, weights, depth, repeat, Form(norm, eps, mlp, modulation_order), keep)
        return this.backward(dout, this.unflatten(kept), weight_gradients)


def _flow_blocks_backward_fake(
    dout: Tensor,
    x: Tensor,
    a: Tensor,
    weights: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    depth: int,
    repeat: int,
    norm: str,
    eps: float,
    mlp: str,
    modulation_order: str,
    keep: str,
    weight_gradients: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    like = [torch.empty_like(weight) for weight in weights if weight is not None] if weight_gradients else []
    return x.new_empty(x.shape), a.new_empty(a.shape), like


_FORM = "str norm, float eps, str mlp, str modulation_order"
_library = torch.library.Library("uniflow_kernels", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    f"flow_blocks(Tensor x, Tensor a, Tensor?[] weights, int depth, SymInt repeat, {_FORM}, str keep) -> "
    "(Tensor, Tensor[])",
    tags=_tags,
)
_library.define(
    f"modulated_flow_blocks(Tensor x, Tensor[] modulations, Tensor?[] weights, int per_group, {_FORM}) -> Tensor",
    tags=_tags,
)
_library.define(
    "flow_blocks_backward(Tensor dout, Tensor x, Tensor a, Tensor?[] weights, Tensor[] kept, int depth, SymInt repeat, "
    f"{_FORM}, str keep, bool weight_gradients) -> (Tensor, Tensor, Tensor[])",
    tags=_tags,
)
for _device in ("CPU", "CUDA"):
    _library.impl("flow_blocks", _flow_blocks, _device)
    _library.impl("modulated_flow_blocks", _modulated_flow_blocks, _device)
    _library.impl("flow_blocks_backward", _flow_blocks_backward, _device)
torch.library.register_fake("uniflow_kernels::flow_blocks", _flow_blocks_fake, lib=_library)
torch.library.register_fake("uniflow_kernels::modulated_flow_blocks", lambda x, *_: x.new_empty(x.shape), lib=_library)
torch.library.register_fake("uniflow_kernels::flow_blocks_backward", _flow_blocks_backward_fake, lib=_library)


class _FlowBlocks(torch.autograd.Function):
    """x [R, W] and a [C, W] to [R, W], through the whole stack of blocks at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, how: tuple[Any, ...], *weights: Tensor | None) -> Tensor:
        out, kept = torch.ops.uniflow_kernels.flow_blocks(x, a, weights, *how)
        ctx.save_for_backward(x, a, *weights, *kept)
        ctx.how, ctx.count, ctx.forced_path = how, len(weights), flow_choice._forced_path
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, a, *rest = ctx.saved_tensors
        weights, kept = rest[: ctx.count], rest[ctx.count :]
        wanted = any(ctx.needs_input_grad[3:])
        with nullcontext() if ctx.forced_path is None else forced_path(ctx.forced_path):
            dx, da, found = torch.ops.uniflow_kernels.flow_blocks_backward(dout, x, a, weights, kept, *ctx.how, wanted)
        gradients = iter(found)
        return dx, da, None, *(next(gradients) if wanted and w is not None else None for w in weights)
