"""Launches that keep what Triton compiled: its own launch asks everything anew, for 15 to 25 microseconds each time.

Everything private of Triton that this project relies on stands here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import itemgetter, or_
from types import SimpleNamespace
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# those whose launchers take what is given to them here; by any other version every launch is Triton's own
_KNOWN = tuple(map(int, triton.__version__.split(".")[:2])) in ((3, 6), (3, 7), (3, 8), (3, 9))
_MOST_KEPT = 256  # kinds of arguments of a launch
_MOST_DESCRIBED = 4096  # tensors of such a kind

_address_of = Tensor.data_ptr

Describe = Callable[[str, Tensor], Any]
Getter = Callable[[dict[str, Any]], tuple[Any, ...]]


def cdiv(number: int, by: int) -> int:
    """The quotient rounded up; triton.cdiv takes 2 microseconds."""
    return -(-number // by)


class Launch:
    """A kernel's launch: with the first arguments of a kind Triton's own, which compiles; from then on what it made.

    A kind has at least all that Triton makes another kernel of: driver, device, constants and options, the tensors'
    dtypes, and the numbers, except where the kernel says do_not_specialize: there whether they take 32 bits. Where a
    pointer is no multiple of 16 bytes, somebody watches launches (`triton.knobs.runtime.launch_enter_hook` and others),
    or Triton is not a known one, the launch is Triton's own.

    Nothing that is kept depends on a tensor's life: a tensor descriptor is an address, a shape and strides, and right
    for whatever else of that shape lies there later. Threads may launch at once.

    Args:
        kernel: of triton.jit. What is an integer, a float or a tuple in one launch is that in all of them.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.names = kernel, tuple(kernel.arg_names)
        self.values = _getter(self.names)
        self.keeps = _KNOWN and isinstance(kernel, JITFunction)  # which Triton's interpreter's are not
        self.getters: tuple[Getter, ...] | None = None
        self.tuples: list[str] = []  # the names of arguments that are tuples
        self.kept: dict[tuple[Any, ...], _Kept] = {}

    def __call__(self, grid: tuple[int, ...], describe: Describe | None = None, /, **arguments: Any) -> None:
        """Launch.

        Args:
            grid: how many programs, in up to three dimensions.
            describe: what the kernel takes for an argument of that name that is a tensor: a descriptor of it, or the
                tensor. It must be the same for all tensors of a shape and strides, with the same constants.
            arguments: all of the kernel's by name: tensors, tuples of tensors of one dtype, None, numbers and
                constants; and the compiler's, the same ones in all launches.
        """
        if not self.keeps or self._is_watched():
            self._as_triton_does(grid, describe, arguments)
            return
        exact, integers, floats, pointers, tuples = self.getters or self._learn(arguments)
        active = driver.active
        device = active.get_current_device()
        kind: list[Any] = [active, device, exact(arguments)]
        kind += [integer >> 31 for integer in integers(arguments)]
        kind += map(type, floats(arguments))
        addresses = 0
        for tensor in pointers(arguments):
            if tensor is None:
                kind.append(None)
            else:
                addresses |= tensor.data_ptr()
                kind.append(tensor.dtype)
        places = []
        for tensors in tuples(arguments):
            kind += len(tensors), tensors[0].dtype
            places.append(tuple(map(_address_of, tensors)))
            addresses |= reduce(or_, places[-1])
        key = tuple(kind)
        kept = self.kept.get(key)
        if kept is not None and not addresses & 15:
            if places and kept.by_triton:  # whose launcher would ask every tensor for its address again
                arguments.update(zip(self.tuples, places, strict=True))
            kept.launch(grid, active.get_current_stream(device), describe, self.values(arguments))
            return
        compiled = self._as_triton_does(grid, describe, arguments)
        if not addresses & 15 and compiled.metadata.target.backend == "cuda":
            if len(self.kept) >= _MOST_KEPT:
                self.kept.clear()
            self.kept[key] = _Kept(compiled, self.names)

    def _is_watched(self) -> bool:
        runtime = knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        # a chain of hooks has its calls, of which there may be none
        return bool(
            getattr(enter, "calls", enter)
            or getattr(leave, "calls", leave)
            or runtime.add_stages_inspection_hook
            or self.kernel.pre_run_hooks
        )

    def _as_triton_does(self, grid: tuple[int, ...], describe: Describe | None, arguments: dict[str, Any]) -> Any:
        if describe is not None:
            arguments = {name: _described(describe, name, value) for name, value in arguments.items()}
        return self.kernel[grid](**arguments)

    def _learn(self, arguments: dict[str, Any]) -> tuple[Getter, ...]:
        """What gets the arguments that count exactly, integers and floats that do not, tensors, and tuples of them."""
        exact = [name for name in arguments if name not in self.names]
        integers: list[str] = []
        floats: list[str] = []
        pointers: list[str] = []
        tuples: list[str] = []
        for parameter in self.kernel.params:
            name, kind = parameter.name, type(arguments[parameter.name])
            if parameter.is_constexpr or (kind is int and not parameter.do_not_specialize):
                exact.append(name)
            else:
                {int: integers, float: floats, tuple: tuples}.get(kind, pointers).append(name)
        self.tuples = tuples
        self.getters = tuple(map(_getter, (exact, integers, floats, pointers, tuples)))
        return self.getters


