"""`verify`: a model before and after `patch`, its numbers compared and both timed."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uniflow_kernels.dropin.patching import Forward, PatchReport, is_patched, patched, unpatch
from uniflow_kernels.torch_private import tree_leaves, tree_map

FLOOR = 1e-6
# where there is no float64 to compare with; relative to a tensor's largest number
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
Forwards = dict[nn.Module, Forward]

SECONDS, TURNS = 0.3, 3  # to time each side of a row of the table, in so many turns


@dataclass(frozen=True)
class Comparison:
    """One row of the table.

    Attributes:
        mode: "eval" or "train".
        what: "output" or "gradients".
        error: of the patched model: the largest difference of a tensor, relative to its largest number.
        allowed: how much it may be.
        before: milliseconds of the model as it was; of "gradients" forward and backward.
        after: milliseconds of the patched model.
    """

    mode: str
    what: str
    error: float
    allowed: float
    before: float
    after: float

    @property
    def equal(self) -> bool:
        """Whether the numbers are the same up to rounding."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; `str()` is the table.

    Attributes:
        patched: the report of `patch`.
        comparisons: output and gradients in eval and in training mode.
        reference: what errors are measured against.
        failure: what the patched model raised, if it did; then nothing is compared.
    """

    patched: PatchReport
    comparisons: list[Comparison]
    reference: str
    failure: str | None = None

    @property
    def ok(self) -> bool:
        """Whether something was patched, and all numbers are the same up to rounding."""
        return (
            self.failure is None
            and bool(self.patched.patched)
            and all(comparison.equal for comparison in self.comparisons)
        )

    def __str__(self) -> str:
        if self.failure is not None:
            return f"{self.patched}\n\nthe patched model FAILS where the model as it was ran: {self.failure}"
        head = f"{'mode':6}{'what':11}{'error':>10}{'allowed':>10}  {'':7}{'before ms':>10}{'after ms':>10}{'ratio':>7}"
        rows = [
            f"{c.mode:6}{c.what:11}{c.error:10.1e}{c.allowed:10.1e}  {'ok' if c.equal else 'DIFFERS':7}"
            f"{c.before:10.2f}{c.after:10.2f}{c.before / c.after:7.2f}"
            for c in self.comparisons
        ]
        return "\n".join([str(self.patched), "", head, *rows, f"errors against {self.reference}"])


def verify(
    model: nn.Module, *inputs: Any, only: str | Sequence[str] | None = None, exact: bool = True, **kwargs: Any
) -> VerifyReport:
    """Run a model as it is and patched, compare outputs and gradients, time both, and print the table.

    The model comes back as it was, its gradients and buffers too. Random numbers are the same on both sides.

    Args:
        model: the model.
        inputs: what it is called with. Floating tensors in it that require a gradient get one compared.
        only: as `patch` takes it.
        exact: compare both with a copy in float64, by the rule that the patched model's error may be at most twice
            the model's own. Otherwise, and where the model does not run in float64, both sides are compared with each
            other, within a few roundings.
        kwargs: what it is called with, by name.

    Returns:
        The report; `report.ok` says whether something was patched and all is equal. What the patched model alone raises
        is in it.

    Raises:
        ValueError: if the model returns no floating tensor.
    """
    runs = _Runs(model, inputs, kwargs)
    with _unpatched(model):
        before = {mode: runs.numbers(model, mode) for mode in ("eval", "train")}
        reference = runs.in_float64() if exact else None
        with patched(model, only) as report:
            try:
                after = {mode: runs.numbers(model, mode) for mode in before}
            except Exception as raised:  # whatever it is, the model itself did not raise it
                result = VerifyReport(report, [], "", f"{type(raised).__name__}: {raised}")
                print(result)
                return result
            forwards = _patches(model)
        times = {mode: runs.times(model, mode, forwards) for mode in before}
    comparisons = []
    for mode, (output, gradients) in before.items():
        pairs = {"output": (output, after[mode][0]), "gradients": (gradients, after[mode][1])}
        for k, (what, (old, new)) in enumerate(pairs.items()):
            truth = None if reference is None else reference[mode][k]
            error, allowed = _judged(old, new, truth)
            comparisons.append(Comparison(mode, what, error, allowed, *times[mode][what]))
    against = "float64, allowed is twice the model's own" if reference else "the model as it was, allowed is rounding"
    result = VerifyReport(report, comparisons, against)
    print(result)
    return result


class _Runs:
    """Runs of a model with the same inputs and the same random numbers."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.inputs, self.kwargs = model, inputs, kwargs
        self.devices = {t.device for t in [*model.parameters(), *model.buffers()] if t.device.type == "cuda"}

    def numbers(self, model: nn.Module, mode: str, double: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and gradients of inputs and parameters; zeros where there is none."""
        args, kwargs = tree_map(lambda value: _leaf(value, double), (self.inputs, self.kwargs))
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        with _as_it_was(model, mode), torch.random.fork_rng(self.devices), torch.enable_grad():
            torch.manual_seed(0)
            outputs = _floating(model(*args, **kwargs))
            if not outputs:
                raise ValueError("model: returns no floating tensor, so there is nothing to compare")
            wanted = [*leaves, *(p for p in model.parameters() if p.requires_grad)]
            if any(out.requires_grad for out in outputs):
                # not torch.autograd.grad, which reentrant checkpointing refuses
                sum((_weighted(out) for out in outputs if out.requires_grad), outputs[0].new_zeros(())).backward()
            gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in wanted]
        return [out.detach() for out in outputs], gradients

    def in_float64(self) -> dict[str, tuple[list[Tensor], list[Tensor]]] | None:
        """The same of a copy in float64; None if it does not run there."""
        try:
            model = copy.deepcopy(self.model).double()
            return {mode: self.numbers(model, mode, double=True) for mode in ("eval", "train")}
        except (RuntimeError, TypeError, NotImplementedError):
            return None

    def times(self, model: nn.Module, mode: str, forwards: Forwards) -> dict[str, tuple[float, float]]:
        """Milliseconds before and after, in turns: the median of each side."""

        def forward() -> None:
            with torch.no_grad():
                model(*self.inputs, **self.kwargs)

        found = {}
        with _as_it_was(model, mode), torch.random.fork_rng(self.devices):
            for what, run in {"output": forward, "gradients": lambda: self.numbers(model, mode)}.items():
                old: list[float] = []
                new: list[float] = []
                for _ in range(TURNS):
                    old += self._clock(run)
                    with _with_patches(forwards):
                        new += self._clock(run)
                found[what] = (statistics.median(old), statistics.median(new))
        return found

    def _clock(self, run: Callable[[], object]) -> list[float]:
        """Milliseconds of each of several runs, after one that is not counted."""
        run()
        until = time.perf_counter() + SECONDS / TURNS
        found: list[float] = []
        while not found or time.perf_counter() < until:
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            found.append(1000 * (time.perf_counter() - start))
        return found

    def _wait(self) -> None:
        for device in self.devices:
            torch.cuda.synchronize(device)


def _judged(old: list[Tensor], new: list[Tensor], truth: list[Tensor] | None) -> tuple[float, float]:
    """The worst error of the new numbers, and what is allowed there."""
    if len(old) != len(new) or any(a.shape != b.shape for a, b in zip(old, new, strict=True)):
        return float("inf"), 0.0
    worst = (0.0, FLOOR)
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        if truth is not None:
            pair = (_apart(b, truth[i]), 2 * _apart(a, truth[i]) + FLOOR)
        else:
            pair = (_apart(b, a), ROUNDING[a.dtype])
        worst = max(worst, pair, key=lambda pair: pair[0] / pair[1])
    return worst


def _apart(a: Tensor, b: Tensor) -> float:
    if not b.numel():
        return 0.0
    apart = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
    return float("inf") if math.isnan(apart) else apart


def _leaf(value: Any, double: bool) -> Any:
    """A copy of a tensor that gradients can be taken of."""
    if not isinstance(value, Tensor):
        return value
    copied = value.detach().clone()
    copied = copied.double() if double and value.is_floating_point() else copied
    return copied.requires_grad_(value.requires_grad)


def _floating(output: Any) -> list[Tensor]:
    if isinstance(output, Mapping):  # and the outputs of transformers
        output = list(output.values())
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _weighted(out: Tensor) -> Tensor:
    """A loss that no gradient vanishes under."""
    weight = torch.randn(out.shape, dtype=torch.float32, device="cpu", generator=torch.Generator().manual_seed(1))
    return (out * weight.to(out)).sum()


def _patches(model: nn.Module) -> Forwards:
    return {module: vars(module)["forward"] for module in model.modules() if is_patched(module)}


@contextmanager
def _unpatched(model: nn.Module) -> Iterator[None]:
    """`model` without patches inside the block, and with those it had afterwards."""
    before = _patches(model)
    unpatch(model)
    try:
        yield
    finally:
        for module, forward in before.items():
            module.forward = forward


@contextmanager
def _with_patches(forwards: Forwards) -> Iterator[None]:
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


@contextmanager
def _as_it_was(model: nn.Module, mode: str) -> Iterator[None]:
    """`model` in a mode, without gradients; afterwards its modes, gradients and buffers are those it had."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train(mode == "train")
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
