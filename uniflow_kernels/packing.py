"""Tensors derived from parameters (padded, put side by side, cast), kept until a parameter changes.

They live here and nowhere else: not in a module, so that state_dict, deepcopy and pickle know nothing of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from uniflow_kernels.torch_private import is_traced, storage_of, uncompiled, version_of

Derived = TypeVar("Derived")


class _Kept(NamedTuple):
    """What was derived, the state its sources were in, and what ties it to their memory.

    The references are to storages: a tensor with one of its own could not be swapped with another.
    """

    derived: Any
    state: Hashable
    storages: list[weakref.ref[torch.UntypedStorage]]


_kept: dict[Hashable, _Kept] = {}
_steps = 0  # of any optimizer: fused ones change parameters without counting a version
_watching = False


def packed(kind: Hashable, sources: Sequence[Tensor | None], build: Callable[..., Derived]) -> Derived:
    """`build(*sources)`, or what it returned before if no source has changed since.

    A change is seen if it counts a version (in-place operations, `load_state_dict`), if it gives the source other
    memory (`.to()`, `.data = `), or if it is a step of a `torch.optim` optimizer. One that PyTorch cannot see, in place
    through `.data` or `data_ptr()` or by replaying a CUDA graph, needs a `forget()` after it.

    Built in every call, and not kept:

    - while torch.compile, torch.func or a dispatch mode traces
    - for what is no parameter, for subclasses, and for parameters without a version (made in inference mode)
    - in a distributed job: FSDP and its like gather weights into the same memory without counting a version
    - outside the default stream: a captured graph is to see later changes, its warm-up may leave nothing behind in the
      graph's memory, and no stream has to wait for what another made

    Args:
        kind: what is derived, with all that `build` depends on beside the sources.
        sources: tensors of one device, at least one; None for one that is not there.
        build: makes it. It is a constant to autograd, shares no memory with the sources, and is not changed by anyone.
    """
    given = [source for source in sources if source is not None]
    if torch.compiler.is_compiling() or not _lasts(given):
        with torch.no_grad():
            return build(*sources)
    _watch_optimizers()
    key = (kind, *map(id, sources))
    state = (_steps, *map(_state, given))
    known = _kept.get(key)
    if known is not None and known.state == state:
        return known.derived
    with torch.inference_mode(False), torch.no_grad():  # to be used outside inference mode as well
        derived = build(*sources)

    def drop(_: weakref.ref[torch.UntypedStorage]) -> None:
        _kept.pop(key, None)

    _kept[key] = _Kept(derived, state, [weakref.ref(source.untyped_storage(), drop) for source in given])
    return derived


@uncompiled
def forget(*_: object) -> None:
    """Drop all that is kept: after a change of parameters that PyTorch cannot see."""
    global _steps  # noqa: PLW0603 - one count for the process
    _steps += 1
    _kept.clear()


def _lasts(sources: list[Tensor]) -> bool:
    """Whether what is derived from them may be kept."""
    if is_traced():
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    if any(type(source) is not Parameter or source.is_inference() for source in sources):
        return False
    return may_last(sources[0].device)


def may_last(device: torch.device) -> bool:
    """Whether what is made on a device now may be kept: on CUDA only what the default stream makes, see `packed`."""
    return device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def _state(source: Tensor) -> Hashable:
    """What changes with the source's values or memory."""
    return storage_of(source), source.data_ptr(), version_of(source), source.dtype, source.shape, source.stride()


def _watch_optimizers() -> None:
    global _watching  # noqa: PLW0603 - once in the process
    if not _watching:
        _watching = True
        register_optimizer_step_post_hook(forget)
