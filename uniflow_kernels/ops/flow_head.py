"""The flow head's blocks as one operation: everything between `input_proj` and `final_layer.linear`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from uniflow_kernels.ops.flow_blocks import (
    Affine,
    Block,
    Form,
    FromLayers,
    Given,
    check_choice,
    check_shapes,
    conditions_of,
    flat_rows,
    flow_blocks,
    in_order,
)
from uniflow_kernels.ops.flow_choice import FEW, Call, call_of, choose_path, dtype_of_products, of_products
from uniflow_kernels.ops.flow_fp8 import QuantizedLayers, check_fp8, chunks
from uniflow_kernels.ops.flow_passes import Pass
from uniflow_kernels.ops.fp8_linear import check_precision
from uniflow_kernels.ops.registration import register, wants_gradient
from uniflow_kernels.packing import packed

RECOMPUTE = ("none", "block")


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
    path: str = "auto",
    precision: str | None = None,
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
        recompute: what the backward pass computes again instead of keeping it: "none", or "block": everything but the
            blocks' inputs.
        path: of the kernels, "rows" or "products", where no other may serve, as in tests and benchmarks; by default
            the fastest that can, see `uniflow_kernels.ops.flow_choice`.
        precision: "fp8" for modulations made of 8-bit floats, in inference, see `uniflow_kernels.ops.flow_fp8`; None
            for those of the tensors' dtype.

    Returns:
        [..., W], in x's dtype; under autocast in autocast's.

    Raises:
        ValueError: for an unknown name, or tensors that do not fit together, naming the argument; or if the path, the
            backend or the precision asked for cannot serve.

    Source: see `uniflow_kernels.ops.flow_blocks`.
    """
    form = Form(norm, eps, mlp, modulation_order)
    form.check()
    check_choice("recompute", recompute, RECOMPUTE)
    check_precision(precision)
    check_shapes(x, y, blocks, modulations, final_modulation, form)
    tensors = blocks, modulations, final_modulation
    if precision is not None:
        return run_quantized(x, y, *tensors, form, path)
    path = choose_path(call_of(x, y, *tensors), path)
    return run_flow_blocks(x, y, *tensors, form, recompute, path, fits=True)


def run_flow_blocks(
    x: Tensor,
    y: Tensor,
    blocks: Sequence[Block],
    modulations: Sequence[Affine],
    final_modulation: Affine | None,
    form: Form,
    recompute: str,
    path: str,
    fits: bool = False,
    activated: bool = False,
) -> Tensor:
    """`fused_flow_blocks` on the path that `choose_path` gave.

    Args:
        x, y, blocks, modulations, final_modulation, form, recompute: as there.
        path: "eager", "rows", "products", "few rows"; or "auto" in a graph that is compiled for any number of rows.
        fits: whether the shapes were checked; else they are before a kernel reads what they promise.
        activated: whether y is the condition behind SiLU.
    """
    dtype = dtype_of_products(x)
    x = x.to(dtype)
    a = y if activated else F.silu(y)
    if path == "eager":  # weights in other dtypes are autocast's to cast
        again = recompute == "block" and torch.is_grad_enabled()
        return flow_blocks(x, blocks, FromLayers(a, modulations, final_modulation), form, again)
    if not fits:
        check_shapes(x, y, blocks, modulations, final_modulation, form)
    if torch.is_autocast_enabled(x.device.type):
        a = a.to(dtype)
        blocks, modulations, final_modulation = _cast(blocks, modulations, final_modulation, dtype)
    weights = [tensor for affine in in_order(blocks, modulations, final_modulation) for tensor in affine]
    rows, conditions, repeat = _flatten(x, a)
    how = len(blocks), repeat, *form
    if wants_gradient((x, a, *weights)):
        out = _FlowBlocks.apply(rows, conditions, (*how, _KEEP[recompute], path), *weights)
    else:
        out, _ = flow_blocks_op(rows, conditions, weights, *how, "nothing", path)
    return out.view(x.shape)


