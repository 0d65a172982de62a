"""Which implementation an op runs on: plain PyTorch ("eager"), Triton, or a compiled part, "cuda" or "cpu"."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

BACKENDS = ("auto", "eager", "triton", "cuda", "cpu")

_chosen: ContextVar[str | None] = ContextVar("uniflow_backend", default=None)
_in_graph: ContextVar[bool] = ContextVar("uniflow_in_graph", default=False)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run ops on one backend inside the block: "auto", "eager", "triton", "cuda" or "cpu".

    "auto" takes the fastest that can serve the input; the environment variable UNIFLOW_BACKEND sets what holds outside
    any block. A backend asked for by name that cannot serve an input raises; nothing else is taken instead.

    A block holds in its thread (or asyncio task) alone, UNIFLOW_BACKEND in all. On a GPU autograd works on a thread of
    its own: what a backward pass chooses anew there, it chooses as outside any block.

    Raises:
        ValueError: for another name.
    """
    token = _chosen.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def requested() -> str:
    """The backend asked for: by the innermost `backend` block, else by UNIFLOW_BACKEND, else "auto"."""
    wanted = _chosen.get() or os.environ.get("UNIFLOW_BACKEND", "auto")
    return wanted if wanted in BACKENDS else _checked(wanted, "UNIFLOW_BACKEND")


@contextmanager
def in_graph() -> Iterator[None]:
    """Inside the block calls are of a CUDA graph: those that are captured, and those before that compile what they use.

    A replay has no launches to wait for, so there what takes a GPU the least time is the fastest. Whoever captures must
    say so: a stream knows only that it is being captured, when it is too late to load another kernel.
    """
    token = _in_graph.set(True)
    try:
        yield
    finally:
        _in_graph.reset(token)


def is_in_graph() -> bool:
    """Whether the call is inside an `in_graph` block."""
    return _in_graph.get()


def choose(op: str, why_not: Mapping[str, str | None]) -> str:
    """Which backend serves one call of an op.

    Args:
        op: its name, for the error.
        why_not: for each kernel backend that the op has, the fastest first: why it cannot serve this input, None where
            it can.

    Returns:
        One of the keys of `why_not`, or "eager".

    Raises:
        ValueError: if the backend asked for cannot serve, saying why.
    """
    wanted = requested()
    if wanted == "auto":
        return next((name for name, reason in why_not.items() if reason is None), "eager")
    if wanted == "eager":
        return wanted
    reason = why_not.get(wanted, f"{op} has no such kernel")
    if reason is not None:
        raise ValueError(f"{op}: backend {wanted!r} cannot serve this input: {reason}")
    return wanted


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name
