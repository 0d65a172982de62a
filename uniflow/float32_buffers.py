"""Buffers that stay float32 in a module of another dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose buffers named in `float32_buffers` change their device with it, and their dtype never.

    For statistics of data, which `.bfloat16()` and `.to(dtype)` would round.
    """

    float32_buffers: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, was in before.items():
            now = getattr(self, name)
            if now.dtype != was.dtype:
                setattr(self, name, was.to(now.device))
        return self
