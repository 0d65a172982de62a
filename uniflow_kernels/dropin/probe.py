"""What a module computes, found out by running a copy of it on a few random rows."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from uniflow_kernels.torch_private import (
    before_compilation,
    buffers_of,
    children_of,
    draws,
    is_any_hooked,
    is_hooked,
    parameters_of,
    tree_map_only,
)

ROWS = 3
# float32 rounding, after a dozen blocks, stays far below it; any other formula far above
TOLERANCE = 1e-4
PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "addmm", "bmm", "baddbmm", "einsum")


class NotOurs(Exception):  # noqa: N818 - an answer, not a failure
    """Why a module that looks as if it could be served is left alone."""


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """Its class's forward, as it was before any torch.compile decorator."""
    forward: Any = type(module).forward
    return before_compilation(forward)


def is_decorated(module: nn.Module) -> bool:
    """Whether a torch.compile decorator stands around its class's forward."""
    return own_forward(module) is not type(module).forward


def check_untouched(module: nn.Module, but: Collection[nn.Module] = ()) -> None:
    """Raise NotOurs if calling a part of `module` does more than its class's forward, or its numbers cannot be read.

    `but`: parts that are called as they are, whatever that does.
    """
    if is_any_hooked():
        raise NotOurs("a hook on all modules must fire")
    for name, part in module.named_modules():
        where = name or "the module"
        if part in but:
            continue
        if "forward" in vars(part):
            raise NotOurs(f"{where}: its forward was replaced on the instance")
        if name and is_hooked(part):
            raise NotOurs(f"{where}: a hook inside must fire")
    for name, tensor in module.named_parameters():
        if tensor.is_meta:
            raise NotOurs(f"{name}: on the meta device; patch after loading")
        if type(tensor) not in (nn.Parameter, Tensor) or not tensor.is_floating_point():
            raise NotOurs(f"{name}: a {type(tensor).__name__} in {tensor.dtype}; patch before sharding or quantizing")
    if len({tensor.device for tensor in module.parameters()}) > 1:
        raise NotOurs("its parameters are on several devices")


class Probe:
    """Runs a copy of a module, with random float32 parameters, so that no zero hides what it computes.

    The module itself is only read, and nothing that other threads see is set: another one may run or patch it at the
    same time. The copy shares what is no tensor and no container; the stand-ins of its matrices share one block of
    memory, as large as the largest.

    Use as a context.

    Attributes:
        module: the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self.device = next(module.parameters()).device
        self.numbers = np.random.default_rng(0)
        self.original = module

    def __enter__(self) -> Probe:
        self.contexts = ExitStack()
        enter = self.contexts.enter_context
        enter(torch.inference_mode(False))
        enter(torch.no_grad())
        enter(torch.autocast(self.device.type, enabled=False))
        self.module = _Copies(self.original, self._stand_ins()).of(self.original)
        for part in self.module.modules():
            if drops(part):
                part.p = 0.0  # what is dropped is no part of the formula
            if "grad_checkpointing" in vars(part):
                part.grad_checkpointing = False  # nor is what is computed again
        enter(_Watched(self._rounds_products()))
        return self

    def __exit__(self, *_: object) -> None:
        self.contexts.close()

    def rows(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random numbers, the same ones whatever the device."""
        return self._put(scale * self.numbers.standard_normal(shape, np.float32))

    def times(self, *shape: int) -> Tensor:
        """Random numbers in [0, 1)."""
        return self._put(self.numbers.random(shape, np.float32))

    def _put(self, numbers: Any) -> Tensor:
        return torch.from_numpy(np.asarray(numbers, np.float32)).to(self.device)

    def in_mode(self, training: bool, run: Callable[[], Any]) -> Any:
        """What `run` returns with the module in training mode, or in eval mode."""
        for part in self.module.modules():
            part.training = training
        return run()

    def in_both_modes(self, run: Callable[[], Tensor]) -> list[Tensor]:
        """What `run` returns with the module in eval mode, and in training mode.

        Raises:
            NotOurs: if it fails, or returns no tensor.
        """
        results = []
        for training in (False, True):
            try:
                results.append(self.in_mode(training, run))
            except NotOurs:
                raise
            except Exception as error:
                raise NotOurs(f"what its code was given here does not run: {type(error).__name__}: {error}") from error
        if not all(isinstance(result, Tensor) for result in results):
            raise NotOurs(f"it returns a {type(results[0]).__name__}, not a tensor")
        return results

    def _stand_ins(self) -> dict[int, Tensor]:
        """Identity of each parameter -> what stands in for it."""
        parameters = list(self.original.parameters())
        largest = max((p for p in parameters if p.ndim > 1), key=Tensor.numel)
        shift = 7
        noise = self.rows(largest.numel() + shift * len(parameters), scale=largest.shape[-1] ** -0.5)
        stand_ins = {}
        for i, (name, p) in enumerate(self.original.named_parameters()):
            if p.ndim > 1:
                stand_ins[id(p)] = noise[shift * i : shift * i + p.numel()].view(p.shape)
            else:
                stand_ins[id(p)] = self.rows(*p.shape, scale=0.3) + (0.0 if "bias" in name.split(".")[-1] else 1.0)
        return stand_ins

    def _rounds_products(self) -> bool:
        """Whether products of float32 are made in fewer bits here, by whichever of PyTorch's switches."""
        x, weight = self.rows(ROWS, 256), self.rows(256, 256)
        return difference([x @ weight], [x.double() @ weight.double()]) > TOLERANCE / 10


