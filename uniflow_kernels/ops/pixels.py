"""Numbers of channels, such as mean and standard deviation: checked, and brought to a device once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from uniflow_kernels.ops.registration import is_watched


def check_normalization(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> None:
    """Raise a ValueError unless there are both, with a number for each channel, or neither."""
    if (mean is None) != (std is None):
        raise ValueError("mean, std: expected both or neither")
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and len(value) != channels:
            raise ValueError(f"{name}: expected {channels} numbers, one a channel, got {len(value)}")


def per_channel(pairs: tuple[tuple[float, float], ...], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[C, 2], on the device of `like`."""
    if is_watched(like):  # what a compiler traces with must not be kept; a copy of a list would wait for the device
        numbers = like.new_empty(2 * len(pairs), dtype=dtype)
        for place, number in enumerate(itertools.chain(*pairs)):
            numbers[place].fill_(number)
        return numbers.view(-1, 2)
    return _per_channel(pairs, like.device, dtype)


@functools.lru_cache(64)  # to copy it to a GPU takes longer than to use it
def _per_channel(pairs: tuple[tuple[float, float], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in that mode could not be used outside it
        return torch.tensor(pairs, dtype=dtype, device=device).reshape(-1, 2)
