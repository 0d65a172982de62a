"""A gradient that the forward pass has made, times what comes in from behind: usually 1, and then untouched."""

from __future__ import annotations

from torch import Tensor

from uniflow_kernels import cuda_kernels, triton_kernels
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
    factor = factor.unsqueeze(-1) if factor.ndim else factor
    # a compiler, which traces subclasses of Tensor, fuses the product with what consumes it
    if type(gradient) is not Tensor or is_graph_kept():
        return (gradient * factor).to(gradient.dtype)
    scale_op(gradient, factor)
    return gradient


def _scale(gradient: Tensor, factor: Tensor) -> None:
    if factor.numel() > 1 or not gradient.is_contiguous():
        gradient.mul_(factor)
        return
    # on a GPU looking at the number would wait for the device: the kernels look at it there
    kernels = kernels_for(
        "scale_",
        "distillation",
        gradient.device,
        lambda: (triton_kernels.why_not(gradient), cuda_kernels.why_not(gradient)),
    )
    if kernels is not None:
        kernels.scale(gradient, factor)
    elif gradient.device.type != "cpu" or factor.item() != 1:
        gradient.mul_(factor)


scale_op = register("scale_(Tensor(a!) gradient, Tensor factor) -> ()", _scale, lambda gradient, factor: None)