class _Copies:
    """Copies of a module's parts that hold other tensors.

    Args:
        module: whose parts are copied.
        stand_ins: identity of a tensor -> what the copies hold in its place. All other tensors are cloned.
    """

    def __init__(self, module: nn.Module, stand_ins: Mapping[int, Tensor]) -> None:
        self.made: dict[int, Any] = dict(stand_ins)
        for part in module.modules():
            self.made[id(part)] = copied = object.__new__(type(part))
            nn.Module.__init__(copied)
        for part in module.modules():
            self._fill(self.made[id(part)], part)

    def _fill(self, copied: nn.Module, part: nn.Module) -> None:
        for fields in (parameters_of, buffers_of, children_of):
            fields(copied).update({name: self.of(value) for name, value in fields(part).items()})
        own = vars(copied)
        own.update({name: self.of(value) for name, value in vars(part).items() if name not in own})
        own.pop("_compiled_call_impl", None)
        if is_decorated(part):  # nothing is compiled to look at it
            copied.forward = MethodType(own_forward(part), copied)

    def of(self, value: Any) -> Any:
        """What stands in the copies where `value` stands in the module."""
        if id(value) in self.made:
            return self.made[id(value)]
        kind = type(value)
        if isinstance(value, Tensor):
            self.made[id(value)] = value.clone()
        elif kind is list:
            self.made[id(value)] = copied = list[Any]()
            copied += map(self.of, value)
        elif kind in (dict, OrderedDict):
            self.made[id(value)] = named = kind()
            named.update({key: self.of(item) for key, item in value.items()})
        elif kind in (tuple, set):
            return kind(map(self.of, value))
        elif kind is MethodType:
            return MethodType(value.__func__, self.of(value.__self__))
        elif kind is functools.partial:
            return functools.partial(self.of(value.func), *map(self.of, value.args), **self.of(value.keywords))
        return self.made.get(id(value), value)


class _Watched(TorchFunctionMode):
    """Refuses to draw random numbers, since no generator is ours to change; makes products in float64 if asked to.

    No dispatch mode: it sets what all threads see.
    """

    def __init__(self, in_float64: bool) -> None:
        self.in_float64 = in_float64

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if draws(name) and not _keeps_all(func, *args, **kwargs):
            raise NotOurs(f"it draws random numbers ({name})")
        if not self.in_float64 or name not in PRODUCTS:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, Tensor.double, (args, kwargs))
        return func(*args, **kwargs).float()


def _keeps_all(func: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether it is what may drop something, and drops nothing."""
    if func is F.scaled_dot_product_attention:
        return not (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))
    return func is F.dropout and _is_off(*args, **kwargs)


def _is_off(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return not (p and training)


class Unseen:
    """Stands for the value of an argument, and notices all that looks at it but `is` and `type()`."""

    def __init__(self) -> None:
        object.__setattr__(self, "seen", False)


def is_seen(value: Unseen) -> bool:
    """Whether it was compared, tested, hashed, printed, reckoned with, called or asked for its class, say."""
    return object.__getattribute__(value, "seen")


def _see(self: Unseen, *_: object) -> None:
    object.__setattr__(self, "seen", True)
    raise TypeError("the value of this argument is not known")


SPECIAL = {name for kind in (int, float, str, bytes, list, dict, set) for name in dir(kind) if name.startswith("__")}
SPECIAL |= {"__call__", "__complex__", "__enter__", "__exit__", "__fspath__", "__matmul__", "__next__", "__rmatmul__"}
SPECIAL -= {
    "__class__",
    "__class_getitem__",
    "__doc__",
    "__init__",
    "__init_subclass__",
    "__new__",
    "__subclasshook__",
}
for _name in SPECIAL:
    setattr(Unseen, _name, _see)


def drops(module: nn.Module) -> bool:
    """Whether it is a dropout layer."""
    return isinstance(module, nn.modules.dropout._DropoutNd)


def difference(ours: list[Tensor], own: list[Tensor]) -> float:
    """The largest difference, relative to the largest number; infinite if the shapes differ or a number is none."""
    if any(a.shape != b.shape for a, b in zip(ours, own, strict=True)):
        return float("inf")
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, own, strict=True))
    return float("inf") if math.isnan(worst) else worst