def run_quantized(
    x: Tensor,
    y: Tensor,
    blocks: Sequence[Block],
    modulations: Sequence[Affine],
    final_modulation: Affine | None,
    form: Form,
    path: str = "auto",
    quantized: QuantizedLayers | None = None,
) -> Tensor:
    """`fused_flow_blocks` with modulations in fp8, by layers that may have been quantized before; errors as there."""
    every = in_order(blocks, modulations, final_modulation)
    check_fp8(x, y, [tensor for affine in every for tensor in affine])
    quantized = quantized or QuantizedLayers.of(modulations, final_modulation)
    dtype = dtype_of_products(x)
    x, a = x.to(dtype), F.silu(y)
    width, hidden = blocks[0].down.weight.shape
    path = choose_path(
        Call(
            x.device,
            dtype,
            width,
            hidden,
            None if torch.compiler.is_compiling() else math.prod(x.shape[:-1]),
            shared="the modulations are made before",
            tensors=of_products(blocks, (), None),
            inputs=(x,),
        ),
        path,
    )
    if torch.is_autocast_enabled(x.device.type):
        blocks, _, _ = _cast(blocks, (), None, dtype)
        if path == "eager":  # only the kernels take norms of another dtype
            blocks = [
                block._replace(norm=Affine(*(None if t is None else t.to(dtype) for t in block.norm)))  # type: ignore[arg-type]
                for block in blocks
            ]
    weights = [tensor for block in blocks for affine in block for tensor in affine]
    rows, conditions, repeat = _flatten(x, a)
    return fp8_flow_blocks_op(rows, conditions, *quantized, weights, repeat, *form, path).view(x.shape)


