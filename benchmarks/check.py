"""Is a form right? Its error against float64, beside the error of plain PyTorch in the same dtype.

The rule: at most twice the error of the plain form, plus a rounding of the largest value. Errors are those of the worst
element, so that one wrong row among many is found; outputs and all gradients are checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Form, Problem, in_float64, named_leaves


@dataclass(frozen=True)
class Finding:
    """The largest error of one output or gradient, that of the plain form, and what is allowed.

    `error` is None where there is none to give: NaN, or a result missing or of another shape or dtype.
    """

    tensor: str
    error: float | None
    plain_error: float
    allowed: float

    @property
    def right(self) -> bool:
        """Whether the error is allowed."""
        return self.error is not None and self.error <= self.allowed

    @property
    def badness(self) -> float:
        """Error over what is allowed."""
        if self.error is None:
            return math.inf
        return self.error / self.allowed if self.allowed else self.error

    def __str__(self) -> str:
        error = "NaN, missing, or of another shape or dtype" if self.error is None else f"error {self.error:.2e}"
        return f"{self.tensor}: {error}, allowed {self.allowed:.2e}"


class Checker:
    """Judges forms of one problem against its plain form, which is run once in its dtype and once in float64."""

    def __init__(self, problem: Problem) -> None:
        self.inputs = problem.inputs
        self.plain, self.cotangents = _evaluate(problem.plain, self.inputs, None)
        exact_cotangents = [cotangent.double() for cotangent in self.cotangents]
        self.exact, _ = _evaluate(problem.plain, in_float64(self.inputs), exact_cotangents)

    def findings(self, form: Form) -> list[Finding]:
        """One for every output and every gradient, the worst first."""
        result, _ = _evaluate(form, self.inputs, self.cotangents)
        found = [self._judge(name, result.get(name)) for name in self.exact]
        return sorted(found, key=lambda finding: finding.badness, reverse=True)

    def slack(self) -> dict[str, float]:
        """How far two right forms may be apart, for each output and gradient, as a share of its largest value."""
        apart = {}
        for name, exact in self.exact.items():
            finding = self._judge(name, self.plain[name])
            apart[name] = (finding.allowed + finding.plain_error) / (exact.abs().max().item() or math.inf)
        return apart

    def _judge(self, name: str, result: Tensor | None) -> Finding:
        plain, exact = self.plain[name], self.exact[name]
        plain_error = _error(plain, exact)
        if plain_error is None:
            raise ArithmeticError(f"{name}: the plain form gives NaN here, so nothing can be checked against it")
        rounding = max(torch.finfo(plain.dtype).eps, 4 * torch.finfo(torch.float32).eps)
        allowed = 2 * plain_error + rounding * exact.abs().max().item()
        fits = result is not None and result.shape == plain.shape and result.dtype == plain.dtype
        return Finding(name, _error(result, exact) if fits and result is not None else None, plain_error, allowed)


def apart(problem: Problem, forms: Mapping[str, Form], slack: Mapping[str, float]) -> dict[str, str]:
    """Which forms are too far from the plain one, by name, and where: at the size that is timed, without float64.

    A smaller size was checked against float64, and another size may take another kernel.

    Args:
        problem: at the size that is timed.
        forms: that are right at the size that was checked.
        slack: the `Checker`'s there; twice as much is allowed here, as sums are longer.
    """
    plain, cotangents = _evaluate(problem.plain, problem.inputs, None)
    found = {}
    for label, form in forms.items():
        result, _ = _evaluate(form, problem.inputs, cotangents)
        for name, expected in plain.items():
            largest, mine = expected.double().abs().max().item(), result.get(name)
            error = None if mine is None or mine.shape != expected.shape else _error(mine, expected.double())
            if error is None or error > 2 * slack[name] * largest:
                far = "NaN or missing" if error is None else f"{error:.2e} from the plain form"
                found[label] = f"at the size that is timed, {name}: {far}, its largest value is {largest:.2e}"
                break
    return found


def as_tensors(outputs: Any) -> tuple[Tensor, ...]:
    """What a form returned, as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def cotangents_like(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Something to backpropagate: random, but 1 for a loss."""
    return [torch.ones_like(out) if out.ndim == 0 else torch.randn_like(out) for out in outputs]


def _evaluate(
    form: Form, inputs: tuple[Any, ...], cotangents: list[Tensor] | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    leaves = named_leaves(inputs)
    with torch.set_grad_enabled(bool(leaves)):
        outputs = as_tensors(form(*inputs))
    values = {f"output {index}": out.detach() for index, out in enumerate(outputs)}
    if leaves and cotangents is None:
        cotangents = cotangents_like(outputs)
    fits = [out.shape for out in outputs] == [c.shape for c in cotangents or ()]
    if leaves and fits and all(out.requires_grad for out in outputs):
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents, materialize_grads=True)
        values.update({f"gradient of {name}": grad for name, grad in zip(leaves, gradients, strict=True)})
    return values, cotangents or []


def _error(result: Tensor, exact: Tensor) -> float | None:
    error = (result.double() - exact).abs().max().item()
    return None if math.isnan(error) else error
