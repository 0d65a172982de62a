"""What plain PyTorch works on at a time, so that its temporaries stay small, and on a CPU in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

CPU_CHUNK = 1 << 18  # elements
GPU_CHUNK = 1 << 27

Place = tuple[slice, ...] | None  # None is everything


def chunk(device: torch.device) -> int:
    """About how many elements make a piece."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


def part(tensor: Tensor, place: Place) -> Tensor:
    """A view of `tensor`; without a call where it is everything, since for small tensors calls are what takes time."""
    return tensor if place is None else tensor[place]


def head(rows: Tensor, length: int) -> Tensor:
    """The first `length` columns of `rows`."""
    return rows if rows.shape[-1] == length else rows[..., :length]
