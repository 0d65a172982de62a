"""Which path serves a call of the flow head, by what was measured; where nothing was, by a count.

On a GPU four can: plain PyTorch ("eager"), row kernels around the library's products ("rows"), and products that do
the row kernels' work ("products"), or those in tiles of which a multiprocessor holds two ("small products"). What was
measured stands in measured.json, which `python -m benchmarks choices` makes. On a CPU plain PyTorch can, and for few
rows without gradients the compiled part ("few rows").
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from uniflow_kernels import cpu_kernels
from uniflow_kernels.choice import choose, is_in_graph, requested
from uniflow_kernels.ops.flow_blocks import Affine, Block, check_choice, conditions_of, flat_rows, in_order
from uniflow_kernels.ops.registration import wants_gradient
from uniflow_kernels.torch_private import (
    constant,
    has_autocast,
    is_dispatch_watched,
    is_forward_mode,
    is_transforming,
)
from uniflow_kernels.triton_kernels import architecture, why_not_on

PATHS = ("eager", "rows", "products", "small products")
KERNELS = PATHS[1:]
SMALL = PATHS[3:]
FEW = "few rows"

RUNS = {
    "eager": "plain PyTorch",
    "rows": "Triton row kernels, cuBLAS products",
    "products": "Triton products with the row kernels' work in them",
    "small products": "such Triton products, two blocks a multiprocessor",
    FEW: "the CPU part",
    "oneDNN": "products by oneDNN, activations in them",
}
UNMEASURED = "unmeasured on this GPU"
FILE = "measured.json"

MAX_WIDTH = 4096  # beyond it the backward kernel's row does not fit the registers of 16 warps
_PRODUCTS_FROM = 4096  # rows


class Call(NamedTuple):
    """The facts of a call by which its path is chosen.

    Args:
        device: of all tensors.
        dtype: of the products.
        width: W.
        hidden: H.
        rows: R; None in a graph that is compiled for any number of them.
        training: whether a backward pass follows, or is this one.
        shared: what rows or blocks share that the products cannot; None if nothing.
        why_not: a further reason against the kernels, known to the caller.
        tensors: the weights and biases of all products; inside the op x and the conditions too.
        inputs: x and y as they were given.
    """

    device: torch.device
    dtype: torch.dtype
    width: int
    hidden: int
    rows: int | None
    training: bool = False
    shared: str | None = None
    why_not: str | None = None
    tensors: Sequence[Tensor] = ()
    inputs: Sequence[Tensor] = ()


def call_of(x: Tensor, y: Tensor, blocks: Sequence[Block], modulations: Sequence[Affine], final: Affine | None) -> Call:
    """The facts of a call with these tensors, as `fused_flow_blocks` takes them."""
    compiling = torch.compiler.is_compiling()
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]  # torch.Size.numel would fix the sizes of an exported program
    every = (tensor for affine in in_order(blocks, modulations, final) for tensor in affine)
    return Call(
        x.device,
        dtype_of_products(x),
        width,
        blocks[0].down.weight.shape[1],
        None if compiling and x.numel() else rows,
        torch.is_grad_enabled() and wants_gradient((x, y, *every)),
        None if compiling else what_is_shared(conditions_of(x, y)[0], rows, len(modulations), len(blocks)),
        tensors=of_products(blocks, modulations, final),
        inputs=(x, y),
    )


def dtype_of_products(x: Tensor) -> torch.dtype:
    """Autocast's, where it is on (on meta it never is), or x's; float64 is left alone, as autocast does."""
    kind = x.device.type
    if has_autocast(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def what_is_shared(conditions: int, rows: int, groups: int, blocks: int) -> str | None:
    """What is shared that the products cannot share; None if each row and each block has its own."""
    if conditions != rows:
        return "rows share a condition"
    return "blocks share a modulation" if groups != blocks else None


def of_products(blocks: Sequence[Block], modulations: Sequence[Affine], final: Affine | None) -> list[Tensor]:
    """The weights and biases of all products; those of the norms may be of another dtype."""
    products = [affine for block in blocks for affine in (block.up, block.down)]
    products += [*modulations, *([] if final is None else [final])]
    return [tensor for affine in products for tensor in affine if tensor is not None]


def choose_path(call: Call, path: str = "auto", in_op: bool = False) -> str:
    """The path of a call: the first in the order of their measured times that can serve.

    It is chosen before the registered op and not inside it, so that the plain form stays open to torch.compile,
    torch.func and double backward. A compiled graph keeps the answer that it was compiled with: plain PyTorch, or
    "auto", with which the op asks again while it runs and knows the rows.

    Args:
        call: its facts.
        path: one of KERNELS where no other may serve, as in tests and benchmarks; else "auto".
        in_op: whether the op asks, which is called where kernels serve.

    Returns:
        One of PATHS, or FEW; "auto" for a graph that is compiled for any number of rows.

    Raises:
        ValueError: for an unknown path, or if the path or the backend asked for cannot serve, saying why.
    """
    check_choice("path", path, ("auto", *KERNELS))
    if path == "auto" and not in_op and not torch.compiler.is_compiling() and requested() in ("auto", "cpu"):
        few = _why_not_few(call)
        if few is None:
            return FEW
        if requested() == "cpu":
            raise ValueError(f"flow_head: backend 'cpu' cannot serve this input: {few}")
    reason = None if in_op else _why_not_kernels(call)
    if path != "auto":
        reason = reason or (None if in_op else _why_not_backend()) or _why_not_path(call, path)
        if reason is not None:
            raise ValueError(f"flow_head: path {path!r} cannot serve this input: {reason}")
    if not in_op and (backend_for(reason) == "eager" or call.rows == 0):
        return "eager"
    if path != "auto" or call.rows is None:
        return path
    among = KERNELS if in_op or requested() != "auto" else PATHS
    return next(path for path in _order(call) if path in among and _why_not_path(call, path) is None)


def explain(call: Call) -> tuple[str, str]:
    """What serves a head by its number of rows, and why: where that was measured, or the reason against the kernels.

    Args:
        call: the facts, with any number of rows, training or not.
    """
    reason = _why_not_kernels(call)
    if reason is not None and requested() in ("auto", "cpu") and _why_not_few(call) is None:
        few = f"{RUNS[FEW]}, up to {few_rows(call.dtype, call.width)} rows without gradients"
        return f"{few}; else {RUNS['eager']}", f"Triton: {reason}"
    if reason is not None:
        return RUNS["eager"], f"Triton: {reason}"
    if (reason := _why_not_backend()) is not None:
        return RUNS["eager"] if requested() == "eager" else "nothing", reason
    gpu = gpu_name(call.device)
    known = measured_on(call.device, call.dtype, call.width)
    served = ""
    last = None
    for rows in sorted({1, _PRODUCTS_FROM, *(entry.rows for entry in known)}):
        both = [choose_path(call._replace(rows=rows, training=training)) for training in (False, True)]
        inference, training = (RUNS[path] for path in both)
        now = inference if inference == training else f"{inference} (training: {training})"
        if now != last:
            served += f"; from {rows} rows {now}" if served else now
            last = now
    if not known:
        return served, UNMEASURED
    nearest = "" if known[-1].gpu == gpu else f", the nearest to {gpu} that was"
    return served, f"measured from {known[0].rows} to {known[-1].rows} rows on {known[-1].gpu}{nearest}"


@constant
def is_plain(on_cuda: bool) -> bool:
    """Whether plain PyTorch serves whatever else: kernels run on CUDA; the interpreter must be asked for by name."""
    wanted = requested()
    return wanted == "eager" or (wanted == "auto" and not on_cuda)


def is_plain_for(x: Tensor) -> bool:
    """Whether plain PyTorch serves x [..., W] whatever the other facts of the call are, which nobody need ask for."""
    if torch.compiler.is_compiling() or not is_plain(x.is_cuda):
        return False
    return not x.is_cpu or x.shape[:-1].numel() > few_rows(dtype_of_products(x), x.shape[-1])


def why_not_device(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the kernels cannot serve a head of this width on this device; None where they can."""
    if width > MAX_WIDTH:  # not `constant`: with torch.compile(dynamic=True) a number that a module holds is none yet
        return f"it holds a row in one program: up to {MAX_WIDTH} wide, not {width}"
    return _why_not_on(device, dtype)


