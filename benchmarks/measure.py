"""Time, memory, saved activations and kernel launches of forms, and the two ceilings of the machine.

Times are milliseconds under a pass ("forward" without gradients, "backward", "both") and a clock ("wall_ms", "gpu_ms").
GPU time is that of CUDA graph replays, so without launch gaps, over enough input sets to leave nothing in the L2 cache.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Form, map_inputs, named_leaves, tensors
from benchmarks.check import as_tensors, cotangents_like

Sample = dict[tuple[str, str], float]  # (pass, clock) -> milliseconds

LEAST_ROUNDS, MOST_ROUNDS = 5, 200
L2_SWEEPS = 3  # the input sets of a rotation fill the L2 cache this many times
LONG_CALL_MS = 20.0  # a call this long sweeps the cache by itself


def quartiles(samples: list[float]) -> dict[str, float]:
    """First quartile, median, third quartile, and how many samples."""
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {"q1": q1, "median": median, "q3": q3, "samples": len(samples)}


def interleave(calls: Mapping[str, list[Callable[[], Sample]]], seconds: float) -> dict[str, dict[str, dict[str, Any]]]:
    """Call every form in turn, round after round, for `seconds`: what disturbs the machine disturbs all of them.

    Every other round goes the other way, since who comes later finds the inputs in a cache.

    Returns:
        form -> pass -> clock -> quartiles.
    """
    samples: dict[str, dict[tuple[str, str], list[float]]] = {label: {} for label in calls}
    end = time.perf_counter() + seconds
    for rounds in range(MOST_ROUNDS):
        if rounds >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for label, samplers in list(calls.items())[:: 1 if rounds % 2 else -1]:
            for sampler in samplers:
                for key, milliseconds in sampler().items():
                    samples[label].setdefault(key, []).append(milliseconds)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for label, by_key in samples.items():
        found[label] = {}
        for (name, clock), values in by_key.items():
            found[label].setdefault(name, {})[clock] = quartiles(values)
    return found


class Trial:
    """One form on one set of inputs, warm: the calls that are measured."""

    def __init__(self, form: Form, inputs: tuple[Any, ...]) -> None:
        self.form = form
        self.inputs = inputs
        self.leaves = list(named_leaves(inputs).values())
        self.parameters = [p for item in inputs if isinstance(item, nn.Module) for p in item.parameters()]
        self.infer()
        if self.leaves:
            outputs = self.forward()
            self.cotangents = cotangents_like(outputs)
            self.backward(outputs)

    def infer(self) -> None:
        """Forward, without gradients."""
        with torch.no_grad():
            self.form(*self.inputs)

    def forward(self) -> tuple[Tensor, ...]:
        """Forward, keeping what the backward pass needs."""
        return as_tensors(self.form(*self.inputs))

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        """All gradients, which are thrown away."""
        torch.autograd.grad(outputs, self.leaves, self.cotangents, allow_unused=True)

    def train(self) -> None:
        """Forward and backward."""
        self.backward(self.forward())

    def passes(self) -> dict[str, Callable[[], None]]:
        """What can be called as a whole: "forward", and "both" where there are gradients."""
        return {"forward": self.infer, "both": self.train} if self.leaves else {"forward": self.infer}

    def wall(self) -> Sample:
        """Wall time of the plain calls, the device drained before and after; on a CPU the backward pass alone too."""
        on_cpu = not torch.cuda.is_available()
        synchronize()
        start = time.perf_counter()
        self.infer()
        synchronize()
        sample = {("forward", "wall_ms"): 1e3 * (time.perf_counter() - start)}
        if self.leaves:
            start = time.perf_counter()
            outputs = self.forward()
            middle = time.perf_counter()
            self.backward(outputs)
            synchronize()
            end = time.perf_counter()
            sample["both", "wall_ms"] = 1e3 * (end - start)
            if on_cpu:
                sample["backward", "wall_ms"] = 1e3 * (end - middle)
        return sample


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def saved_bytes(trial: Trial) -> int:
    """Bytes kept from forward to backward: each storage once, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in trial.parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor._is_zerotensor():  # of forward-mode derivatives: it has no memory
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = trial.forward()  # held until the count is done, so that no storage is used twice
    total = sum(kept.values())
    del outputs
    return total


