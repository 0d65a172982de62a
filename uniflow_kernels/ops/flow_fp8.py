"""The modulations of all blocks as one product of 8-bit floats (float8_e4m3fn), for inference.

Three fifths of a flow head's work are products of one tensor, SiLU(y), with each block's modulation layer. Here SiLU(y)
is scaled row by row, and the weights output by output, so that the largest number of each is 448, the largest of e4m3;
all layers are one product, summed in float32, scaled back and rounded to bfloat16, as torch's scaled products by rows
are. Those need a GPU; on a CPU the same numbers are multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from uniflow_kernels.ops.flow_blocks import Affine, Given, check_choice
from uniflow_kernels.ops.flow_choice import UNMEASURED
from uniflow_kernels.ops.registration import wants_gradient
from uniflow_kernels.packing import packed
from uniflow_kernels.torch_private import constant, is_forward_mode, is_transforming
from uniflow_kernels.triton_kernels import architecture

PRECISIONS = ("fp8",)
LARGEST = 448.0  # of e4m3
# Rows of modulations that are held at a time: at W = 1024 and depth 12, 319 MB; W1's product fills a GPU from here on.
CHUNK_ROWS = 4096

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of rows of zeros
_OUTPUTS_AT_ONCE = 1024  # of the product on a CPU, whose factors are float32 there


def check_precision(precision: str | None, device: torch.device | None = None, width: int = 0) -> None:
    """Raise a ValueError if it is neither None nor one of those there are, or not to be had on a device."""
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
        if device is not None and (reason := why_not_fp8(device, width)) is not None:
            raise refused(reason)


def bytes_per_row(width: int, outputs: int, dtype: torch.dtype) -> int:
    """At most how many bytes a row holds while its modulations [outputs] are made of SiLU(y) [width], in `dtype`."""
    made = 2 + (0 if dtype == torch.bfloat16 else dtype.itemsize)
    return outputs * made + 9 * width + 4 * min(outputs, _OUTPUTS_AT_ONCE)


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[R, W] -> the same in float8_e4m3fn, each row divided by its scale, and the scales, [R, 1] in float32.

    A scale is the row's largest magnitude over 448, so that nothing overflows. With a NaN or an infinity among its
    numbers a row's scale is one, and so is all that is made of the row.
    """
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    scale = (largest / LARGEST).clamp(min=_SMALLEST_SCALE)
    return (rows / scale).to(torch.float8_e4m3fn), scale


class QuantizedLayers(NamedTuple):
    """The layers of all modulations side by side: those of the blocks' groups, then that of the last norm.

    Args:
        weight: [O, W], float8_e4m3fn, with O = 3W for each group, and 2W for the last norm if it is modulated.
        scale: what each row of the weight was divided by, [1, O], float32.
        bias: [O], bfloat16; None if no layer has one.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, modulations: Sequence[Affine], final: Affine | None) -> QuantizedLayers:
        """Those of layers as `fused_flow_blocks` takes them; kept until one changes, see `packing.packed`."""
        layers = [*modulations, *([] if final is None else [final])]
        return packed("fp8", [tensor for layer in layers for tensor in layer], _side_by_side)

    def __call__(self, a: Tensor) -> Tensor:
        """SiLU(y) [C, W] to all modulations [C, O], bfloat16."""
        q, scale = quantize(a)
        return scaled_product(q, scale, self) if a.is_cuda else multiplied(q, scale, self)

    def given(self, a: Tensor, dtype: torch.dtype) -> Given:
        """The same, taken apart, in `dtype`."""
        width = a.shape[1]
        last = len(self.weight) // width % 3 * width  # 2W of the last norm, or nothing
        *groups, final = self(a).to(dtype).split([3 * width] * (len(self.weight) // (3 * width)) + [last], dim=1)
        return Given(groups, final if last else None)


def scaled_product(q: Tensor, scale: Tensor, layers: QuantizedLayers) -> Tensor:
    """All modulations [C, O] of rows that were quantized, by torch's scaled product."""
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(
        q, layers.weight.t(), scale, by_row, layers.scale, by_row, bias=layers.bias, output_dtype=torch.bfloat16
    )