@constant
def _why_not_on(device: torch.device, dtype: torch.dtype) -> str | None:
    return why_not_on(device, dtype)


def _why_not_kernels(call: Call) -> str | None:
    reason = _why_not_here(call.device, call.dtype, call.width) or call.why_not
    if reason is not None:
        return reason
    tensors = (*call.inputs, *call.tensors)
    if any(type(tensor) not in (Tensor, Parameter) for tensor in tensors):
        return "a tensor is of a subclass with rules of its own"
    if not torch.is_autocast_enabled(call.device.type) and any(tensor.dtype != call.dtype for tensor in tensors):
        return "x, y and the weights of the products are not of one dtype"
    return None


def few_rows(dtype: torch.dtype, width: int) -> int:
    """Up to how many rows the CPU part was faster than the library's products at every depth, with AVX-512.

    Those in bfloat16 have instructions of their own, and those of narrow layers find all weights in the cache.
    """
    if dtype == torch.float32:
        return 16 if width >= 256 else 8
    return 4 if dtype == torch.bfloat16 else 0


def _why_not_few(call: Call) -> str | None:
    """Why the CPU part's few rows cannot serve."""
    reason, most = cpu_kernels.why_not_on(call.device) or call.why_not, few_rows(call.dtype, call.width)
    if reason is not None:
        return reason
    if is_dispatch_watched() or is_forward_mode():
        reason = "a mode, a transform or dual numbers want to see every operation"
    elif not most:
        reason = f"it takes float32 and bfloat16, not {call.dtype}"
    elif call.training:
        reason = "it has no gradients"
    elif call.rows is None or call.rows > most:
        reason = f"it takes up to {most} rows, not {call.rows}"
    elif any(type(tensor) not in (Tensor, Parameter) for tensor in (*call.inputs, *call.tensors)):
        reason = "a tensor is of a subclass with rules of its own"
    elif any(t.dtype != call.dtype or not t.is_cpu or t.is_neg() for t in (*call.inputs, *call.tensors)):
        reason = "x, y and the weights of the products are not of one dtype and device, or are stored negated"
    elif not all(tensor.is_contiguous() for tensor in call.tensors):
        reason = "a weight has gaps between its numbers"
    return reason


