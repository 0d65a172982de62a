"""The compiled CUDA part, where it was built: tensors become addresses, strides and a stream.

csrc/ holds the kernels. Which inputs they take is said by the `why_not_*` functions; the others rely on these.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uniflow_kernels.addresses import TYPES, address_of, layers_of, source_of
from uniflow_kernels.source import Source
from uniflow_kernels.stamp import is_current


def why_not_built() -> str | None:
    """Why the compiled part is not there; None where it is."""
    if not _is_built():
        return "the CUDA part was not built: no nvcc, UNIFLOW_CUDA=0 at installation, or other sources since"
    return None


def why_not(*tensors: Tensor | None) -> str | None:
    """Why no kernel of the compiled part takes such tensors: their device or their dtype."""
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if reason := why_not_on(tensor.device):
            return reason
        if tensor.device != given[0].device:
            return "the tensors are on different devices"
        if not tensor.is_floating_point() or tensor.dtype not in TYPES:
            return f"it takes float32, float16 and bfloat16, not {tensor.dtype}"
    return None


def why_not_on(device: torch.device) -> str | None:
    """Why no kernel of the compiled part runs on this device."""
    return why_not_built() if device.type == "cuda" else f"it runs on CUDA, not on {device.type}"


def why_not_patch(channels: int, patch_size: int, columns: int = 0, itemsize: int = 4) -> str | None:
    """Why no kernel serves patches of this size.

    Args:
        channels, patch_size: of a patch.
        columns: length of a row of x_t or of a velocity.
        itemsize: bytes that a pixel takes in shared memory.
    """
    if _module().tile_width(-(-channels * patch_size**2 // 4) * itemsize, columns, 1) == 0:
        return f"a patch of {channels} x {patch_size} x {patch_size} does not fit into its shared memory"
    return None


def interpolate(source: Source, scale_and_shift: Tensor | None, t: Tensor, x_t: Tensor) -> None:
    """Write x_t [k*B, N, columns]."""
    if not x_t.numel():
        return
    t = t.float().contiguous()
    made_of = _source(source, scale_and_shift, x_t.shape[-1])
    with torch.cuda.device(x_t.device):
        _module().interpolate(made_of, t.data_ptr(), t.ndim == 2, x_t.data_ptr(), TYPES[x_t.dtype], _stream())


def velocity_loss(
    source: Source,
    scale_and_shift: Tensor | None,
    velocity: Tensor,
    coefficients: Tensor | float,
    gradient: Tensor | None,
    losses: Tensor,
) -> None:
    """Write each token's loss [k*B, N], and the gradient of their sum unless it is None."""
    if not velocity.numel():
        return
    each, every = (coefficients.contiguous(), 0.0) if isinstance(coefficients, Tensor) else (None, coefficients)
    made_of = _source(source, scale_and_shift, velocity.shape[-1])
    with torch.cuda.device(velocity.device):
        _module().velocity_loss(
            made_of, _rows(velocity), address_of(each), every, address_of(gradient), losses.data_ptr(), _stream()
        )


def patchify(images: Tensor, rows: Tensor, patch_size: int) -> None:
    """Write `rows` [B, N, C*P*P]."""
    _move(images, rows, patch_size, cut=True)


def unpatchify(rows: Tensor, images: Tensor, patch_size: int) -> None:
    """Write `images` [B, C, H, W]."""
    _move(images, rows, patch_size, cut=False)


def _move(images: Tensor, rows: Tensor, patch_size: int, cut: bool) -> None:
    if not rows.numel():
        return
    with torch.cuda.device(images.device):
        _module().move_patches(
            images.data_ptr(),
            tuple(images.shape),
            images.stride(),
            rows.data_ptr(),
            rows.stride(),
            patch_size,
            images.itemsize,
            cut,
            _stream(),
        )


def cosine_distances(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    skip_tokens: int,
    gradients: Sequence[Tensor],
    powers: Tensor | None,
    distances: Tensor,
) -> None:
    """Write the distances [L, B, S - skip_tokens] of all layers, and their gradients unless there are none.

    With `powers` [L, B, S] each token's gradient is multiplied by a power of two, which is written there.
    """
    batch, length, width = student[0].shape
    if not student[0].numel():
        return
    teacher = [t.to(student[0].dtype) for t in teacher]  # it takes one dtype; nothing is copied that is of that
    layers = layers_of(student, teacher, gradients, powers)
    with torch.cuda.device(student[0].device):
        _module().cosine_distances(
            layers, batch, length, width, skip_tokens, TYPES[student[0].dtype], distances.data_ptr(), _stream()
        )


def scale(values: Tensor, factor: Tensor) -> None:
    """Multiply contiguous `values` by a scalar tensor, in place; nothing is written where it is 1."""
    factor = factor.float()
    with torch.cuda.device(values.device):
        _module().scale(values.data_ptr(), TYPES[values.dtype], values.numel(), factor.data_ptr(), _stream())


@functools.cache
def _is_built() -> bool:
    return is_current("_cuda")


def _module() -> Any:
    return importlib.import_module("uniflow_kernels._cuda")


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _rows(rows: Tensor | None) -> Any:
    if rows is None:
        return _module().Rows(0, 0, (0, 0))
    return _module().Rows(rows.data_ptr(), TYPES[rows.dtype], (rows.stride(0), rows.stride(1)))


def _source(source: Source, scale_and_shift: Tensor | None, columns: int) -> Any:
    return source_of(_module(), _rows, source, scale_and_shift, columns)
