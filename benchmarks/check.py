"""Is a form right? Its error against float64, beside the error of plain PyTorch in the same dtype.

The rule: at most twice the error of the plain form, plus a rounding of the largest value. Errors are those of the worst
element, so that one wrong row among many is found; outputs and all gradients are checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Form, Problem, in_float64, named_leaves


@dataclass(frozen=True)
class Finding:
    """The largest error of one output or gradient, that of the plain form, and what is allowed."""

    tensor: str
    error: float
    plain_error: float
    allowed: float

    @property
    def right(self) -> bool:
        """Whether the error is allowed; NaN never is."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.tensor}: error {self.error:.2e}, plain {self.plain_error:.2e}, allowed {self.allowed:.2e}"


def check(problem: Problem, forms: Mapping[str, Form]) -> dict[str, list[Finding]]:
    """Findings per form, one an output and one a gradient."""
    plain, cotangents = _evaluate(problem.plain, problem.inputs, None)
    exact, _ = _evaluate(problem.plain, in_float64(problem.inputs), [c.double() for c in cotangents])
    plain_errors = {name: _error(plain[name], exact[name]) for name in exact}
    findings = {}
    for label, form in forms.items():
        result, _ = _evaluate(form, problem.inputs, cotangents)
        findings[label] = [
            _judge(name, result.get(name), plain[name], exact[name], plain_errors[name]) for name in exact
        ]
    return findings


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


def _error(result: Tensor, exact: Tensor) -> float:
    return (result.double() - exact).abs().max().item()


def _judge(name: str, result: Tensor | None, plain: Tensor, exact: Tensor, plain_error: float) -> Finding:
    rounding = max(torch.finfo(plain.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    allowed = 2 * plain_error + rounding * exact.abs().max().item()
    fits = result is not None and result.shape == plain.shape and result.dtype == plain.dtype
    return Finding(name, _error(result, exact) if fits else float("nan"), plain_error, allowed)  # type: ignore[arg-type]
