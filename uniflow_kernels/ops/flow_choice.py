"""Which path serves a call of the flow head: by what was measured, else by a count.

What was measured stands in measured.json, which `python -m benchmarks choices` makes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from uniflow_kernels.choice import choose, requested
from uniflow_kernels.ops.flow_blocks import Affine, Block, check_choice
from uniflow_kernels.torch_private import constant, is_transforming
from uniflow_kernels.triton_kernels import architecture, why_not_on

PATHS = ("rows", "products")

RUNS = {
    "eager": "plain PyTorch",
    "rows": "Triton row kernels, cuBLAS products",
    "products": "Triton products with the row kernels' work in them",
}
UNMEASURED = "unmeasured on this GPU"
FILE = "measured.json"


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


def why_not_tensors(
    x: Tensor, a: Tensor, blocks: Sequence[Block], modulations: Sequence[Affine], final_modulation: Affine | None
) -> str | None:
    """Why the kernels cannot serve these tensors; None where they can."""
    products = [affine for block in blocks for affine in (block.up, block.down)]
    products += [*modulations, *([] if final_modulation is None else [final_modulation])]
    tensors = [x, a, *(tensor for affine in products for tensor in affine if tensor is not None)]
    if any(tensor.dtype != x.dtype for tensor in tensors):
        return "x, y and the weights of the products are not of one dtype"
    if any(type(tensor) not in (Tensor, Parameter) for tensor in tensors):
        return "a tensor is of a subclass with rules of its own"
    return None


_MAX_WIDTH = 4096  # beyond it the backward kernel's row does not fit the registers of 16 warps


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


class Measured(NamedTuple):
    """An op's paths at a number of rows, the fastest first; empty where they were not measured."""

    rows: int
    inference: tuple[str, ...]
    training: tuple[str, ...]
    gpu: str

    def paths(self, training: bool) -> tuple[str, ...]:
        """Of a forward pass that keeps nothing, or of one with its backward pass."""
        return self.training if training else self.inference


@lru_cache
def measured(op: str, arch: int, dtype: str, width: int) -> tuple[Measured, ...]:
    """All that was measured of an op, by rising number of rows.

    Args:
        op: its name.
        arch: compute capability times ten.
        dtype: of the products, such as "bfloat16".
        width: of a row.
    """
    entries = [entry for entry in _table().get(op, []) if _key(entry) == (arch, dtype, width)]
    found = [Measured(e["rows"], tuple(e["inference"]), tuple(e["training"]), e["gpu"]) for e in entries]
    return tuple(sorted(found))


def fastest_first(op: str, arch: int, dtype: str, width: int, rows: int, training: bool) -> tuple[str, ...]:
    """The paths in their order at the largest number of rows measured that is not above `rows`; empty if none is."""
    known = [entry for entry in measured(op, arch, dtype, width) if entry.rows <= rows]
    return known[-1].paths(training) if known else ()


def _key(entry: dict[str, Any]) -> tuple[int, str, int]:
    return entry["arch"], entry["dtype"], entry["width"]


@lru_cache
def _table() -> dict[str, list[dict[str, Any]]]:
    return json.loads(files("uniflow_kernels").joinpath(FILE).read_text(encoding="utf-8"))
