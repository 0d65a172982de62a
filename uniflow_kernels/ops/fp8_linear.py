"""A linear layer whose product is one of 8-bit floats (float8_e4m3fn), for inference.

The input is scaled row by row, and the weight output by output, so that the largest number of each is 448, the largest
of e4m3. The product is summed in float32, scaled back, given its bias and rounded to bfloat16, as torch's products
scaled by rows are, which need a GPU of compute capability 8.9. Elsewhere the same numbers are multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from uniflow_kernels.choice import requested
from uniflow_kernels.ops.flow_blocks import check_choice
from uniflow_kernels.ops.flow_choice import UNMEASURED, dtype_of_products
from uniflow_kernels.ops.registration import is_watched, register, wants_gradient
from uniflow_kernels.packing import packed
from uniflow_kernels.torch_private import constant, has_autocast, is_forward_mode, is_transforming
from uniflow_kernels.triton_kernels import MAX_QUANTIZED, architecture, why_not_on

PRECISIONS = ("fp8",)
LARGEST = 448.0  # of e4m3
MULTIPLE = 16  # of which a scaled product wants the columns of both factors, and the outputs

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of rows of zeros
_OUTPUTS_AT_ONCE = 1024  # of the product in float32, whose factors are float32 there


# --- what is computed ---


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[R, W] -> the same in float8_e4m3fn, each row times one over its scale, and the scales, [R, 1] in float32.

    A scale is the row's largest magnitude over 448, so that nothing overflows. With a NaN or an infinity among its
    numbers a row's scale is one, and so is all that is made of the row.
    """
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    scale = (largest / LARGEST).clamp(min=_SMALLEST_SCALE)
    return (rows * scale.reciprocal()).to(torch.float8_e4m3fn), scale


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize`, in one pass over memory where there is a kernel: the same bits."""
    why_not = is_watched(rows) or requested() not in ("auto", "triton") or not rows.numel()
    if why_not or why_not_kernel(rows.device, rows.dtype, rows.shape[1]) is not None:
        return quantize(rows)
    from uniflow_kernels.triton_kernels import quantization

    return quantization.quantize(rows if rows.stride(1) == 1 else rows.contiguous(), LARGEST, _SMALLEST_SCALE)


class QuantizedLayer(NamedTuple):
    """A linear layer in fp8.

    Args:
        weight: [O, W], float8_e4m3fn.
        scale: what each row of the weight was divided by, [1, O], float32.
        bias: [O], bfloat16; None if there is none.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __call__(self, rows: Tensor) -> Tensor:
        """[R, W], float, to [R, O], bfloat16."""
        q, scale = quantized(rows)
        multiply = multiplied if why_not_scaled(rows.device) else scaled_product
        return multiply(q, scale, self)


def quantized_layer(weight: Tensor, bias: Tensor | None) -> QuantizedLayer:
    """A layer of a weight [O, W] and a bias [O] in fp8."""
    q, scale = quantized(weight)
    return QuantizedLayer(q, scale.t(), None if bias is None else bias.to(torch.bfloat16))


def scaled_product(q: Tensor, scale: Tensor, layer: QuantizedLayer) -> Tensor:
    """The outputs [R, O] of rows that were quantized, by torch's scaled product."""
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(
        q, layer.weight.t(), scale, by_row, layer.scale, by_row, bias=layer.bias, output_dtype=torch.bfloat16
    )


def multiplied(q: Tensor, scale: Tensor, layer: QuantizedLayer) -> Tensor:
    """The same where there is none: numbers and order of what it does to them, in float32."""
    exact, out = q.float(), q.new_empty(len(q), len(layer.weight), dtype=torch.bfloat16)
    for first in range(0, len(layer.weight), _OUTPUTS_AT_ONCE):
        part = slice(first, first + _OUTPUTS_AT_ONCE)
        made = F.linear(exact, layer.weight[part].float()).mul_(layer.scale[:, part]).mul_(scale)
        out[:, part] = made if layer.bias is None else made.add_(layer.bias[part])
    return out


def bytes_per_row(inputs: int, outputs: int, dtype: torch.dtype) -> int:
    """At most how many bytes a row holds while its outputs are made of [inputs], in `dtype`."""
    made = 2 + (0 if dtype == torch.bfloat16 else dtype.itemsize)
    return outputs * made + 9 * inputs + 4 * min(outputs, _OUTPUTS_AT_ONCE)


# --- the op ---


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias by 8-bit floats, for inference; see the module's docstring for the numbers.

    The quantized weight is kept until the parameter changes, see `packing.packed`.

    Args:
        x: [..., W], float; any strides.
        weight: [O, W], float.
        bias: [O], float.

    Returns:
        [..., O] in x's dtype, or autocast's where it is on: the numbers of bfloat16.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes do not fit together, if W or O is no multiple of 16, where gradients are wanted, and
            where it cannot serve: in the transforms of torch.func, and for devices and classes of tensors without it.
    """
    given = {"x": x, "weight": weight, "bias": bias}
    for name, tensor in given.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point dtype, got {tensor.dtype}")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected [O, W], got {tuple(weight.shape)}")
    outputs, inputs = weight.shape
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(f"x: expected [..., {inputs}], got {tuple(x.shape)}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias: expected shape ({outputs},), got {tuple(bias.shape)}")
    check_tensors(x.device, (x, weight, bias))
    if (reason := why_not_shape(inputs, outputs)) is not None:
        raise refused(reason)
    return fp8_linear_op(x.to(dtype_of_products(x)), weight, bias)


def _fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kind = x.device.type
    without_autocast = torch.autocast(kind, enabled=False) if has_autocast(kind) else nullcontext()
    with without_autocast, torch.cuda.device_of(x):
        rows = x.reshape(-1, x.shape[-1])
        layer = packed("fp8 linear", [weight, bias], quantized_layer)
        made = layer(rows) if len(rows) else rows.new_empty(0, len(weight))
        return made.to(x.dtype).view(*x.shape[:-1], len(weight))


def _fp8_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# one node in a compiled graph too, which finds the quantized weight that is kept
fp8_linear_op = register(
    "fp8_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _fp8_linear,
    _fp8_linear_fake,
    tags=(torch.Tag.pt2_compliant_tag,),
)


# --- where it serves ---


def check_precision(precision: str | None, device: torch.device | None = None, width: int = 0) -> None:
    """Raise a ValueError if it is neither None nor one of those there are, or not to be had on a device."""
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
        if device is not None and (reason := why_not_fp8(device, width)) is not None:
            raise refused(reason)


def check_tensors(device: torch.device, tensors: Sequence[Tensor | None]) -> None:
    """Raise a ValueError, saying why, where a product of these tensors cannot be in fp8.

    Args:
        device: where it would be.
        tensors: all that it is made of.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and wants_gradient(given):
        raise refused("it is for inference and has no gradient; call it under torch.no_grad()")
    if any(type(tensor) not in (Tensor, Parameter) for tensor in given):
        raise refused("a tensor is of a subclass with rules of its own")
    if (reason := why_not_fp8(device)) is not None:
        raise refused(reason)


def refused(reason: str) -> ValueError:
    """What says why a call cannot be in fp8."""
    return ValueError(f"precision: 'fp8' cannot serve: {reason}")


def why_not_shape(inputs: int, outputs: int) -> str | None:
    """Why no layer of such a weight is in fp8, on any device; None if one is."""
    if inputs % MULTIPLE or outputs % MULTIPLE:
        return f"its inputs and outputs must be multiples of {MULTIPLE}, not {inputs} and {outputs}"
    return None


@constant
def why_not_fp8(device: torch.device, width: int = 0) -> str | None:
    """Why no product of this width can be made in fp8 on a device; None where one can."""
    if is_transforming() or is_forward_mode():
        return "it has no rules for the transforms of torch.func, nor for dual numbers"
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return f"it runs on CUDA and on CPUs, not on {device.type}"
    return None if width % MULTIPLE == 0 else f"on a GPU W must be a multiple of {MULTIPLE}, not {width}"


@constant
def why_not_scaled(device: torch.device) -> str | None:
    """Why a device multiplies the quantized numbers in float32; None where it has torch's scaled product."""
    if device.type != "cuda":
        return f"no scaled products on {device.type}"
    if (arch := architecture(device)) < 89:
        needed = "a GPU of compute capability 8.9 (Ada, Hopper or later)"
        return f"a scaled product needs {needed}, this one has {arch // 10}.{arch % 10}"
    return None


def why_not_kernel(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why rows of a width are quantized in plain PyTorch; None where one kernel does it."""
    if (reason := why_not_on(device, dtype)) is not None:
        return reason
    if 0 < architecture(device) < 89:  # 0 is Triton's interpreter
        return "it writes 8-bit floats, for which a GPU has instructions from compute capability 8.9 on"
    return None if width <= MAX_QUANTIZED else f"it holds a row in one program: up to {MAX_QUANTIZED} wide, not {width}"


def explain_fp8(device: torch.device, width: int, why_not: str | None = None) -> tuple[str, str]:
    """What makes products in fp8 where they are asked for, and why; `why_not`: a reason against it."""
    if (reason := why_not or why_not_fp8(device, width)) is not None:
        return "nothing", reason
    if (reason := why_not_scaled(device)) is not None:
        return "the same numbers in float32", reason
    by = "plain PyTorch" if why_not_kernel(device, torch.bfloat16, width) else "a Triton kernel"
    return f"rows by {by}, one scaled product by cuBLAS or CUTLASS", UNMEASURED
