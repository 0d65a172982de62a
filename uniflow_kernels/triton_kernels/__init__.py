"""Triton kernels, imported by the ops when one is chosen: the package itself needs neither Triton nor a GPU."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from uniflow_kernels.choice import requested

MOST_DISTILLED_COLUMNS = 8192  # a token of both sides stays in registers
_INSTALLED = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel takes such tensors: their device or their dtype. Triton's interpreter must be asked for."""
    if not _INSTALLED:
        return "Triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and requested() == "triton"
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and interpreted):
            return f"it runs on CUDA, not on {tensor.device.type}"
        if tensor.device != given[0].device:
            return "the tensors are on different devices"
        if tensor.dtype not in _DTYPES:
            return f"it takes float32, float16 and bfloat16, not {tensor.dtype}"
    return None