def _getter(names: Sequence[str]) -> Getter:
    """What gets the values of these names, in their order."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda arguments: tuple([arguments[name] for name in names])


def _described(describe: Describe, name: str, value: Any) -> Any:
    return describe(name, value) if isinstance(value, Tensor) else value


class _Kept:
    """A compiled kernel on a device, with the tensor descriptors that it was given."""

    def __init__(self, compiled: Any, names: tuple[str, ...]) -> None:
        self.compiled, self.run, self.names = compiled, compiled.run, names
        self.function, self.packed = compiled.function, compiled.packed_metadata
        self.by_triton = isinstance(self.run, driver.active.launcher_cls or ())
        kinds = list(compiled.src.signature.values())
        described = [isinstance(kind, str) and kind.startswith("tensordesc") for kind in kinds]
        ways = getattr(compiled.metadata, "tensordesc_meta", None)
        # Triton's own launcher takes descriptors and encodes each anew; this one takes them encoded
        self.maps: list[tuple[int, dict[Any, list[Any]], Any]] | None = None
        if ways and self.by_triton:
            taken: list[str] = []
            for kind, is_described in zip(kinds, described, strict=True):
                taken += _expanded(kind) if is_described else [kind]
            source = SimpleNamespace(constants={}, signature=dict(enumerate(taken)))
            self.run = type(self.run)(source, compiled.metadata._replace(tensordesc_meta=None))
            places = [i for i, is_described in enumerate(described) if is_described]
            self.maps = [(i, {}, way) for i, way in zip(places, ways, strict=True)]

    def launch(self, grid: tuple[int, ...], stream: int, describe: Describe | None, values: tuple[Any, ...]) -> None:
        given = values if describe is None else self._described(describe, values)
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        self.run(x, y, z, stream, self.function, self.packed, None, None, None, *given)

    def _described(self, describe: Describe, values: tuple[Any, ...]) -> Sequence[Any]:
        if self.maps is None:
            return [_described(describe, name, value) for name, value in zip(self.names, values, strict=True)]
        given: list[Any] = []
        start = 0
        for i, known, way in self.maps:
            given += values[start:i]
            start, tensor = i + 1, values[i]
            place = tensor.data_ptr(), tensor.shape, tensor.stride()
            encoded = known.get(place)
            if encoded is None:
                if len(known) >= _MOST_DESCRIBED:
                    known.clear()
                encoded = known[place] = _encode(describe(self.names[i], tensor), way)
            given += encoded
        given += values[start:]
        return given


def _expanded(kind: str) -> list[str]:
    """The types of what a launcher makes of a descriptor such as "tensordesc<bf16[128, 64],...>"."""
    dimensions = kind[: kind.index("]")].count(",") + 1
    return ["nvTmaDesc", *["i32"] * dimensions, *["i64"] * dimensions]


def _encode(descriptor: Any, way: Any) -> list[Any]:
    """The tensor map of a descriptor, with its shape and strides, as a launcher takes them."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    return make_tensordesc_arg(descriptor, way, *[None] * (make_tensordesc_arg.__code__.co_argcount - 2))
