"""What a module computes, found out by running it on a few random rows; it is left exactly as it was."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from uniflow_kernels.torch_private import before_compilation, buffers_of, is_any_hooked, is_hooked, parameters_of

ROWS = 3
# float32 rounding, after a dozen blocks, stays far below it; any other formula far above
TOLERANCE = 1e-4


class NotOurs(Exception):  # noqa: N818 - an answer, not a failure
    """Why a module that looks as if it could be served is left alone."""


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """Its class's forward, as it was before any torch.compile decorator."""
    forward: Any = type(module).forward
    return before_compilation(forward)


def check_untouched(module: nn.Module) -> None:
    """Raise NotOurs if calling a part of `module` does more than its class's forward, or its numbers cannot be read."""
    if is_any_hooked():
        raise NotOurs("a hook on all modules must fire")
    for name, part in module.named_modules():
        where = name or "the module"
        if "forward" in vars(part):
            raise NotOurs(f"{where}: its forward was replaced on the instance")
        if name and is_hooked(part):
            raise NotOurs(f"{where}: a hook inside must fire")
    for name, tensor in module.named_parameters():
        if tensor.is_meta:
            raise NotOurs(f"{name}: on the meta device; patch after loading")
        if type(tensor) not in (nn.Parameter, Tensor) or not tensor.is_floating_point():
            raise NotOurs(f"{name}: a {type(tensor).__name__} in {tensor.dtype}; patch before sharding or quantizing")
    if len({tensor.device for tensor in module.parameters()}) > 1:
        raise NotOurs("its parameters are on several devices")


class Probe:
    """Runs a module with random float32 numbers in place of its parameters, so that no zero hides what it computes.

    Use as a context. Parameters, buffers, modes, the random number generators and hooks are untouched afterwards; no
    copy of the module is made, and the stand-ins of its matrices share one block of memory.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.device = next(module.parameters()).device
        self.generator = torch.Generator().manual_seed(0)

    def __enter__(self) -> Probe:
        self.contexts = ExitStack()
        enter = self.contexts.enter_context
        enter(torch.no_grad())
        enter(torch.autocast(self.device.type, enabled=False))
        enter(torch.random.fork_rng([self.device] if self.device.type == "cuda" else []))
        enter(_full_precision())
        enter(warnings.catch_warnings(action="ignore"))
        enter(_replaced(self._stand_ins()))
        return self

    def __exit__(self, *_: object) -> None:
        self.contexts.close()

    def rows(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random numbers, the same ones whatever the device."""
        return (scale * torch.randn(shape, generator=self.generator)).to(self.device)

    def times(self, *shape: int) -> Tensor:
        """Random numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator).to(self.device)

    def in_both_modes(self, run: Callable[[], Tensor]) -> list[Tensor]:
        """What `run` returns with the module in eval mode, and in training mode.

        Raises:
            NotOurs: if it fails, or returns no tensor.
        """
        before = [(part, part.training) for part in self.module.modules()]
        results = []
        try:
            for training in (False, True):
                for part, _ in before:
                    part.training = training
                results.append(run())
        except Exception as error:
            raise NotOurs(f"it does not run on {ROWS} rows: {type(error).__name__}: {error}") from error
        finally:
            for part, training in before:
                part.training = training
        if not all(isinstance(result, Tensor) for result in results):
            raise NotOurs(f"it returns a {type(results[0]).__name__}, not a tensor")
        return results

    def _stand_ins(self) -> list[tuple[dict[str, Any], str, Any]]:
        found = [
            (parameters_of(part), name, p)
            for part in self.module.modules()
            for name, p in _present(parameters_of(part))
        ]
        matrices = [p for _, _, p in found if p.ndim > 1]
        largest = max(matrices, key=Tensor.numel)
        shift = 7
        noise = self.rows(largest.numel() + shift * len(found), scale=largest.shape[-1] ** -0.5)
        stand_ins: list[tuple[dict[str, Any], str, Any]] = []
        for i, (place, name, p) in enumerate(found):
            if p.ndim > 1:
                new = noise[shift * i : shift * i + p.numel()].view(p.shape)
            else:
                new = self.rows(*p.shape, scale=0.3) + (0.0 if "bias" in name else 1.0)
            stand_ins.append((place, name, new))
        buffers = [
            (buffers_of(part), name, b) for part in self.module.modules() for name, b in _present(buffers_of(part))
        ]
        stand_ins += [(place, name, buffer.clone()) for place, name, buffer in buffers]
        # what is dropped is no part of the formula
        return stand_ins + [(vars(part), "p", 0.0) for part in self.module.modules() if drops(part)]


def drops(module: nn.Module) -> bool:
    """Whether it is a dropout layer."""
    return isinstance(module, nn.modules.dropout._DropoutNd)


def difference(ours: list[Tensor], own: list[Tensor]) -> float:
    """The largest difference, relative to the largest number; infinite if the shapes differ or a number is none."""
    if any(a.shape != b.shape for a, b in zip(ours, own, strict=True)):
        return float("inf")
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, own, strict=True))
    return float("inf") if math.isnan(worst) else worst


def _present(tensors: Mapping[str, Tensor | None]) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in tensors.items() if tensor is not None]


@contextmanager
def _replaced(stand_ins: list[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    before = [place[name] for place, name, _ in stand_ins]
    try:
        for place, name, new in stand_ins:
            place[name] = new
        yield
    finally:
        for (place, name, _), old in zip(stand_ins, before, strict=True):
            place[name] = old


@contextmanager
def _full_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
