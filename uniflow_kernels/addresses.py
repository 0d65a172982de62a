"""What the compiled parts, for CUDA and for the CPU, take for tensors: addresses, numbers for dtypes, and strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from uniflow_kernels.source import Source

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
FLOATS = frozenset(TYPES) - {torch.uint8}


def address_of(tensor: Tensor | None) -> int:
    """Where it lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def source_of(
    module: Any, rows: Callable[[Tensor | None], Any], source: Source, scale_and_shift: Tensor | None, columns: int
) -> Any:
    """A part's own `Source` of what flow matching makes patches and noise of.

    Args:
        module: the part.
        rows: what makes its `Rows` of a tensor.
        source: of patches and noise.
        scale_and_shift: of the channels.
        columns: length of a row of x_t or of a velocity.
    """
    images = source.images
    return module.Source(
        images.data_ptr(),
        TYPES[images.dtype],
        tuple(images.shape),
        images.stride(),
        address_of(scale_and_shift),
        source.patch_size,
        source.repeats,
        rows(source.noise),
        source.number,
        source.offset,
        address_of(source.held),
        source.first_row,
        columns,
    )


def layers_of(
    student: Sequence[Tensor], teacher: Sequence[Tensor], gradients: Sequence[Tensor], powers: Tensor | None
) -> list[tuple[int, ...]]:
    """Addresses of each layer's features, gradient and powers, 0 for what is not there, and the features' strides."""
    addresses = [gradient.data_ptr() for gradient in gradients] or [0] * len(student)
    of_layers = [0] * len(student) if powers is None else [own.data_ptr() for own in powers.unbind()]
    return [
        (s.data_ptr(), t.data_ptr(), address, own, *s.stride()[:2], *t.stride()[:2])
        for s, t, address, own in zip(student, teacher, addresses, of_layers, strict=True)
    ]