def peak_bytes(call: Callable[[], None]) -> int | None:
    """Most memory held during a call above what was held before: allocated on a GPU, resident (Linux) on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # pages that earlier calls left with the allocator would hide this call's
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # the peak starts anew
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None  # not Linux, or not glibc


def _resident(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(field))
    return 1024 * int(line.split()[1])


def launches(call: Callable[[], None]) -> int:
    """Kernels that one call launches on the GPU; copies and fills by the driver are not counted."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_gpu = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
    return sum(1 for event in on_gpu if not event.name.startswith(("Memcpy", "Memset")))


# ------------------------------------------------------------------------------------------------------------ GPU time


def rotation(form: Form, inputs: tuple[Any, ...], call_ms: float) -> list[Trial]:
    """Trials on copies of the inputs that together sweep the L2 cache; modules are shared, as they are in use."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    held = sum(tensor.nbytes for tensor in tensors([item for item in inputs if not isinstance(item, nn.Module)]))
    copies = min(-(-L2_SWEEPS * cache // max(held, 1)), int(LONG_CALL_MS / call_ms), 64)
    more = [map_inputs(inputs, Tensor.clone, lambda module: module) for _ in range(copies - 1)]
    return [Trial(form, copied) for copied in (inputs, *more)]


class GpuTimer:
    """GPU time of a form by events, over all trials of a rotation.

    Replays CUDA graphs of the calls; where they cannot be captured, `why_no_graph` says why and the plain calls are
    timed, launch gaps included. Forward and backward are two graphs, so that each can be timed.

    Args:
        trials: a rotation.
        pool: memory pool for the graphs. All forms may share one: their graphs never run at the same time, and nothing
            in it is needed after a replay.
    """

    def __init__(self, trials: list[Trial], pool: Any) -> None:
        self.trials = trials
        self.outputs: list[tuple[Tensor, ...]] = []
        self.why_no_graph: Exception | None = None
        parts = [self._infer]
        if trials[0].leaves:
            parts += [self._forward, self._backward]
        torch.cuda.empty_cache()  # the graphs' pool cannot use what the plain calls left
        try:
            self.parts = [self._captured(part, pool) for part in parts]
        except Exception as error:  # whatever a form does that a graph cannot hold
            self.why_no_graph = error.with_traceback(None)  # the frames would hold tensors
            torch.cuda.synchronize()
            self.parts = parts
        self.outputs = []

    def __call__(self) -> Sample:
        """One replay of everything."""
        infer, *training = self.parts
        sample = {("forward", "gpu_ms"): self._time(infer)[0]}
        if training:
            forward, backward = self._time(*training)
            sample["backward", "gpu_ms"] = backward
            sample["both", "gpu_ms"] = forward + backward
        return sample

    def _infer(self) -> None:
        for trial in self.trials:
            trial.infer()

    def _forward(self) -> None:
        self.outputs = [trial.forward() for trial in self.trials]

    def _backward(self) -> None:
        for trial, outputs in zip(self.trials, self.outputs, strict=True):
            trial.backward(outputs)
        self.outputs = []

    @staticmethod
    def _captured(part: Callable[[], None], pool: Any) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            part()
        return graph.replay

    def _time(self, *parts: Callable[[], None]) -> list[float]:
        """Milliseconds a call of each part, run one after the other."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        events[0].record()
        for part, event in zip(parts, events[1:], strict=True):
            part()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) / len(self.trials) for a, b in pairwise(events)]


# ------------------------------------------------------------------------------------------------------------ ceilings


def ceilings(device: str) -> dict[str, Any]:
    """What the machine reaches: bytes read plus written a second on a large copy, FLOPs a second on large products."""
    cuda = device == "cuda"
    source = torch.randn(2**29 if cuda else 2**26, device=device)
    target = torch.empty_like(source)
    side = 8192 if cuda else 2048
    rates: dict[str, Any] = {"copy": 2 * source.nbytes / _median_seconds(lambda: target.copy_(source)), "product": {}}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rates["product"][str(dtype).removeprefix("torch.")] = 2 * side**3 / _median_seconds(partial(torch.matmul, a, b))
    return rates


def _median_seconds(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(12):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def environment() -> dict[str, str]:
    """What `doctor` does not say of a machine and a timing on it needs."""
    return {"CPU": _cpu_model(), "CPU threads": f"{torch.get_num_threads()} of {os.cpu_count()}"}


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown"
