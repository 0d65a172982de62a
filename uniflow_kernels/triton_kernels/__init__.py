"""Triton kernels, imported by the ops when one is chosen: the package itself needs neither Triton nor a GPU."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sysconfig
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from uniflow_kernels.choice import requested

MAX_QUANTIZED = 16384  # columns of a row, which one program holds whole
MOST_DISTILLED_COLUMNS = 8192  # a token of both sides stays in registers
_INSTALLED = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unit_of(*numbers: int) -> int:
    """The most elements of which all of these row lengths and strides are multiples: how wide an access may be."""
    unit = math.gcd(8, *numbers)
    return 1 if unit == 2 else unit


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
    if device.type == "cuda" and (reason := why_not_launched()):
        return reason
    if dtype not in _DTYPES:
        return f"it takes float32, float16 and bfloat16, not {dtype}"
    return None


@lru_cache
def why_not_launched() -> str | None:
    """Why Triton can start no kernel here: before 3.8 it compiles what starts each in C. None where it can."""
    if not _INSTALLED:
        return "Triton is not installed"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8):
        return None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return f"Triton {triton.__version__} needs a C compiler to start a kernel: gcc, clang, or CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's own; as Triton does
    if not (Path(sysconfig.get_paths(scheme)["include"]) / "Python.h").is_file():
        return f"Triton {triton.__version__} needs Python.h to start a kernel: the package python3-dev, or its like"
    return None


@lru_cache
def architecture(device: torch.device) -> int:
    """The compute capability times ten; 0 on a CPU, where Triton's interpreter runs."""
    if device.type == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
