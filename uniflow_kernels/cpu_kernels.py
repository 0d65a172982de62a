"""The compiled CPU part, where it was built: tensors become addresses and strides, and torch's threads share the work.

csrc/cpu holds the loops. Which inputs they take is said by the `why_not_*` functions; the others rely on these.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uniflow_kernels.source import Source

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}


def why_not_built() -> str | None:
    """Why the compiled part is not there; None where it is."""
    if not _is_built():
        return "the CPU part was not built: no C++ compiler was found at installation, or UNIFLOW_CPU=0"
    return None


def why_not(*tensors: Tensor | None) -> str | None:
    """Why the compiled part does not take such tensors: their device or their dtype."""
    for tensor in tensors:
        if tensor is None:
            continue
        if reason := why_not_on(tensor.device):
            return reason
        if tensor.dtype not in _TYPES or tensor.dtype == torch.uint8:
            return f"it takes float32, float16 and bfloat16, not {tensor.dtype}"
        if tensor.is_neg():
            return "the numbers of a tensor are stored negated"
    return None


def why_not_on(device: torch.device) -> str | None:
    """Why the compiled part does not work on this device."""
    return why_not_built() if device.type == "cpu" else f"it runs on CPUs, not on {device.type}"


def instructions() -> str:
    """The level of instructions that is used here: "avx512", "avx2" or "baseline"."""
    return _level().name


def shares_threads() -> bool:
    """Whether it found torch's threads; else one thread does all."""
    return importlib.import_module("uniflow_kernels._cpu").SHARES_THREADS


def seeded_noise(seeds: Tensor, offset: int, first_row: int, noise: Tensor) -> None:
    """Write `noise` [rows, columns] in float32, of S seeds [S] for as many groups of rows."""
    rows, columns = noise.shape
    if not noise.numel():
        return
    groups = len(seeds)
    _level().seeded_noise(
        seeds.contiguous().data_ptr(),
        groups,
        offset,
        first_row,
        rows // groups,
        columns,
        noise.data_ptr(),
        torch.get_num_threads(),
    )


@functools.cache
def _is_built() -> bool:
    return importlib.util.find_spec("uniflow_kernels._cpu") is not None


@functools.cache
def _level() -> Any:
    """The kernels of the best level that this processor has."""
    return importlib.import_module("uniflow_kernels._cpu").levels()[0]