def _why_not_here(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    transforming = None
    if is_transforming() or is_forward_mode():
        transforming = "the Triton kernels have no rules for the transforms of torch.func, nor for dual numbers"
    return why_not_device(device, dtype, width) or transforming


@constant
def backend_for(why_not_kernels: str | None) -> str:
    """The backend, "triton" or "eager"; a ValueError if the one asked for cannot serve."""
    return choose("flow_head", {"triton": why_not_kernels, "cpu": "there it serves few rows without gradients"})


@constant
def _why_not_backend() -> str | None:
    return None if requested() in ("auto", "triton") else f"backend {requested()!r} was asked for"


def _why_not_path(call: Call, path: str) -> str | None:
    """Why a path cannot serve what the kernels can; in a graph of any number of rows the op finds it out."""
    if path not in ("products", *SMALL) or call.rows is None:
        return None
    from uniflow_kernels.triton_kernels import products

    # y is not looked at: what the products are given is SiLU(y), in memory of its own
    x = [flat_rows(x) for x in call.inputs[:1]]
    widths, small = (call.width, call.hidden), path in SMALL
    return call.shared or products.why_not(call.device, call.dtype, widths, [*x, *call.tensors], small)


def _order(call: Call) -> tuple[str, ...]:
    """The paths, the fastest first; the last of them is one that serves wherever kernels do.

    Where nothing was measured, counted in bytes, products win where they reach about 500 TFLOP/s on an H100, which
    needs its tensor cores and enough tiles for all of its processors.
    """
    assert call.rows is not None
    arch = architecture(call.device)
    known = measured_on(call.device, call.dtype, call.width)
    found = fastest_first(known, call.rows, call.training, is_in_graph())
    counted = arch == 90 and call.dtype.itemsize == 2 and call.width >= 256 and call.rows >= _PRODUCTS_FROM
    return (*found, *(("products", "rows") if counted else ("rows",)))


class Measured(NamedTuple):
    """The paths at a number of rows, the fastest first; empty where they were not measured.

    By the wall clock; of a replayed CUDA graph, which has no launches to wait for, by the GPU's.
    """

    rows: int
    inference: tuple[str, ...]
    training: tuple[str, ...]
    graph_inference: tuple[str, ...]
    graph_training: tuple[str, ...]
    gpu: str

    def paths(self, training: bool, graph: bool) -> tuple[str, ...]:
        """Of a forward pass that keeps nothing, or of one with its backward pass; in a CUDA graph or not."""
        if graph:
            return self.graph_training if training else self.graph_inference
        return self.training if training else self.inference


def measured_on(device: torch.device, dtype: torch.dtype, width: int, op: str = "flow_head") -> tuple[Measured, ...]:
    """What `measured` has of a device, for products of a dtype; the rest as there."""
    return measured(gpu_name(device), architecture(device), _name(dtype), width, op)


@lru_cache
def measured(gpu: str, arch: int, dtype: str, width: int, op: str = "flow_head") -> tuple[Measured, ...]:
    """All that was measured on a GPU, by rising number of rows.

    Of a GPU on which nothing was measured it is what was on the nearest one of its compute capability: the one whose
    name begins most like its own.

    Args:
        gpu: its name, as PyTorch gives it.
        arch: compute capability times ten.
        dtype: of the products, such as "bfloat16".
        width: of a row; of "attention" that of a head, and its rows are the tokens of a sample.
        op: of which paths: "flow_head", "transformer_layers", "transformer_mlp" or "attention".
    """
    entries = [entry for entry in _table(op) if (entry["arch"], entry["dtype"], entry["width"]) == (arch, dtype, width)]
    names = sorted({entry["gpu"] for entry in entries})
    nearest = max(names, key=lambda name: (name == gpu, _common(name, gpu)), default=None)
    found = [{field: entry[field] for field in Measured._fields} for entry in entries if entry["gpu"] == nearest]
    orders = Measured._fields[1:-1]
    return tuple(sorted(Measured(**entry | {order: tuple(entry[order]) for order in orders}) for entry in found))


def _common(name: str, other: str) -> int:
    """With how many of the same letters two names begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(name, other, strict=False)))


def fastest_first(known: Sequence[Measured], rows: int, training: bool, graph: bool) -> tuple[str, ...]:
    """The paths in their order at the largest number of rows measured that is not above `rows`; empty if none is."""
    below = [entry for entry in known if entry.rows <= rows]
    return below[-1].paths(training, graph) if below else ()


@lru_cache
def gpu_name(device: torch.device) -> str:
    """A GPU's name; of a CPU, where Triton's interpreter runs, none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache
def _table(op: str) -> list[dict[str, Any]]:
    return json.loads(files("uniflow_kernels").joinpath(FILE).read_text(encoding="utf-8"))[op]
