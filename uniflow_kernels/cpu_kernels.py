"""The compiled CPU part, where it was built: tensors become addresses and strides, and torch's threads share the work.

csrc/cpu holds the loops. Which inputs they take is said by the `why_not_*` functions; the others rely on these.
"""

from __future__ import annotations

import functools
import importlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniflow_kernels.addresses import FLOATS, TYPES, address_of, layers_of, source_of
from uniflow_kernels.source import Source
from uniflow_kernels.stamp import is_current


def why_not_built() -> str | None:
    """Why the compiled part is not there; None where it is."""
    if not _is_built():
        return "the CPU part was not built: no C++ compiler, UNIFLOW_CPU=0 at installation, or other sources since"
    return None


def why_not(*tensors: Tensor | None) -> str | None:
    """Why the compiled part does not take such tensors: their device or their dtype."""
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cpu:
            return why_not_on(tensor.device)
        if tensor.dtype not in FLOATS:
            return f"it takes float32, float16 and bfloat16, not {tensor.dtype}"
        if tensor.is_neg():
            return "the numbers of a tensor are stored negated"
    return why_not_built()


def why_not_on(device: torch.device) -> str | None:
    """Why the compiled part does not work on this device."""
    return why_not_built() if device.type == "cpu" else f"it runs on CPUs, not on {device.type}"


def why_not_images(device: torch.device, read: Sequence[torch.dtype], written: torch.dtype) -> str | None:
    """Why it does not turn rows of such dtypes into images of such a dtype."""
    wrong = [dtype for dtype in read if dtype not in TYPES] + [written] * (written not in TYPES)
    return why_not_on(device) or (f"it takes float32, float16 and bfloat16, not {wrong[0]}" if wrong else None)


def instructions() -> str:
    """The level of instructions that is used here: "avx512", "avx2" or "baseline"."""
    return _level().name


@functools.cache
def is_amds() -> bool:
    """Whether the processor is one of AMD, on which MKL, torch's library for products in float32, is no fast one."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "AuthenticAMD" in platform.processor()


def shares_threads() -> bool:
    """Whether it found torch's threads; else one thread does all."""
    return _module().SHARES_THREADS


def interpolate(source: Source, scale_and_shift: Tensor | None, t: Tensor, x_t: Tensor) -> None:
    """Write x_t [k*B, N, columns]."""
    if not x_t.numel():
        return
    t = t.float().contiguous()
    made_of = _source(source, scale_and_shift, x_t.shape[-1])
    _level().interpolate(made_of, t.data_ptr(), t.ndim == 2, x_t.data_ptr(), TYPES[x_t.dtype], torch.get_num_threads())


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
    _level().velocity_loss(
        _source(source, scale_and_shift, velocity.shape[-1]),
        _rows(velocity),
        address_of(each),
        every,
        address_of(gradient),
        losses.data_ptr(),
        torch.get_num_threads(),
    )


def patchify(images: Tensor, rows: Tensor, patch_size: int) -> None:
    """Write `rows` [B, N, C*P*P], which are contiguous."""
    _move(images, rows, patch_size, cut=True)


def unpatchify(rows: Tensor, images: Tensor, patch_size: int) -> None:
    """Write `images` [B, C, H, W]."""
    _move(images, rows, patch_size, cut=False)


def _move(images: Tensor, rows: Tensor, patch_size: int, cut: bool) -> None:
    if not rows.numel():
        return
    _level().move_patches(
        images.data_ptr(),
        tuple(images.shape),
        images.stride(),
        rows.data_ptr(),
        rows.stride(),
        patch_size,
        images.itemsize,
        cut,
        torch.get_num_threads(),
    )


