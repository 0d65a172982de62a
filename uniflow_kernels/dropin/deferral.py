"""A head's own forward with its blocks put off: they note what they are given, and the last layer runs them all.

So all that lies around the blocks (projections, times, conditions, casts, arguments of any kind) stays the head's own.
What the head itself returns then comes from its own forward, which is called with a stand-in for the head: an object of
a class derived from the head's, that shares all attributes with it but for the blocks and the last layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from uniflow_kernels.dropin.probe import SPECIAL, NotOurs, own_forward
from uniflow_kernels.torch_private import children_of, tree_leaves


class Deviation(NotOurs):
    """The forward does something else with its blocks than hand what one returns to the next."""

    def __init__(self) -> None:
        super().__init__("its forward looks at what its blocks return")


class Names(NamedTuple):
    """What a head calls its blocks, its last layer and, if several blocks share one, the layers of modulations."""

    blocks: str
    last: str
    groups: str | None


def run(
    module: nn.Module,
    names: Names,
    compute: Callable[[Tensor, Tensor], Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """What the module's own forward returns, where `compute` gives what its last layer returns.

    Args:
        module: the head.
        names: of its parts.
        compute: takes what the first block is given, x and the condition.
        args, kwargs: of the call.

    Raises:
        Deviation: if blocks and last layer are not called one after the other, each with what the one before returned
            and all with the same condition, or something else looks at what a block returned.
    """
    call = _Call(module, names, compute)
    if (type(module), names) not in _classes:
        prepare(type(module), names)
    stand_in: Any = object.__new__(_classes[type(module), names])
    object.__setattr__(stand_in, "__dict__", module.__dict__)
    object.__setattr__(stand_in, "_call", call)
    result = own_forward(module)(stand_in, *args, **kwargs)
    if call.count or (not isinstance(result, Tensor) and any(type(leaf) is Between for leaf in tree_leaves(result))):
        raise Deviation
    return result


class Between:
    """What a block that was put off returns: nothing can be done with it but hand it on."""


def _deviate(*_: object, **__: object) -> Any:
    raise Deviation


for _name in {*SPECIAL, "__getattr__"} - {"__getattribute__"}:  # which torch.compile would not trace
    setattr(Between, _name, _deviate)
Between.__torch_function__ = classmethod(_deviate)  # type: ignore[attr-defined]


class _Call:
    """One call of a head's own forward. Nothing that it holds refers to it, so that all is freed when it ends."""

    def __init__(self, module: nn.Module, names: Names, compute: Callable[[Tensor, Tensor], Any]) -> None:
        parts: Any = children_of(module)
        self.compute = compute
        self.blocks, self.last = parts[names.blocks], parts[names.last]
        self.groups: Any = () if names.groups is None else parts[names.groups]
        self.made: list[Any] = [None] * len(self.groups)  # parts of the modulation that each group was last asked for
        self.x: Any = None
        self.condition: Any = None
        self.latest: Any = None  # what the block before returned
        self.count = 0

    def agree(self, condition: Any) -> None:
        """All that takes the condition takes the same."""
        if self.condition is None:
            self.condition = condition
        elif condition is not self.condition:
            raise Deviation

    def follows(self, index: int, x: Any) -> None:
        """The part of this index is called next, with what the one before returned."""
        if index != self.count or (index and x is not self.latest):
            raise Deviation


class _Put:
    """Stands where a part of the head stood, with the attributes that this has."""

    def __init__(self, call: _Call, index: int, part: nn.Module) -> None:
        self._call, self._index, self._part = call, index, part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


class _Block(_Put):
    def __call__(self, x: Any, *given: Any, **named: Any) -> Between:
        call = self._call
        call.follows(self._index, x)
        if call.groups:
            parts = call.made[self._index * len(call.groups) // len(call.blocks)]
            if named or parts is None or any(a is not b for a, b in itertools.zip_longest(given, parts)):
                raise Deviation
        else:
            call.agree(given[0] if given else next(iter(named.values()), None))
        if self._index == 0:
            call.x = x
        call.count += 1
        call.latest = Between()
        return call.latest


class _Last(_Put):
    def __call__(self, x: Any, *given: Any, **named: Any) -> Any:
        call = self._call
        call.follows(self._index, x)
        for condition in (*given, *named.values()):
            call.agree(condition)
        x, condition = call.x, call.condition
        call.x, call.condition, call.count = None, None, 0
        return call.compute(x, condition)


class _Group(_Put):
    """Stands for a layer that makes the modulation of several blocks, and for what it makes."""

    def __call__(self, condition: Any) -> _Group:
        self._call.agree(condition)
        return self

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Between, ...]:
        """Shift, scale and gate, put off, in the order in which they lie."""
        if chunks != 3 or dim != -1:
            raise Deviation
        parts = self._call.made[self._index] = (Between(), Between(), Between())
        return parts


def _blocks(call: _Call) -> list[_Block]:
    return [_Block(call, i, block) for i, block in enumerate(call.blocks)]


def _groups(call: _Call) -> list[_Group]:
    return [_Group(call, i, layer) for i, layer in enumerate(call.groups)]


_classes: dict[tuple[type, Names], type] = {}


def is_prepared(kind: type, names: Names) -> bool:
    """Whether there is the class of stand-ins for heads of this class."""
    return (kind, names) in _classes


def prepare(kind: type, names: Names) -> None:
    """Make the class of stand-ins for heads of this class, which no graph can make that is being compiled."""
    _classes[kind, names] = type(kind)(
        kind.__name__,
        (kind,),
        {
            "__slots__": ("_call",),
            "__module__": kind.__module__,
            names.blocks: property(lambda self: _blocks(self._call)),
            names.last: property(lambda self: _Last(self._call, len(self._call.blocks), self._call.last)),
            **({} if names.groups is None else {names.groups: property(lambda self: _groups(self._call))}),
            "grad_checkpointing": property(lambda self: False),  # `compute` sees to it
        },
    )
