"""A gradient that the forward pass has made, times what comes in from behind: usually 1, and then untouched.

What float16 holds ends at 6e-8, and the mean over a batch divides by more: a gradient is made in such a range that
neither it nor what a GradScaler makes of it is lost, and the power of two that is missing comes in with the backward
pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uniflow_kernels import cpu_kernels, cuda_kernels, triton_kernels
from uniflow_kernels.choice import requested
from uniflow_kernels.ops.pieces import chunk
from uniflow_kernels.ops.registration import kernels_for, register
from uniflow_kernels.torch_private import is_graph_kept


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient` times `factor`; in place, unless the graph is kept for another backward pass or being compiled.

    Args:
        gradient: [..., D], which only the caller holds.
        factor: a scalar, or one value for each row of `gradient`, [...]; any float dtype.

    Returns:
        What `gradient * factor` is, in the dtype of `gradient`.
    """
    if factor.ndim:
        factor = factor.unsqueeze(-1)
    elif factor.dtype != gradient.dtype and factor.device.type != "cpu":
        factor = factor.view(1)  # a scalar would first be rounded to the gradient's dtype
    # a compiler, which traces subclasses of Tensor, fuses the product with what consumes it
    if type(gradient) is not Tensor or is_graph_kept():
        return (gradient * factor).to(gradient.dtype)
    scale_op(gradient, factor)
    return gradient


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


def _scale(gradient: Tensor, factor: Tensor) -> None:
    if factor.numel() != 1:
        # in pieces, since a CPU copies what it multiplies by another dtype
        at_once = max(1, chunk(gradient.device) // max(1, gradient[:1].numel()))
        for some, by in zip(gradient.split(at_once), factor.split(at_once), strict=True):
            some.mul_(by)
        return
    if gradient.device.type == "cpu" and requested() != "triton":  # where looking at the number waits for nothing
        if factor.item() != 1:
            gradient.mul_(factor)
        return
    if not gradient.is_contiguous():
        gradient.mul_(factor)
        return
    made = {"triton": triton_kernels, "cuda": cuda_kernels, "cpu": cpu_kernels}
    kernels = kernels_for("scale_", "distillation", gradient.device, lambda name: made[name].why_not(gradient))
    if kernels is not None:
        kernels.scale(gradient, factor)
    else:
        gradient.mul_(factor)


scale_op = register("scale_(Tensor(a!) gradient, Tensor factor) -> ()", _scale, lambda gradient, factor: None)
