"""What transformer layers keep for the backward pass and what they compute again there, by a budget in bytes.

Recomputed are by `torch.utils.checkpoint`; what of a layer is kept all the same is told to it operation by operation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from uniflow_kernels.ops import transformer_mlp  # noqa: F401 - which registers the op
from uniflow_kernels.torch_private import (
    FakeTensorMode,
    TorchDispatchMode,
    children_of,
    parameters_of,
    replica_of,
    storage_of,
    tree_leaves,
)

# from most bytes to least, and from least work to most
KEEPS = ("everything", "products", "attention", "nothing")
_SAID = ("everything", "products and attention", "attention", "their input alone")

_aten, _ours = torch.ops.aten, torch.ops.uniflow_kernels
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}
_PRODUCTS = {
    _ours.transformer_mlp.default,
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
}


def _saves(keeps: str, op: Any) -> bool:
    """Whether a layer that keeps "products" or "attention" keeps what an operation gives."""
    if op in _ATTENTION or getattr(op, "namespace", "").startswith("flash_attn"):
        return True
    return keeps == "products" and op in _PRODUCTS


def _policy(keeps: str, _context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _saves(keeps, op) else CheckpointPolicy.PREFER_RECOMPUTE


_CONTEXTS = {
    keeps: partial(create_selective_checkpoint_contexts, partial(_policy, keeps)) for keeps in ("products", "attention")
}


class RecomputingLayer(nn.Module):
    """A layer whose backward pass may compute again what it needs; subclasses have `compute` in the place of `forward`.

    Attributes:
        keeps: one of KEEPS: "everything" that autograd saves; of "products" and attention what they give, so that
            norms, activations, scales and sums are computed again; of "attention" alone; or "nothing". The layer's
            input is kept in any case. Numbers are the same, without torch.compile to the bit.
    """

    keeps = KEEPS[0]

    def compute(self, x: Tensor, *positions: Tensor) -> Tensor:
        """What the layer is: [B, S, W] -> [B, S, W]."""
        raise NotImplementedError

    def forward(self, x: Tensor, *positions: Tensor) -> Tensor:
        """[B, S, W] -> [B, S, W], and what `keeps` says for the backward pass."""
        if self.keeps == "everything" or not torch.is_grad_enabled():
            return self.compute(x, *positions)
        if self.keeps == "nothing":
            return checkpoint(self.compute, x, *positions, use_reentrant=False)
        return checkpoint(self.compute, x, *positions, use_reentrant=False, context_fn=_CONTEXTS[self.keeps])


class Recomputation(NamedTuple):
    """What layers keep that run one after the other.

    Args:
        keeps: of each layer, one of KEEPS.
        held: the most bytes that are held of them at a time: what is kept of all, and of one that is computed again
            all that it needs. Not counted are gradients, what is dropped on the way, and copies of weights.
        whole: the same if nothing is computed again.
        least: the same if all is.
    """

    keeps: tuple[str, ...]
    held: int
    whole: int
    least: int

    def __str__(self) -> str:
        counts = [f"{self.keeps.count(kept)} layers keep {what}" for kept, what in zip(KEEPS, _SAID, strict=True)]
        there = [said for kept, said in zip(KEEPS, counts, strict=True) if kept in self.keeps]
        return f"{', '.join(there)}: {shown(self.held)} at a time in place of {shown(self.whole)}"


def fit(counted: Sequence[Sequence[int]], budget: int) -> Recomputation:
    """Keep as much as the budget allows, and compute again what costs little first.

    First norms, activations, scales and sums are computed again, from the first layer on as far as it takes; then
    products too; then attention. A layer that is computed again is whole then, but the layers behind it are gone.

    Args:
        counted: of each layer the bytes for each of KEEPS.
        budget: bytes.

    Raises:
        ValueError: if it is below the least that can be.
    """
    levels = [0] * len(counted)
    whole = _held(counted, levels)
    least = _held(counted, [min(range(len(KEEPS)), key=bytes_of.__getitem__) for bytes_of in counted])
    if least > budget:
        raise ValueError(
            f"memory: expected at least {shown(least)} for what the layers hold, a layer at a time recomputed, "
            f"got {shown(budget)}; without recomputation they hold {shown(whole)}"
        )
    for level, layer in product(range(1, len(KEEPS)), range(len(counted))):
        if _held(counted, levels) > budget and counted[layer][level] < counted[layer][levels[layer]]:
            levels[layer] = level
    for layer in reversed(range(len(levels))):  # where it makes nothing less: the last layer is whole in any case
        for level in range(levels[layer]):
            eased = [*levels[:layer], level, *levels[layer + 1 :]]
            if _held(counted, eased) <= budget:
                levels = eased
                break
    return Recomputation(tuple(KEEPS[level] for level in levels), _held(counted, levels), whole, least)


def _held(counted: Sequence[Sequence[int]], levels: Sequence[int]) -> int:
    before, most = 0, 0
    for bytes_of, level in zip(counted, levels, strict=True):
        most = max(most, before + max(bytes_of[0], bytes_of[level]))
        before += bytes_of[level]
    return most


def shown(size: int) -> str:
    """Bytes in the unit that fits, as in "1.31 GB"."""
    for unit, each in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= each:
            return f"{size / each:.3g} {unit}"
    return f"{size} bytes"


def memory_of(text: str) -> int | float:
    """Bytes of "2GB", "500 MB" or "1.5e9", the share 0.5 of "50%".

    Raises:
        ValueError: if it is none of these.
    """
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*(%|([KMGT]?)B?)\s*", text, re.IGNORECASE)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found and found[2] == "%" and 0 < number <= 100:
        return number / 100
    if found and found[2] != "%" and 1 <= number * 1000 ** " KMGT".index(found[3].upper() or " ") < math.inf:
        return int(number * 1000 ** " KMGT".index(found[3].upper() or " "))
    raise ValueError(f"expected a number of bytes as in 2GB or 500MB, or a share as in 50%, got {text!r}")


def count_kept(
    layers: Sequence[nn.Module],
    shape: tuple[int, int, int],
    positions: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> list[list[int]]:
    """The bytes that each layer keeps of its input and beside it where all learn, for each of KEEPS.

    Nothing is computed.

    What does not grow with the batch (autocast's copies of weights) is not counted. Stochastic depth counts as if all
    samples were kept. With autocast or without, as where this is called.

    Args:
        layers: one after the other, each a `RecomputingLayer`.
        shape: of the input, [B, S, W].
        positions: what the layers are given besides.
        dtype: of the input.
        device: what the layers run on.
    """
    counted: list[list[int]] = []
    known: dict[tuple[Any, ...], list[int]] = {}
    for layer in layers:
        assert isinstance(layer, RecomputingLayer)
        key = (str(layer), layer.training)
        if key not in known:
            # the difference is what a sample adds
            two, three = (_count(layer, (size, *shape[1:]), positions, dtype, device) for size in (2, 3))
            known[key] = [shape[0] * (more - less) for more, less in zip(three, two, strict=True)]
        counted.append(known[key])
    return counted


def _count(
    layer: RecomputingLayer,
    shape: tuple[int, ...],
    positions: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> list[int]:
    saved: list[Tensor] = []
    with FakeTensorMode(), torch.enable_grad():
        fake = _without_memory(layer, device)
        x = torch.empty(shape, dtype=dtype, device=device).requires_grad_()
        others = [torch.empty(each.shape, dtype=each.dtype, device=device) for each in positions]
        with _Given() as given, saved_tensors_hooks(saved.append, lambda _: x):
            fake.compute(x, *others)
        everything = _size_of(saved)
        products, attention = (
            _size_of([x, *(t for op, results in given.seen if _saves(keeps, op) for t in results)])
            for keeps in ("products", "attention")
        )
        return [everything, products, attention, _size_of([x])]


class _Given(TorchDispatchMode):
    """What each operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, list[Tensor]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = op(*args, **(kwargs or {}))
        if _saves("products", op):
            self.seen.append((op, [each for each in tree_leaves(results) if isinstance(each, Tensor)]))
        return results


def _size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages, each counted once."""
    return sum({storage_of(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _without_memory(module: Any, device: torch.device) -> Any:
    """A module like it, without hooks of FSDP and the compiler, whose parameters have a shape and no memory."""
    made = replica_of(module)
    if type(module).__name__.endswith("DropPath"):  # which may leave out as many samples as it draws
        made.training = False
    for name, parameter in parameters_of(module).items():
        fake = None
        if parameter is not None:
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=device).requires_grad_()
        setattr(made, name, fake)
    for name, child in children_of(module).items():
        if child is not None:
            setattr(made, name, _without_memory(child, device))
    return made
