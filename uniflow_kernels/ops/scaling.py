"""A gradient that the forward pass has made, times what comes in from behind: usually 1, and then untouched.

What float16 holds ends at 6e-8, and the mean over a batch divides by more: a gradient is made in such a range that
neither it nor what a GradScaler makes of it is lost, and the power of two that is missing comes in with the backward
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uniflow_kernels import cpu_kernels, cuda_kernels, triton_kernels
from uniflow_kernels.choice import requested
from uniflow_kernels.ops.pieces import chunk
from uniflow_kernels.ops.registration import kernels_for, register
from uniflow_kernels.torch_private import is_graph_kept


def scaled(gradients: list[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """Each gradient times its factor; in place, unless the graph is kept for another backward pass or being compiled.

    Args:
        gradients: each [..., D], which only the caller holds; of one device.
        factors: of each a scalar, or one value for each of its rows, [...]; any float dtype.

    Returns:
        What `gradient * factor` is, in the dtype of each gradient.
    """
    # a compiler, which traces subclasses of Tensor, fuses the product with what consumes it
    if type(gradients[0]) is not Tensor or is_graph_kept():
        return [
            (gradient * _beside(gradient, factor)).to(gradient.dtype)
            for gradient, factor in zip(gradients, factors, strict=True)
        ]
    scale_op(gradients, factors)
    return gradients


def _beside(gradient: Tensor, factor: Tensor) -> Tensor:
    """A factor in the shape that a gradient is multiplied by."""
    if factor.ndim:
        return factor.unsqueeze(-1)
    # a scalar would first be rounded to the gradient's dtype
    return factor.view(1) if factor.dtype != gradient.dtype and factor.device.type != "cpu" else factor


def power_of(coefficient: Tensor) -> Tensor:
    """The power of two that a coefficient, in float32, is divided by in `split`."""
    exponent = torch.frexp(coefficient).exponent
    return (exponent.clamp(-128, 125) + 129 << 23).view(torch.float32)  # by its bits: pow need not be exact


def split(coefficient: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
    """A coefficient in float32 as one in [1/8, 1/4), unless it is zero or not finite, and the power of two beside it.

    Twice the first times the difference of any two numbers of float16 is a number that float16 holds.
    """
    if isinstance(coefficient, Tensor):
        power = power_of(coefficient)
        return coefficient / power, power
    whole = torch.tensor(coefficient, dtype=torch.float32, device="cpu")
    power = power_of(whole)
    return (whole / power).item(), power.item()


def _scale(gradients: list[Tensor], factors: Sequence[Tensor]) -> None:
    device, wish = gradients[0].device, requested()
    kernels: Any = None
    if device.type == "cpu" and wish != "triton":  # where looking at a number waits for nothing
        if all(factor.numel() == 1 and factor.item() == 1 for factor in factors):
            return
        if wish in ("auto", "cpu") and cpu_kernels.why_not(*gradients) is None and _are_dense(gradients):
            cpu_kernels.scale(gradients, factors)
            return
    elif _are_dense(gradients) and all(factor.numel() == 1 for factor in factors):
        made = {"triton": triton_kernels, "cuda": cuda_kernels, "cpu": cpu_kernels}
        kernels = kernels_for("scale_", "distillation", device, lambda name: made[name].why_not(*gradients))
    for gradient, factor in zip(gradients, factors, strict=True):
        if kernels is not None:
            kernels.scale(gradient, factor)
        elif factor.numel() == 1:
            gradient.mul_(_beside(gradient, factor))
        else:
            # in pieces, since a CPU copies what it multiplies by another dtype
            at_once = max(1, chunk(device) // max(1, gradient[:1].numel()))
            for some, by in zip(gradient.split(at_once), factor.unsqueeze(-1).split(at_once), strict=True):
                some.mul_(by)


def _are_dense(tensors: list[Tensor]) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


scale_op = register("scale_(Tensor(a!)[] gradients, Tensor[] factors) -> ()", _scale, lambda gradients, factors: None)
