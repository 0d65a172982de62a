"""CUDA graphs of functions of tensors, captured for each kind of input and kept in a bounded cache.

For work that many small launches make up: the host then submits one. Inputs are copied to buffers that stay where they
are and results out of them, so that a caller sees nothing of it; what the function reads besides (a model's parameters)
is read where it lies, so that a change of its values is seen.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from uniflow_kernels.choice import in_graph, requested
from uniflow_kernels.torch_private import (
    BUFFERS,
    CHILDREN,
    FORWARD_HOOKS,
    PARAMETERS,
    is_any_hooked,
    is_transforming,
)

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


# --- what a function reads ---


class Read(NamedTuple):
    """What calling a module reads at this moment.

    Args:
        tensors: all parameters and buffers.
        hooked: whether a hook would be fired in the forward pass.
        structure: the same object as long as no submodule, class, forward put on an instance, or norm's eps changes.
    """

    tensors: list[Tensor]
    hooked: bool
    structure: object


class Reader:
    """Finds what calling a module reads. The modules are walked through once; later it is seen whether they are those.

    No tensor and no hook is remembered: they are taken from the modules in every call, and where the tensors lie is for
    the caller to compare. A submodule that was replaced is held until the next call.

    Args:
        skipped: names of submodules of the module itself that are not called.
    """

    def __init__(self, skipped: Container[str] = ()) -> None:
        self.skipped = skipped
        self._known: _Known | None = None

    def __call__(self, module: nn.Module) -> Read:
        """Of a module; called with one and the same, and from any thread."""
        known = self._known
        if known is None or known.own[0] is not vars(module) or known.found != _found(known):
            known = self._known = self._walked(module)
        own = known.own
        held = filter(None, chain(map(PARAMETERS, own), map(BUFFERS, own)))
        tensors = [tensor for tensor in chain.from_iterable(map(dict.values, held)) if tensor is not None]
        hooked = is_any_hooked() or any(any(map(hooks, own)) for hooks in FORWARD_HOOKS)
        return Read(tensors, hooked, known.structure)

    def _walked(self, module: nn.Module) -> _Known:
        """Not holding the module itself, beside which this may be kept."""
        own = vars(module)
        below = [child for name, child in CHILDREN(own).items() if child is not None and name not in self.skipped]
        seen = set(map(id, below))
        for part in below:  # which grows
            for child in CHILDREN(vars(part)).values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    below.append(child)
        parts = [own, *map(vars, below)]
        known = _Known(below, parts, [part for part in parts if "eps" in part], (), object())
        return known._replace(found=_found(known))


class _Known(NamedTuple):
    """What was walked through: the modules below the first, the attributes of all and of norms, and what was found."""

    below: list[nn.Module]
    own: list[Mapping[str, Any]]
    norms: list[Mapping[str, Any]]
    found: tuple[Any, ...]
    structure: object


def _found(known: _Known) -> tuple[Any, ...]:
    """What tells whether a walk would find the same; modules are equal to themselves alone."""
    children = list(map(CHILDREN, known.own))
    return (
        list(map(type, known.below)),
        list(map(len, children)),
        list(chain.from_iterable(map(dict.values, filter(None, children)))),
        [(id(own), own["forward"]) for own in known.own[1:] if "forward" in own],  # the first one's is not called
        [own.get("eps") for own in known.norms],
    )


# --- graphs ---

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
            in_graph(),
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

    Safe to call from several threads and streams. Belongs to one set of parameters: where one of them has moved, or the
    modules that hold them have changed, all graphs are dropped.

    Args:
        name: of what is captured, for warnings.
        limit: how many kinds are remembered.
    """

    def __init__(self, name: str, limit: int = 8) -> None:
        self.name = name
        self.limit = limit
        self._graphs: OrderedDict[Hashable, Graph | str] = OrderedDict()  # or "seen" once, or "refused"
        self._read: Any = None
        self._place: Place | None = None
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """How many graphs there are."""
        return sum(not isinstance(graph, str) for graph in self._graphs.values())

    def __call__(
        self,
        function: Function,
        inputs: Inputs,
        parameters: Sequence[Tensor],
        how: Hashable,
        structure: object = None,
    ) -> Tensor:
        """function(*inputs), from a graph where there is one.

        Args:
            function: makes one tensor from the inputs; the same operations for the same `how` and kind of inputs, none
                of which waits for the device or draws random numbers.
            inputs: on one CUDA device; None for one that is not there.
            parameters: all that the function reads besides.
            how: settings of the function.
            structure: of the modules that it calls, see `Read`.
        """
        memory = [list(map(of, parameters)) for of in (Tensor.data_ptr, attrgetter("dtype"))]
        with self._lock, torch.cuda.device_of(inputs[0]):
            self._keep_only((structure, memory))
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

    def _keep_only(self, read: Any) -> None:
        if read != self._read:
            self.clear()
            self._read = read

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
