"""The flow head's blocks: adaptive norm, MLP and gated residual, block after block, and the last adaptive norm.

Source: `SimpleMLPAdaLN` of MAR, which the official release's `flow_head.net` copies, with the variants of its relatives
(DeCo, Ming-UniVision, VibeVoice, SphereAR) as options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from uniflow_kernels.choice import choose, requested
from uniflow_kernels.measured import fastest_first, measured
from uniflow_kernels.packing import packed
from uniflow_kernels.torch_private import constant, is_transforming
from uniflow_kernels.triton_kernels import architecture, why_not_on

if TYPE_CHECKING:
    from uniflow_kernels.triton_kernels.flow_head import Rows

NORMS = ("layer", "rms")
MLPS = ("silu", "swiglu")
MODULATION_ORDERS = ("shift-scale-gate", "scale-shift-gate")
RECOMPUTE = ("none", "gate", "block")
PATHS = ("rows", "products")

RUNS = {
    "eager": "plain PyTorch",
    "rows": "Triton row kernels, cuBLAS products",
    "products": "Triton products with the row kernels' work in them",
}
UNMEASURED = "unmeasured on this GPU"


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

    Returns:
        [..., W], in x's dtype; under autocast in autocast's.

    Raises:
        ValueError: for an unknown name, or tensors that do not fit together, naming the argument.

    Source: see the module's head.
    """
    form = Form(norm, eps, mlp, modulation_order)
    form.check()
    check_choice("recompute", recompute, RECOMPUTE)
    _check_shapes(x, y, blocks, modulations, final_modulation, form)
    a = F.silu(y)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, a = x.to(dtype), a.to(dtype)
        blocks, modulations, final_modulation = _cast(blocks, modulations, final_modulation, dtype)
    why_not = _why_not_tensors(x, a, blocks, modulations, final_modulation)
    if served_by(x.device, x.dtype, x.shape[-1], rows_known(x), why_not) == "eager" or x.numel() == 0:
        return flow_blocks(x, a, blocks, modulations, final_modulation, form)
    rows, conditions, repeat = _flatten(x, a)
    weights = [tensor for affine in _in_order(blocks, modulations, final_modulation) for tensor in affine]
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
        why_not = _why_not_tensors(like, like, blocks, modulations, final_modulation)
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
            return modulated_blocks(x, modulations, self.blocks, self.per_group, self.form)
        x = _unit_stride(x.to(self.dtype))
        weights = [tensor for block in self.blocks for affine in block for tensor in affine]
        return torch.ops.uniflow_kernels.modulated_flow_blocks(x, modulations, weights, self.per_group, *self.form)


