"""The modulations of all blocks as one product of 8-bit floats, for inference.

Three fifths of a flow head's work are products of one tensor, SiLU(y), with each block's modulation layer. Here all
layers are one, in fp8: see `uniflow_kernels.ops.fp8_linear` for the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from uniflow_kernels.ops.flow_blocks import Affine, Given
from uniflow_kernels.ops.fp8_linear import QuantizedLayer, check_precision, check_tensors, quantized
from uniflow_kernels.packing import packed

# Rows of modulations that are held at a time: at W = 1024 and depth 12, 319 MB; W1's product fills a GPU from here on.
CHUNK_ROWS = 4096


class QuantizedLayers(QuantizedLayer):
    """The layers of all modulations side by side, as one: those of the blocks' groups, then that of the last norm.

    There are O = 3W outputs for each group, and 2W for the last norm if it is modulated.
    """

    @classmethod
    def of(cls, modulations: Sequence[Affine], final: Affine | None) -> QuantizedLayers:
        """Those of layers as `fused_flow_blocks` takes them; kept until one changes, see `packing.packed`."""
        layers = [*modulations, *([] if final is None else [final])]
        return packed("fp8", [tensor for layer in layers for tensor in layer], _side_by_side)

    def given(self, a: Tensor, dtype: torch.dtype) -> Given:
        """What is made of SiLU(y) [C, W], taken apart, in `dtype`."""
        width = a.shape[1]
        last = len(self.weight) // width % 3 * width  # 2W of the last norm, or nothing
        *groups, final = self(a).to(dtype).split([3 * width] * (len(self.weight) // (3 * width)) + [last], dim=1)
        return Given(groups, final if last else None)


def _side_by_side(*tensors: Tensor | None) -> QuantizedLayers:
    weights, biases = tensors[::2], tensors[1::2]
    layers = [quantized(weight) for weight in weights if weight is not None]
    bias = None
    if any(tensor is not None for tensor in biases):
        sizes = [len(weight) for weight, _ in layers]
        bias = torch.cat(
            [
                layers[0][1].new_zeros(size) if own is None else own.float()
                for own, size in zip(biases, sizes, strict=True)
            ]
        ).to(torch.bfloat16)
    scale = torch.cat([scale for _, scale in layers]).t()
    return QuantizedLayers(torch.cat([weight for weight, _ in layers]), scale, bias)


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
    check_tensors(x.device, (x, y, *tensors))
    check_precision("fp8", x.device, x.shape[-1])
