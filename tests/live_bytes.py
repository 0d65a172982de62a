"""Counts the bytes of the tensors that are alive, operation by operation: the same number in every run."""

from __future__ import annotations

import weakref
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages made inside the block; `peak` is the most that were alive at a time.

    Our own ops go around the dispatcher as they do where nobody looks, so that what they make inside counts too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __enter__(self) -> LiveBytes:
        self._directly = [  # a mock would keep the tensors that it was called with
            patch(f"uniflow_kernels.ops.{module}.is_watched", lambda *tensors: False)
            for module in ("registration", "patches", "images")
        ]
        for one in self._directly:
            one.start()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for one in self._directly:
            one.stop()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if _is_plain(tensor)}
        results = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if _is_plain(tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self._count(tensor)
        return results

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._known:
            return

        def freed(_: object) -> None:
            del self._known[address]
            self.now -= size

        self._known[address] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and not value._is_zerotensor()  # of no memory
