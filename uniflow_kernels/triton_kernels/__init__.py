"""Triton kernels, imported by the ops when one is chosen: the package itself needs neither Triton nor a GPU."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch
from torch import Tensor

from uniflow_kernels.choice import requested

MOST_DISTILLED_COLUMNS = 8192  # a token of both sides stays in registers
_INSTALLED = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unit_of(*numbers: int) -> int:
    """The most elements of which all of these row lengths and strides are multiples: how wide an access may be."""
    return next(unit for unit in (8, 4, 1) if all(number % unit == 0 for number in numbers))


def why_not(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel takes such tensors: their devices or dtypes; None where they do."""
    first: torch.device | None = None
    for tensor in tensors:
        if tensor is None:
            continue
        if reason := why_not_on(tensor.device, tensor.dtype):
            return reason
        first = first or tensor.device
        if tensor.device != first:
            return "the tensors are on different devices"
    return None


def why_not_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel takes tensors of this device and dtype. Triton's interpreter must be asked for by name."""
    if not _INSTALLED:
        return "Triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and requested() == "triton"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return f"it runs on CUDA, not on {device.type}"
    if device.type == "cuda" and architecture(device) < 80:
        return "it needs compute capability 8.0"
    if dtype not in _DTYPES:
        return f"it takes float32, float16 and bfloat16, not {dtype}"
    return None


@lru_cache
def architecture(device: torch.device) -> int:
    """The compute capability times ten; 0 on a CPU, where Triton's interpreter runs."""
    if device.type == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