def to_images(
    rows: Tensor,
    velocity: Tensor | None,
    dt: float,
    mean_and_std: Tensor | None,
    patch_size: int,
    clamp: bool,
    images: Tensor,
) -> None:
    """Write `images` [B, C, H, W] of rows + dt * velocity, [B, N, C*P*P] each; `mean_and_std` is [C, 2]."""
    if not rows.numel():
        return
    _level().to_images(
        _rows(rows),
        rows.stride(2),
        _rows(velocity),
        0 if velocity is None else velocity.stride(2),
        dt,
        address_of(mean_and_std),
        clamp,
        images.data_ptr(),
        TYPES[images.dtype],
        tuple(images.shape),
        images.stride(),
        patch_size,
        torch.get_num_threads(),
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
    layers = layers_of(student, teacher, gradients, powers)
    _level().cosine_distances(
        layers,
        batch,
        length,
        width,
        skip_tokens,
        (TYPES[student[0].dtype], TYPES[teacher[0].dtype]),
        distances.data_ptr(),
        torch.get_num_threads(),
    )


def scale(values: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply contiguous `values`, [..., D] each, in place by a scalar or by one number a row [...]."""
    factors = [factor.float().contiguous() for factor in factors]
    of_tensors = []
    for tensor, factor in zip(values, factors, strict=True):
        rows, count = factor.numel(), tensor.numel()
        if count:
            of_tensors.append((tensor.data_ptr(), factor.data_ptr(), rows, count // rows, TYPES[tensor.dtype]))
    _level().scale(of_tensors, torch.get_num_threads())


def seeded_noise(seeds: Tensor, offset: int, first_row: int, noise: Tensor) -> None:
    """Write `noise` [rows, columns] in float32, of S seeds [S], contiguous, for as many groups of rows."""
    rows, columns = noise.shape
    if not noise.numel():
        return
    groups = len(seeds)
    _level().seeded_noise(
        seeds.data_ptr(),
        groups,
        offset,
        first_row,
        rows // groups,
        columns,
        noise.data_ptr(),
        torch.get_num_threads(),
    )


def flow_blocks(
    x: Tensor,
    a: Tensor | None,
    weights: Sequence[Tensor | None],
    made: Sequence[Tensor],
    sizes: tuple[int, int, int, int],
    norm: str,
    eps: float,
    mlp: str,
    modulation_order: str,
    out: Tensor,
) -> None:
    """Write `out` [R, W], what the flow head's blocks and last norm make of x [R, W].

    Args:
        x: contiguous.
        a: what modulations are made of, [C, W] and contiguous; None if they are given.
        weights: contiguous; of the last norm's modulation, of each block's norm, up and down, and of each group's
            modulation, each with its bias.
        made: the modulations, where they are given: each group's [C, 3W], and the last norm's [C, 2W], if it has one.
        sizes: the number of blocks, of modulations that they have, of conditions, and of rows that follow each other
            under one condition.
        norm, eps, mlp, modulation_order: of the head.
        out: contiguous.
    """
    rows, width = x.shape
    if not rows:
        return
    weight_of_norm, down = weights[2], weights[6]
    assert weight_of_norm is not None
    assert down is not None
    _level().flow_blocks(
        x.data_ptr(),
        address_of(a),
        [address_of(weight) for weight in weights],
        [(modulation.data_ptr(), modulation.stride(0)) for modulation in made],
        out.data_ptr(),
        (rows, width, down.shape[1], *sizes),
        (TYPES[x.dtype], TYPES[weight_of_norm.dtype]),
        eps,
        norm == "rms",
        mlp == "swiglu",
        modulation_order == "scale-shift-gate",
        torch.get_num_threads(),
    )


@functools.cache
def _is_built() -> bool:
    return is_current("_cpu")


@functools.cache
def _module() -> Any:
    return importlib.import_module("uniflow_kernels._cpu")


@functools.cache
def _level() -> Any:
    """The kernels of the best level that this processor has."""
    return _module().levels()[0]


def _rows(rows: Tensor | None) -> Any:
    module = _module()
    if rows is None:
        return module.Rows(0, 0, 0, 0)
    return module.Rows(rows.data_ptr(), TYPES[rows.dtype], rows.stride(0), rows.stride(1))


def _source(source: Source, scale_and_shift: Tensor | None, columns: int) -> Any:
    return source_of(_module(), _rows, source, scale_and_shift, columns)