def multiplied(q: Tensor, scale: Tensor, layers: QuantizedLayers) -> Tensor:
    """The same where there is none: numbers and order of what it does to them, in float32."""
    exact, out = q.float(), q.new_empty(len(q), len(layers.weight), dtype=torch.bfloat16)
    for first in range(0, len(layers.weight), _OUTPUTS_AT_ONCE):
        part = slice(first, first + _OUTPUTS_AT_ONCE)
        made = F.linear(exact, layers.weight[part].float()).mul_(layers.scale[:, part]).mul_(scale)
        out[:, part] = made if layers.bias is None else made.add_(layers.bias[part])
    return out


def _side_by_side(*tensors: Tensor | None) -> QuantizedLayers:
    weights, biases = tensors[::2], tensors[1::2]
    quantized = [quantize(weight) for weight in weights if weight is not None]
    bias = None
    if any(tensor is not None for tensor in biases):
        sizes = [len(weight) for weight, _ in quantized]
        bias = torch.cat(
            [
                quantized[0][1].new_zeros(size) if own is None else own.float()
                for own, size in zip(biases, sizes, strict=True)
            ]
        ).to(torch.bfloat16)
    scale = torch.cat([scale for _, scale in quantized]).t()
    return QuantizedLayers(torch.cat([weight for weight, _ in quantized]), scale, bias)


def chunks(conditions: int, repeat: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Conditions whose modulations are made at a time, and rows that follow each other and take them.

    Args:
        conditions, repeat: row r takes condition (r // repeat) % conditions.
        rows: R.
    """
    if rows == 0:
        return
    if conditions <= CHUNK_ROWS:
        yield slice(0, conditions), slice(0, rows)
        return
    for first in range(0, conditions, CHUNK_ROWS):
        last = min(first + CHUNK_ROWS, conditions)
        for top in range(0, rows, conditions * repeat):
            yield slice(first, last), slice(top + first * repeat, top + last * repeat)


def check_fp8(x: Tensor, y: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Raise a ValueError, saying why, where a call cannot have its modulations in fp8.

    Args:
        x, y: as `fused_flow_blocks` takes them.
        tensors: all weights.
    """
    given = [x, y, *(tensor for tensor in tensors if tensor is not None)]
    if torch.is_grad_enabled() and wants_gradient(given):
        reason: str | None = "it is for inference and has no gradient; call it under torch.no_grad()"
    elif any(type(tensor) not in (Tensor, Parameter) for tensor in given):
        reason = "a tensor is of a subclass with rules of its own"
    else:
        reason = why_not_fp8(x.device, x.shape[-1])
    if reason is not None:
        raise refused(reason)


def refused(reason: str) -> ValueError:
    """What says why a call cannot be in fp8."""
    return ValueError(f"precision: 'fp8' cannot serve: {reason}")


def explain_fp8(device: torch.device, width: int, why_not: str | None = None) -> tuple[str, str]:
    """What makes modulations in fp8 where they are asked for, and why; `why_not`: a reason against it."""
    if (reason := why_not or why_not_fp8(device, width)) is not None:
        return "nothing", reason
    if device.type == "cpu":
        return "the same numbers in float32", "no scaled products on cpu"
    return "one scaled product by cuBLAS or CUTLASS", UNMEASURED


@constant
def why_not_fp8(device: torch.device, width: int) -> str | None:
    """Why modulations of this width cannot be made in fp8 on a device; None where they can."""
    if is_transforming() or is_forward_mode():
        return "it has no rules for the transforms of torch.func, nor for dual numbers"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"it runs on CUDA and on CPUs, not on {device.type}"
    if (arch := architecture(device)) < 89:
        return f"it needs a GPU of compute capability 8.9 (Ada, Hopper or later), this one has {arch // 10}.{arch % 10}"
    return None if width % 16 == 0 else f"on a GPU W must be a multiple of 16, not {width}"