class ModulatedBlocks:
    """The blocks for steps whose conditions are all known before the first one: few rows, without gradients.

    The modulations of many steps are one product each, so their weights, three fifths of a block's, are read once and
    not once a step; what runs, and under autocast in which dtype, is decided once.

    Args:
        blocks, modulations, final_modulation, form: as `fused_flow_blocks` takes them, and fitting together.
        like: a tensor of the device and dtype of x.
        rows: R, of one step.
        quantized: the layers of the modulations in fp8, if they are to make them.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        modulations: Sequence[Affine],
        final_modulation: Affine | None,
        form: Form,
        like: Tensor,
        rows: int,
        quantized: QuantizedLayers | None = None,
    ) -> None:
        self.form, self.rows, self.dtype, self.quantized = form, rows, dtype_of_products(like), quantized
        self.per_group = len(blocks) // len(modulations)
        if torch.is_autocast_enabled(like.device.type):
            blocks, modulations, final_modulation = _cast(blocks, modulations, final_modulation, self.dtype)
        self.blocks, self.layers = blocks, [*modulations, *([] if final_modulation is None else [final_modulation])]
        width, hidden = blocks[0].down.weight.shape
        self._call = Call(
            like.device,
            self.dtype,
            width,
            hidden,
            rows,
            shared="the modulations are made before",
            tensors=of_products(blocks, modulations, final_modulation),
        )
        self._paths: dict[int, str] = {}

    def path(self, rows: int) -> str:
        """The path that serves so many rows: those of a step, or half of them where it is not guided."""
        if rows not in self._paths:
            self._paths[rows] = choose_path(self._call._replace(rows=rows))
        return self._paths[rows]

    def modulations(self, y: Tensor) -> list[tuple[Tensor, ...]]:
        """The modulations of S steps.

        Args:
            y: conditions before SiLU, [S, C, W] with C at most R: the last one serves all rows from it on.

        Returns:
            For each step those of the blocks' groups [R, 3W] and of the last norm, if it has one, [R, 2W].
        """
        a = F.silu(y)
        if self.quantized is None:
            a = a.to(self.dtype)
            whole = [F.linear(a, *layer) for layer in self.layers]
        else:
            groups, last = self.quantized.given(a.flatten(0, 1), self.dtype)
            whole = [part.unflatten(0, a.shape[:2]) for part in (*groups, *([] if last is None else [last]))]
        made = []
        for modulation in whole:
            missing = self.rows - modulation.shape[1]
            shared = [modulation[:, -1:].expand(-1, missing, -1)] if missing else []
            made.append((torch.cat([modulation, *shared], 1) if shared else modulation).unbind())
        return list(zip(*made, strict=True))

    def __call__(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """x [R, W] and the modulations of its rows at one step -> [R, W], as `fused_flow_blocks` makes it."""
        path = self.path(len(x))
        if path == "eager":
            groups = len(self.blocks) // self.per_group
            last = modulations[groups] if len(modulations) > groups else None
            return flow_blocks(x, self.blocks, Given(modulations[:groups], last), self.form)
        x = flat_rows(x.to(self.dtype))
        weights = [tensor for block in self.blocks for affine in block for tensor in affine]
        return modulated_flow_blocks_op(x, modulations, weights, self.per_group, *self.form, path)


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
    pairs, depth = _pairs(tensors), len(blocks)
    return (
        [Block(block.norm, *pairs[2 * i : 2 * i + 2]) for i, block in enumerate(blocks)],
        pairs[2 * depth : -1],
        None if final is None else pairs[-1],
    )


def _flatten(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor, int]:
    """x as [R, W], a as [C, W], and how many rows that follow each other share a condition; see `conditions_of`."""
    conditions, repeat = conditions_of(x, a)
    if a.shape[:-1].numel() != conditions:
        a = a.expand(x.shape)
    return flat_rows(x), flat_rows(a), repeat


_KEEP = {"none": "all", "block": "inputs"}  # what the forward pass keeps for the backward pass, see `Pass`


def _pass(
    x: Tensor, a: Tensor, weights: Sequence[Tensor | None], depth: int, repeat: int, form: Form, keep: str
) -> Pass:
    pairs = _pairs(weights)
    blocks = [Block(*pairs[1 + 3 * i : 4 + 3 * i]) for i in range(depth)]
    final = pairs[0] if weights[0] is not None else None
    return Pass(x, blocks, FromLayers(a, pairs[1 + 3 * depth :], final), form, repeat, keep)


def _pairs(tensors: Sequence[Tensor | None]) -> list[Affine]:
    return [Affine(*tensors[i : i + 2]) for i in range(0, len(tensors), 2)]  # type: ignore[arg-type]


def _read(how: tuple[Any, ...], others: int) -> tuple[Any, ...]:
    """The form, `others` more arguments and the path, which the dispatcher leaves out where it is "auto"."""
    return Form(*how[:4]), *(*how[4:], "auto")[: others + 1]


def _flow_blocks(
    x: Tensor, a: Tensor, weights: Sequence[Tensor | None], depth: int, repeat: int, *how: Any
) -> tuple[Tensor, list[Tensor]]:
    form, keep, path = _read(how, 1)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        return _pass(x, a, weights, depth, repeat, form, keep).forward(path)


def _flow_blocks_fake(
    x: Tensor, a: Tensor, weights: Sequence[Tensor | None], depth: int, repeat: int, *how: Any
) -> tuple[Tensor, list[Tensor]]:
    form, keep, _ = _read(how, 1)
    return _pass(x, a, weights, depth, repeat, form, keep).fake()


def _modulated_flow_blocks(
    x: Tensor, modulations: Sequence[Tensor], weights: Sequence[Tensor | None], per_group: int, *how: Any
) -> Tensor:
    form, path = _read(how, 0)
    pairs = _pairs(weights)
    blocks = [Block(*pairs[i : i + 3]) for i in range(0, len(pairs), 3)]
    groups = len(blocks) // per_group
    given = Given(modulations[:groups], modulations[groups] if len(modulations) > groups else None)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        return Pass(x, blocks, given, form).forward(FEW if path == FEW else "rows")[0]


def _fp8_flow_blocks(
    x: Tensor,
    a: Tensor,
    layers: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    weights: Sequence[Tensor | None],
    repeat: int,
    *how: Any,
) -> Tensor:
    """Chunk by chunk, so that the modulations of no more than CHUNK_ROWS rows are held."""
    form, path = _read(how, 0)
    pairs, quantized = _pairs(weights), QuantizedLayers(layers, scale, bias)
    blocks = [Block(*pairs[i : i + 3]) for i in range(0, len(pairs), 3)]
    out = x.new_empty(x.shape)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        made: tuple[slice | None, Given | None] = (None, None)
        for conditions, rows in chunks(len(a), repeat, len(x)):
            if made[0] != conditions:
                made = (None, None)  # their memory is free for the next ones
                made = conditions, quantized.given(a[conditions], x.dtype)
            assert made[1] is not None
            if path == "eager":
                found = _beside(x[rows], blocks, made[1], repeat, form)
            else:
                found = Pass(x[rows], blocks, made[1], form, repeat).forward(FEW if path == FEW else "rows")[0]
            if len(found) == len(x):
                return found
            out[rows] = found
    return out


def _beside(x: Tensor, blocks: Sequence[Block], given: Given, repeat: int, form: Form) -> Tensor:
    """The plain form of rows [R, W] that share modulations [C, ...]: row r has those of (r // repeat) % C."""
    groups = [group.unsqueeze(1) for group in given.groups]
    last = None if given.final is None else given.final.unsqueeze(1)
    grid = x.unflatten(0, (-1, len(groups[0]), repeat))
    return flow_blocks(grid, blocks, Given(groups, last), form).flatten(0, 2)


def _flow_blocks_backward(
    dout: Tensor,
    x: Tensor,
    a: Tensor,
    weights: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    depth: int,
    repeat: int,
    *how: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    form, keep, weight_gradients, path = _read(how, 2)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        this = _pass(x, a, weights, depth, repeat, form, keep)
        return this.backward(dout, this.unflatten(kept), weight_gradients, path)


def _flow_blocks_backward_fake(
    dout: Tensor,
    x: Tensor,
    a: Tensor,
    weights: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    depth: int,
    repeat: int,
    *how: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    _, _, weight_gradients, _ = _read(how, 2)
    like = [torch.empty_like(weight) for weight in weights if weight is not None] if weight_gradients else []
    return x.new_empty(x.shape), a.new_empty(a.shape), like


_FORM = "str norm, float eps, str mlp, str modulation_order"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
flow_blocks_op = register(
    f"flow_blocks(Tensor x, Tensor a, Tensor?[] weights, int depth, SymInt repeat, {_FORM}, str keep, "
    "str path='auto') -> (Tensor, Tensor[])",
    _flow_blocks,
    _flow_blocks_fake,
    tags=_TAGS,
)
flow_blocks_backward_op = register(
    "flow_blocks_backward(Tensor dout, Tensor x, Tensor a, Tensor?[] weights, Tensor[] kept, int depth, SymInt repeat, "
    f"{_FORM}, str keep, bool weight_gradients, str path='auto') -> (Tensor, Tensor, Tensor[])",
    _flow_blocks_backward,
    _flow_blocks_backward_fake,
    tags=_TAGS,
)
modulated_flow_blocks_op = register(
    f"modulated_flow_blocks(Tensor x, Tensor[] modulations, Tensor?[] weights, int per_group, {_FORM}, "
    "str path='auto') -> Tensor",
    _modulated_flow_blocks,
    lambda x, *_: x.new_empty(x.shape),
    tags=_TAGS,
)
fp8_flow_blocks_op = register(
    "fp8_flow_blocks(Tensor x, Tensor a, Tensor layers, Tensor scale, Tensor? bias, Tensor?[] weights, SymInt repeat, "
    f"{_FORM}, str path='auto') -> Tensor",
    _fp8_flow_blocks,
    lambda x, *_: x.new_empty(x.shape),
    tags=_TAGS,
)


class _FlowBlocks(torch.autograd.Function):
    """x [R, W] and a [C, W] to [R, W], through the whole stack of blocks at once.

    Not `register`'s gradient: torch looks for tensors in no list in which one is missing, as weights may be.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, how: tuple[Any, ...], *weights: Tensor | None) -> Tensor:
        out, kept = flow_blocks_op(x, a, weights, *how)
        ctx.save_for_backward(x, a, *weights, *kept)
        ctx.how, ctx.count = how, len(weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, a, *rest = ctx.saved_tensors
        weights, kept = rest[: ctx.count], rest[ctx.count :]
        wanted = any(ctx.needs_input_grad[3:])
        *how, path = ctx.how
        dx, da, found = flow_blocks_backward_op(dout, x, a, weights, kept, *how, wanted, path)
        gradients = iter(found)
        return dx, da, None, *(next(gradients) if wanted and w is not None else None for w in weights)
