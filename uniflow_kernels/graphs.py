"""CUDA graphs of functions of tensors, captured for each kind of input and kept in a bounded cache.

For work that many small launches make up: the host then submits one. Inputs are copied to buffers that stay where they
are and results out of them, so that a caller sees nothing of it; what the function reads besides (a model's parameters)
is read where it lies, so that a change of its values is seen.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from uniflow_kernels.choice import requested
from uniflow_kernels.torch_private import is_transforming

Inputs = Sequence[Tensor | None]
Function = Callable[..., Tensor]


def why_not_graph(device: torch.device, read: Sequence[Tensor | None]) -> str | None:
    """Why no CUDA graph can serve a call on this device that reads these tensors; None where one can."""
    if torch.compiler.is_compiling():
        return "torch.compile is at work"
    if is_transforming():
        return "a transform of torch.func is at work"
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}"
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in read):
        return "gradients are wanted; use torch.no_grad() or torch.inference_mode() if not"
    if torch.cuda.is_current_stream_capturing():
        return "the caller is capturing a graph"
    return None


_CAPTURES = threading.Lock()  # one at a time: a capture begins by waiting for the whole device


class Place:
    """Where the graphs of one cache work: they share memory, so one runs after the other, whatever their streams."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # of its own: graphs captured on one stream share a workspace of cuBLAS
        self.done = torch.cuda.Event()

    def wait(self) -> None:
        """Until the last graph has run."""
        self.done.synchronize()


class Graph:
    """One function, captured once with copies of the inputs."""

    def __init__(self, function: Function, inputs: Inputs, place: Place) -> None:
        self.place = place
        autocast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda")
        # buffers of inference mode could not be written to outside of it; casts of weights that autocast keeps could go
        with (
            _CAPTURES,
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cuda", dtype, autocast, cache_enabled=False),
        ):
            self.inputs = [None if given is None else given.clone() for given in inputs]
            place.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(place.stream):
                function(*self.inputs)  # libraries are loaded and kernels compiled before the capture
            self.graph = torch.cuda.CUDAGraph()
            # another thread's allocations are no part of it and do not end it
            with torch.cuda.graph(self.graph, place.pool, place.stream, capture_error_mode="thread_local"):
                self.output = function(*self.inputs)

    def __call__(self, inputs: Inputs) -> Tensor:
        """The function of other inputs of the same shapes and dtypes."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self.place.done)
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given, non_blocking=True)
        self.graph.replay()
        output = self.output.clone()
        self.place.done.record(stream)
        return output


class GraphCache:
    """Graphs by kind of input. A kind is captured when it comes the second time while it is still among the last ones.

    Safe to call from several threads and streams. Belongs to one set of parameters: where one of them has moved, all
    graphs are dropped.

    Args:
        name: of what is captured, for warnings.
        limit: how many kinds are remembered.
    """

    def __init__(self, name: str, limit: int = 8) -> None:
        self.name = name
        self.limit = limit
        self._graphs: OrderedDict[Hashable, Graph | str] = OrderedDict()  # or "seen" once, or "refused"
        self._parameters: Hashable = None
        self._place: Place | None = None
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """How many graphs there are."""
        return sum(not isinstance(graph, str) for graph in self._graphs.values())

    def __call__(self, function: Function, inputs: Inputs, parameters: Sequence[Tensor], how: Hashable) -> Tensor:
        """function(*inputs), from a graph where there is one.

        Args:
            function: makes one tensor from the inputs; the same operations for the same `how` and kind of inputs, none
                of which waits for the device or draws random numbers.
            inputs: on one CUDA device; None for one that is not there.
            parameters: all that the function reads besides.
            how: settings of the function.
        """
        with self._lock, torch.cuda.device_of(inputs[0]):
            self._keep_only(tuple((tensor.data_ptr(), tensor.dtype) for tensor in parameters))
            graph = self._graph(function, inputs, (how, *_surroundings(), *map(_kind, inputs)))
            if graph is not None:
                return graph(inputs)
        return function(*inputs)

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            if self._place is not None:
                self._place.wait()
            self._graphs.clear()
            self._place = None

    def _keep_only(self, parameters: Hashable) -> None:
        if parameters != self._parameters:
            self.clear()
            self._parameters = parameters

    def _graph(self, function: Function, inputs: Inputs, key: Hashable) -> Graph | None:
        graph = self._graphs.get(key)
        if graph is None:
            self._graphs[key] = "seen"
            if len(self._graphs) > self.limit:
                self._forget_oldest()
            return None
        self._graphs.move_to_end(key)
        if graph == "seen":
            graph = self._graphs[key] = self._captured(function, inputs) or "refused"
        return None if isinstance(graph, str) else graph

    def _forget_oldest(self) -> None:
        if self._place is not None:
            self._place.wait()
        self._graphs.popitem(last=False)
        warnings.warn(
            f"{self.name}: more than {self.limit} kinds of input take turns; those that do not come back soon run "
            "without a CUDA graph",
            stacklevel=5,
        )

    def _captured(self, function: Function, inputs: Inputs) -> Graph | None:
        try:
            self._place = self._place or Place()
            return Graph(function, inputs, self._place)
        except Exception as error:  # whatever a graph cannot hold
            warnings.warn(f"{self.name}: runs without a CUDA graph: {error}", stacklevel=5)
            return None


def _kind(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _surroundings() -> tuple[Any, ...]:
    """What else decides which kernels run."""
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return requested(), autocast, torch.get_float32_matmul_precision()