def why_not_triton(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the Triton kernels cannot serve a head of this width on this device; None where they can."""
    if width > _MAX_WIDTH:
        return f"it holds a row in one program: up to {_MAX_WIDTH} wide, not {width}"
    return why_not_on(device, dtype)


@constant
def served_by(
    device: torch.device, dtype: torch.dtype, width: int, rows: int | None, why_not: str | None = None
) -> str:
    """The backend, "triton" or "eager". A compiled graph keeps the one it was compiled with.

    The choice is made before the registered op and not inside it, so that the plain form stays open to torch.compile,
    torch.func and double backward.

    Args:
        device: of all tensors.
        dtype: of the products.
        width: W.
        rows: R; None where a compiled graph is to serve any number.
        why_not: a further reason against the kernels, known to the caller.
    """
    if is_transforming():
        why_not = "the Triton kernels have no rules for the transforms of torch.func"
    chosen = choose("flow_head", {"triton": why_not_triton(device, dtype, width) or why_not})
    if chosen == "eager" or rows is None or requested() != "auto":
        return chosen
    paths = _fastest_first(architecture(device), dtype, width, rows, torch.is_grad_enabled())
    return "eager" if paths[:1] == ("eager",) else chosen


def rows_known(x: Tensor) -> int | None:
    """R of x [..., W], by which the path is chosen; None where a graph is compiled, to serve any number."""
    return None if torch.compiler.is_compiling() else x.shape[:-1].numel()


def _fastest_first(arch: int, dtype: torch.dtype, width: int, rows: int, training: bool) -> tuple[str, ...]:
    return fastest_first("flow_head", arch, str(dtype).removeprefix("torch."), width, rows, training)


def _why_not_tensors(
    x: Tensor, a: Tensor, blocks: Sequence[Block], modulations: Sequence[Affine], final_modulation: Affine | None
) -> str | None:
    products = [affine for block in blocks for affine in (block.up, block.down)]
    products += [*modulations, *([] if final_modulation is None else [final_modulation])]
    tensors = [x, a, *(tensor for affine in products for tensor in affine if tensor is not None)]
    if any(tensor.dtype != x.dtype for tensor in tensors):
        return "x, y and the weights of the products are not of one dtype"
    if any(type(tensor) not in (Tensor, Parameter) for tensor in tensors):
        return "a tensor is of a subclass with rules of its own"
    return None


_MAX_WIDTH = 4096  # beyond it the backward kernel's row does not fit the registers of 16 warps


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
    return _unit_stride(rows), _unit_stride(conditions), repeat


def _unit_stride(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _check_shapes(
    x: Tensor, y: Tensor, blocks: Sequence[Block], modulations: Sequence[Affine], final: Affine | None, form: Form
) -> None:
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


# What the forward pass keeps for the backward pass. Of a block "all" is the sum that it makes, h, scale, gate, p and q
# (see `_activations`), 6 W a row; "no gate" is without gate and q; "inputs" is the sum alone.
_KEEP = {"none": "all", "gate": "no gate", "block": "inputs"}


def _in_order(
    blocks: Sequence[Block], modulations: Sequence[Affine], final_modulation: Affine | None
) -> list[Affine | tuple[None, None]]:
    """The one order in which the registered ops take the weights."""
    return [final_modulation or (None, None), *(affine for block in blocks for affine in block), *modulations]


# Tests and benchmarks force a path. No context variable: a GPU's backward pass runs in autograd's own thread.
_forced_path: str | None = None


@contextmanager
def forced_path(path: str) -> Iterator[None]:
    """Every pass takes this path inside the block, "rows" or "products"; one that it cannot serve is a ValueError.

    The backward pass of a forward pass inside the block takes it too.
    """
    global _forced_path  # noqa: PLW0603
    check_choice("path", path, PATHS)
    before, _forced_path = _forced_path, path
    try:
        yield
    finally:
        _forced_path = before


def _path(arch: int, dtype: torch.dtype, width: int, rows: int, training: bool) -> str:
    """Which path serves where both can, "rows" or "products": the faster one where it was measured.

    Else, counted in bytes, products win where they reach about 500 TFLOP/s on an H100, which needs its tensor cores
    and enough tiles for all of its processors.

    Args:
        arch: compute capability times ten.
        dtype: of the products.
        width: W.
        rows: R.
        training: whether a backward pass follows, or is this one.
    """
    for path in _fastest_first(arch, dtype, width, rows, training):
        if path in PATHS:
            return path
    counted = arch == 90 and dtype.itemsize == 2 and width >= 256 and rows >= _PRODUCTS_FROM
    return "products" if counted else "rows"


_PRODUCTS_FROM = 4096  # rows


def explain(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    hidden: int,
    why_not: str | None = None,
    why_not_products: str | None = None,
) -> tuple[str, str]:
    """What serves a head by its number of rows, and why: where that was measured, or the reason against the kernels.

    Args:
        device: of all tensors.
        dtype: of the products.
        width: W.
        hidden: H.
        why_not: a further reason against the kernels, known to the caller.
        why_not_products: a further reason against the path "products".
    """
    reason = why_not_triton(device, dtype, width) or why_not
    if reason is not None:
        return RUNS["eager"], f"Triton: {reason}"
    from uniflow_kernels.triton_kernels import flow_products as products

    arch = architecture(device)
    why_not_products = products.why_not(device, dtype, (width, hidden), []) or why_not_products
    known = measured("flow_head", arch, str(dtype).removeprefix("torch."), width)

    def path(rows: int, training: bool) -> str:
        if requested() == "auto" and _fastest_first(arch, dtype, width, rows, training)[:1] == ("eager",):
            return "eager"
        return _path(arch, dtype, width, rows, training) if why_not_products is None else "rows"

    served = ""
    last = None
    for rows in sorted({0, _PRODUCTS_FROM, *(entry.rows for entry in known)}):
        inference, training = RUNS[path(rows, False)], RUNS[path(rows, True)]
        now = inference if inference == training else f"{inference} (training: {training})"
        if now != last:
            served += f"; from {rows} rows {now}" if served else now
            last = now
    if not known:
        return served, UNMEASURED
    return served, f"measured from {known[0].rows} to {known[-1].rows} rows on {known[-1].gpu}"


class _Kept(NamedTuple):
    """What is kept: sums after each block, modulations (their shift replaced by h, if `_Pass.in_place`), h, p, q."""

    sums: list[Tensor]
    modulations: list[Tensor]
    h: list[Tensor]
    p: list[Tensor]
    q: list[Tensor]


class _Activations(NamedTuple):
    """What the backward pass needs of a block, with p the MLP before its activation and q its output."""

    h: Tensor
    scale: Tensor
    gate: Tensor
    p: Tensor
    q: Tensor


class _Pass:
    """One forward or backward pass over x [R, W] and a [C, W], on one of two paths.

    "rows" has row kernels around the library's products; "products" has the row kernels' work in the epilogues of its
    own. Both keep the same, so that each pass chooses for itself, by the number of rows at run time.
    """

    def __init__(
        self,
        x: Tensor,
        a: Tensor,
        weights: Sequence[Tensor | None],
        depth: int,
        repeat: int,
        form: Form,
        keep: str,
    ) -> None:
        self.x, self.a, self.form, self.keep, self.depth = x, a, form, keep, depth
        pairs = [Affine(*weights[i : i + 2]) for i in range(0, len(weights), 2)]  # type: ignore[arg-type]
        self.final = pairs[0] if weights[0] is not None else None
        self.blocks = [Block(*pairs[1 + 3 * i : 4 + 3 * i]) for i in range(depth)]
        self.modulations = pairs[1 + 3 * depth :]
        self.per_group = depth // len(self.modulations)
        self.width = x.shape[1]
        self.repeat = repeat
        # h takes the place of shift, which nobody needs any more, where no other row or block shares it
        self.in_place = a.shape[0] == x.shape[0] and self.per_group == 1

    def split(self, modulation: Tensor) -> list[Tensor]:
        """Shift, scale and, if it is there, gate [C, W], as views."""
        parts = list(modulation.split(self.width, dim=1))
        return parts if self.form.modulation_order == "shift-scale-gate" else [parts[1], parts[0], *parts[2:]]

    def empty(self, rows: int, width: int) -> Tensor:
        return torch.empty(rows, width, dtype=self.x.dtype, device=self.x.device)

    def counts(self) -> list[int]:
        """How many tensors `_Kept` has of each kind."""
        if self.keep == "nothing":
            return [0] * 5
        if self.keep == "inputs":
            return [self.depth, 0, 0, 0, 0]
        groups, last = len(self.modulations), int(self.final is not None)
        h, q = 0 if self.in_place else self.depth, self.depth if self.keep == "all" else 0
        return [self.depth, groups + last, h, self.depth, q]

    def kept_shapes(self) -> list[tuple[int, int]]:
        """The shapes of what is kept, flat."""
        rows, conditions, width = self.x.shape[0], self.a.shape[0], self.width
        _, modulations, h, p, q = self.counts()
        parts = 3 if self.keep == "all" else 2
        last = int(modulations > 0 and self.final is not None)
        return [
            *[(rows, width)] * self.depth * (self.keep != "nothing"),
            *[(conditions, parts * width)] * (modulations - last),
            *[(conditions, 2 * width)] * last,
            *[(rows, width)] * h,
            *[(rows, self.blocks[0].up.weight.shape[0])] * p,
            *[(rows, width)] * q,
        ]

    def unflatten(self, kept: Sequence[Tensor]) -> _Kept:
        """What `forward` kept, by its kind."""
        tensors = iter(kept)
        return _Kept(*([next(tensors) for _ in range(count)] for count in self.counts()))

    def why_not_products(self) -> str | None:
        """Why the path "products" cannot serve; None if it can."""
        from uniflow_kernels.triton_kernels import flow_products as products

        if self.a.shape[0] != self.x.shape[0]:
            return "rows share a condition"
        if self.per_group != 1:
            return "blocks share a modulation"
        every = [self.x, self.a, *(t for affine in self.modulations for t in affine if t is not None)]
        every += [t for block in self.blocks for affine in block for t in affine if t is not None]
        every += [] if self.final is None else [t for t in self.final if t is not None]
        hidden = self.blocks[0].down.weight.shape[1]
        return products.why_not(self.x.device, self.x.dtype, (self.width, hidden), every)

    def path(self) -> str:
        """The path of this pass, "rows" or "products"."""
        arch = architecture(self.x.device)
        training = self.keep != "nothing"
        wanted = _forced_path or _path(arch, self.x.dtype, self.width, self.x.shape[0], training)
        why_not = self.why_not_products() if wanted == "products" else None
        if why_not is not None and _forced_path is not None:
            raise ValueError(f"flow_head: path 'products' cannot serve this input: {why_not}")
        return wanted if why_not is None else "rows"

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """The output [R, W] and what is kept, flat."""
        out, kept = self.forward_by_rows() if self.path() == "rows" else self.forward_by_products()
        return out, [tensor for kind in kept for tensor in kind]

    def forward_by_products(self) -> tuple[Tensor, _Kept]:
        """Three launches a block; shift, scale and gate are written only where they are kept."""
        from uniflow_kernels.triton_kernels import flow_head as kernels
        from uniflow_kernels.triton_kernels import flow_products as products

        rows, width = self.x.shape
        first = self.blocks[0]
        rms, eps, keep = self.form.norm == "rms", self.form.eps, self.keep
        scale_first = self.form.modulation_order == "scale-shift-gate"
        kept = _Kept([], [], [], [], [])
        h, u = self.empty(rows, width), self.empty(rows, first.down.weight.shape[1])
        scale = gate = p = q = None
        x, moments = self.x, products.moments(self.x, rms)
        for i, block in enumerate(self.blocks):
            modulation = self.modulations[i]
            if keep in ("all", "no gate"):
                kept.modulations.append(self.empty(rows, (3 if keep == "all" else 2) * width))
                h, scale, *gates = self.split(kept.modulations[i])  # h where shift would be
                gate = gates[0] if gates else None
                p = self.empty(rows, block.up.weight.shape[0])
                kept.p.append(p)
            if keep == "all":
                q = self.empty(rows, width)
                kept.q.append(q)
            products.modulated(x, moments, self.a, modulation, block.norm, h, scale, scale_first, rms, eps)
            products.up(h, block.up, u, p)
            total = self.empty(rows, width) if i == 0 or keep != "nothing" else x
            gate_affine = self.rows_of(modulation, slice(2 * width, None))
            moments = products.down(x, self.a, gate_affine, u, block.down, total, gate, q, rms)
            x = total
            if keep != "nothing":
                kept.sums.append(x)
        out = self.empty(rows, width)
        if self.final is None:
            which = kernels.Rows(rows, rows, 1)
            kernels.norm_modulate(x, None, (None, None), None, None, out, which, rms, eps)
            return out, kept
        if keep in ("all", "no gate"):
            kept.modulations.append(self.empty(rows, 2 * width))
            shift, scale = self.split(kept.modulations[-1])
            shift.zero_()  # nobody reads it; but what an op returns is the same in every run
        products.modulated(x, moments, self.a, self.final, (None, None), out, scale, scale_first, rms, eps)
        return out, kept

    def forward_by_rows(self) -> tuple[Tensor, _Kept]:
        """Five launches a block."""
        from uniflow_kernels.triton_kernels import flow_head as kernels

        which = kernels.Rows(self.x.shape[0], self.a.shape[0], self.repeat)
        rms, eps, keep = self.form.norm == "rms", self.form.eps, self.keep
        kept = _Kept([], [], [], [], [])
        x, residual = self.x, None
        for i, block in enumerate(self.blocks):
            if i % self.per_group == 0:
                shift, scale, gate, modulation = self.modulate(self.modulations[i // self.per_group])
                if keep in ("all", "no gate"):
                    kept.modulations.append(modulation)
            h = shift if self.in_place else self.empty(*x.shape)
            total = x
            if residual is not None and (i == 1 or keep != "nothing"):
                total = self.empty(*x.shape)
            kernels.norm_modulate(x, residual, block.norm, (shift, scale), total, h, which, rms, eps)
            x = total
            p = F.linear(h, *block.up)
            q = F.linear(kernels.activation(p, block.down.weight.shape[1]), *block.down)
            residual = gate, q
            if i and keep != "nothing":
                kept.sums.append(x)
            if keep in ("all", "no gate"):
                kept.p.append(p)
                if not self.in_place:
                    kept.h.append(h)
            if keep == "all":
                kept.q.append(q)
        last = None
        if self.final is not None:
            modulation = self.made(self.final)
            last = self.split(modulation)[0], self.split(modulation)[1]
            if keep in ("all", "no gate"):
                kept.modulations.append(modulation)
        out = self.empty(*x.shape)
        total = self.empty(*x.shape)
        kernels.norm_modulate(x, residual, (None, None), last, total, out, which, rms, eps)
        if keep != "nothing":
            kept.sums.append(total)
        return out, kept

    def modulate(self, modulation: Affine) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shift, scale and gate [C, W], and the tensor of them that is kept: all three, or shift and scale."""
        if self.keep != "no gate":
            all_three = self.made(modulation)
            shift, scale, gate = self.split(all_three)
            return shift, scale, gate, all_three
        two = F.linear(self.a, *self.rows_of(modulation, slice(None, 2 * self.width)))
        shift, scale = self.split(two)
        return shift, scale, self.gate(modulation), two

    def made(self, modulation: Affine) -> Tensor:
        """All parts of a modulation, [C, 2W or 3W]."""
        return F.linear(self.a, *modulation)

    def gate(self, modulation: Affine) -> Tensor:
        return F.linear(self.a, *self.rows_of(modulation, slice(2 * self.width, None)))

    @staticmethod
    def rows_of(affine: Affine, rows: slice) -> Affine:
        return Affine(affine.weight[rows], None if affine.bias is None else affine.bias[rows])

    def activations(self, i: int, x: Tensor, kept: _Kept, path: str) -> _Activations:
        """Those of block i, whose input is x, kept or computed again."""
        from uniflow_kernels.triton_kernels import flow_head as kernels
        from uniflow_kernels.triton_kernels import flow_products as products

        block, modulation = self.blocks[i], self.modulations[i // self.per_group]
        hidden = block.down.weight.shape[1]
        if self.keep == "inputs" and path == "products":
            rms, scale_first = self.form.norm == "rms", self.form.modulation_order == "scale-shift-gate"
            h, scale, p = self.empty(*x.shape), self.empty(*x.shape), self.empty(len(x), block.up.weight.shape[0])
            u = self.empty(len(x), hidden)
            moments = products.moments(x, rms)
            products.modulated(x, moments, self.a, modulation, block.norm, h, scale, scale_first, rms, self.form.eps)
            products.up(h, block.up, u, p)
            return _Activations(h, scale, self.gate(modulation), p, F.linear(u, *block.down))
        if self.keep == "inputs":
            which = kernels.Rows(self.x.shape[0], self.a.shape[0], self.repeat)
            shift, scale, gate, _ = self.modulate(modulation)
            h = shift if which.conditions == which.rows else self.empty(*x.shape)
            rms = self.form.norm == "rms"
            kernels.norm_modulate(x, None, block.norm, (shift, scale), None, h, which, rms, self.form.eps)
            p = F.linear(h, *block.up)
            return _Activations(h, scale, gate, p, F.linear(kernels.activation(p, hidden), *block.down))
        shift, scale, *gates = self.split(kept.modulations[i // self.per_group])
        h, p = shift if self.in_place else kept.h[i], kept.p[i]
        if self.keep == "all":
            return _Activations(h, scale, gates[0], p, kept.q[i])
        q = F.linear(kernels.activation(p, hidden), *block.down)
        return _Activations(h, scale, self.gate(modulation), p, q)

    def backward(self, dout: Tensor, kept: _Kept, weight_gradients: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients of x [R, W], of a [C, W] and, if wanted, of the weights that are there, in their order."""
        from uniflow_kernels.triton_kernels import flow_head as kernels
        from uniflow_kernels.triton_kernels import flow_products as products

        path = self.path()
        which = kernels.Rows(self.x.shape[0], self.a.shape[0], self.repeat)
        rms, eps = self.form.norm == "rms", self.form.eps
        inputs = [self.x, *kept.sums]
        gradients = _Gradients(self)

        def places(parts: int) -> tuple[Tensor | None, list[Tensor]]:
            """Where the modulations' gradients go row by row: [R, parts * W] and its columns; nowhere if summed."""
            if not which.per_row:
                return None, []
            whole = self.empty(which.rows, parts * self.width)
            return whole, self.split(whole)

        now = self.activations(self.depth - 1, inputs[-2], kept, path)
        dlast, last_places = places(2) if self.final is not None else (None, [])
        dmodulation, columns = places(3)
        last = None
        if self.final is not None:
            kept_last = kept.modulations[-1] if kept.modulations else F.linear(self.a, *self.final)
            last = self.split(kept_last)[1]
        dx, dq, sums = kernels.norm_modulate_backward(
            _unit_stride(dout),
            None,
            inputs[-1],
            (now.gate, now.q),
            (None, None),
            last,
            (last_places[0], last_places[1]) if last_places else None,
            columns[2] if columns else None,
            which,
            rms,
            eps,
        )
        if self.final is not None:
            gradients.modulation(self.final, dlast, sums[:, 2:4], which, weight_gradients)
        for i in reversed(range(self.depth)):
            block = self.blocks[i]
            assert dq is not None
            if path == "products":
                dp, u, dup = products.down_backward(dq, block.down.weight, now.p)
            else:
                dp, u, dup = kernels.activation_backward(dq @ block.down.weight, now.p)
            if weight_gradients:
                gradients.affine(block.down, dq, u, sums[:, 5].sum(0))
                gradients.affine(block.up, dp, now.h, dup)
            dh = torch.mm(dp, block.up.weight, out=columns[0]) if columns else dp @ block.up.weight
            before = self.activations(i - 1, inputs[i - 1], kept, path) if i else None
            dbefore, columns_before = places(3) if i else (None, [])
            dgate = sums[:, 4:5]
            dx, dq, sums = kernels.norm_modulate_backward(
                dh,
                dx,
                inputs[i],
                None if before is None else (before.gate, before.q),
                block.norm,
                now.scale,
                (dh, columns[1]) if columns else None,
                columns_before[2] if columns_before else None,
                which,
                rms,
                eps,
            )
            if weight_gradients:
                gradients.norm(block.norm, sums[:, :2].sum(0))
            modulation = self.modulations[i // self.per_group]
            summed = torch.cat([sums[:, 2:4], dgate], 1)
            last_of_group = i % self.per_group == 0
            gradients.modulation(modulation, dmodulation, summed, which, weight_gradients, last_of_group)
            dmodulation, columns = dbefore, columns_before
            if before is not None:
                now = before
        return dx, gradients.of_a, gradients.in_order() if weight_gradients else []


class _ModulatedPass(_Pass):
    """A forward pass that keeps nothing, by rows; modulations of every row stand where the layers would that make them.

    Of a only the number of rows counts then, so x stands for it.
    """

    def __init__(
        self, x: Tensor, modulations: Sequence[Tensor], weights: Sequence[Tensor | None], per_group: int, form: Form
    ) -> None:
        depth = len(weights) // 6
        groups = [tensor for modulation in modulations[: depth // per_group] for tensor in (modulation, None)]
        last = modulations[depth // per_group] if len(modulations) > depth // per_group else None
        super().__init__(x, x, [last, None, *weights, *groups], depth, 1, form, "nothing")
        self.in_place = False  # the modulations are the caller's

    def made(self, modulation: Affine) -> Tensor:
        return modulation.weight

    def why_not_products(self) -> str:
        return "the modulations are made before"


class _Gradients:
    """Gradients of the weights and of a, which every modulation adds to.

    A weight may be given for several layers: gradients are found by the layer's tuple, not by the tensor.
    """

    def __init__(self, of: _Pass) -> None:
        self.pass_ = of
        self.of_a = torch.zeros_like(of.a, memory_format=torch.contiguous_format)
        self.found: dict[int, Affine] = {}
        self.group: tuple[Tensor, Tensor] | None = None

    def affine(self, affine: Affine, dout: Tensor, given: Tensor, dbias: Tensor) -> None:
        """Of a linear layer with input `given` [R, in]; dout [R, out], and dbias [out] in float32."""
        self.add(affine, dout.t() @ given, dbias)

    def norm(self, norm: Affine, sums: Tensor) -> None:
        """Of a norm; sums [2, W] in float32. Copies, since what an op returns shares no memory."""
        self.add(norm, sums[0].to(norm.weight.dtype, copy=True), sums[1].clone())

    def add(self, affine: Affine, dweight: Tensor, dbias: Tensor) -> None:
        self.found[id(affine)] = Affine(dweight, None if affine.bias is None else dbias.to(affine.bias.dtype))

    def modulation(
        self,
        affine: Affine,
        by_row: Tensor | None,
        sums: Tensor,
        which: Rows,
        weight_gradients: bool,
        last_of_group: bool = True,
    ) -> None:
        """Of the linear layer of a modulation, and its part of a's gradient: one product each for all its parts.

        Args:
            affine: the layer.
            by_row: gradient of its output, row by row, [R, parts * W]; None if `sums` holds it summed.
            sums: of shift, scale (and gate), float32 [C, parts, W]; [1, parts, W] beside `by_row`.
            which: which condition is each row's.
            weight_gradients: whether the layer's are wanted.
            last_of_group: whether no further block shares the layer; until then gradients are only summed.
        """
        pass_ = self.pass_
        if pass_.form.modulation_order == "scale-shift-gate":
            sums = torch.cat([sums[:, 1:2], sums[:, :1], sums[:, 2:]], 1)
        summed = sums.flatten(1)  # [C or 1, parts * W]
        dmodulation = summed.to(pass_.x.dtype) if by_row is None else which.to_conditions(by_row)
        if self.group is not None:
            dmodulation, summed = dmodulation.add_(self.group[0]), summed.add_(self.group[1])
        self.group = None if last_of_group else (dmodulation, summed)
        if last_of_group:
            self.of_a.addmm_(dmodulation, affine.weight)
            if weight_gradients:
                self.affine(affine, dmodulation, pass_.a, summed.sum(0))

    def in_order(self) -> list[Tensor]:
        pass_ = self.pass_
        affines = _in_order(pass_.blocks, pass_.modulations, pass_.final)
        gradients = [self.found[id(affine)] for affine in affines if affine[0] is not None]
        return [tensor for pair in gradients for tensor in pair if tensor is not None]


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
        return _Pass(x, a, weights, depth, repeat, Form(norm, eps, mlp, modulation_order), keep).forward()


def _flow_blocks_fake(
    x: Tensor, a: Tensor, weights: Sequence[Tensor | None], depth: int, repeat: int, *form_and_keep: Any
) -> tuple[Tensor, list[Tensor]]:
    *form, keep = form_and_keep
    this = _Pass(x, a, weights, depth, repeat, Form(*form), keep)
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
        return _ModulatedPass(x, modulations, weights, per_group, Form(norm, eps, mlp, modulation_order)).forward()[0]


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
        this = _Pass(x, a, weights, depth, repeat, Form(norm, eps, mlp, modulation_order), keep)
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
        ctx.how, ctx.count, ctx.forced_path = how, len(weights), _forced_path
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
