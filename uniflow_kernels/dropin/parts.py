"""What the blocks of a transformer hand on to their parts, and the norms before these."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from uniflow_kernels.dropin.probe import TOLERANCE, NotOurs, Probe, Unseen, difference, is_seen, own_forward
from uniflow_kernels.dropin.running import affine_of, at
from uniflow_kernels.torch_private import is_any_hooked, is_forward_mode, is_hooked, is_transforming

Path = tuple[str, ...]  # of a submodule
Found = TypeVar("Found")


class Source(NamedTuple):
    """Where an argument of a part comes from: the block's argument of this name, x's dtype, or a constant.

    `default` is that of the block's argument.
    """

    kind: str
    value: Any = None
    default: Any = None

    def of(self, given: Mapping[str, Any], x: Tensor) -> Any:
        """The argument."""
        if self.kind == "argument":
            return given.get(self.value, self.default)
        return x.dtype if self.kind == "dtype" else self.value


class Call(NamedTuple):
    """What a part is called with, beside what is computed."""

    args: tuple[Source, ...]
    kwargs: tuple[tuple[str, Source], ...]

    @property
    def left_out(self) -> Call:
        """The same where all arguments of the block are None."""
        nothing = Source("constant")
        args = tuple(nothing if source.kind == "argument" else source for source in self.args)
        kwargs = ((name, nothing if source.kind == "argument" else source) for name, source in self.kwargs)
        return Call(args, tuple(kwargs))

    def of(self, part: Any, given: Mapping[str, Any], x: Tensor, *computed: Tensor) -> Any:
        """What the part returns."""
        named = {name: source.of(given, x) for name, source in self.kwargs}
        return part(*computed, *(source.of(given, x) for source in self.args), **named)


class Norm(NamedTuple):
    """A norm: where it is, and what it computes, "layer" or "rms"."""

    path: Path
    kind: str
    eps: float

    def how(self, block: nn.Module) -> dict[str, Any]:
        """As `modulated_norm` takes it."""
        weight, bias = affine_of(at(block, self.path))
        return {"weight": weight, "bias": bias, "norm": self.kind, "eps": self.eps}


class Notes(nn.Module):
    """Stands for a part that may compute anything: notes what it is given, and returns numbers.

    Args:
        out: the numbers.
        in_tuple: whether it returns them as the first of two things.
    """

    def __init__(self, out: Tensor, in_tuple: bool = False) -> None:
        super().__init__()
        self.out, self.calls = out, list[tuple[tuple[Any, ...], dict[str, Any]]]()
        self.in_tuple = in_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Always the same."""
        self.calls.append((args, kwargs))
        return (self.out, None) if self.in_tuple else self.out


def is_wide(part: nn.Module | None) -> bool:
    """Whether it multiplies by a matrix, as far as its parameters say."""
    return part is not None and any(parameter.ndim > 1 for parameter in part.parameters())


def parameters_of_forward(module: nn.Module) -> list[inspect.Parameter]:
    """Of its own forward, x first."""
    return list(inspect.signature(own_forward(module)).parameters.values())[1:]


def defaults_of(parameters: list[inspect.Parameter]) -> dict[str, Any]:
    """The defaults of those that have one."""
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def handed_on(
    call: Callable[[dict[str, Any]], tuple[Found, dict[str, Call]]], free: set[str]
) -> tuple[Found, dict[str, Call], set[str]]:
    """Which arguments of a block are only handed on to its parts, whatever they are.

    Args:
        call: calls the block with values of these arguments; returns what it found, and the calls of the parts.
        free: all arguments that it may be called without.

    Returns:
        What `call` found, the calls of the parts, and the arguments.

    Raises:
        NotOurs: if the block cannot be called without them either.
    """
    while True:
        unseen = {name: Unseen() for name in sorted(free)}
        try:
            calls = call(unseen)[1]
            left_out = call(dict.fromkeys(free))[1]
            if not any(map(is_seen, unseen.values())) and left_out == {k: c.left_out for k, c in calls.items()}:
                break
            failure = None
        except NotOurs as error:
            failure = error
        seen = {name for name, value in unseen.items() if is_seen(value)} or free
        if not free:
            raise failure or NotOurs("its forward does not do the same twice")
        free = free - seen
    return call({name: Unseen() for name in free})[0], calls, free


def call_of(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], more: Mapping[str, Any], defaults: Mapping[str, Any], x: Tensor
) -> Call:
    """A call of a part: which of what it was given are arguments of the block.

    Args:
        args, kwargs: what it was given, beside what was computed.
        more: the block's arguments that may be handed on.
        defaults: of those that have one.
        x: the block's first argument.

    Raises:
        NotOurs: if one is something else.
    """
    names = {id(value): name for name, value in more.items() if value is not None}

    def source(value: Any) -> Source:
        if id(value) in names:
            return Source("argument", names[id(value)], defaults.get(names[id(value)]))
        if value is x.dtype:
            return Source("dtype")
        if value is None or type(value) in (bool, int, float, str):
            return Source("constant", value)
        raise NotOurs(f"gives its parts a {type(value).__name__} that it computes")

    return Call(tuple(map(source, args)), tuple((name, source(value)) for name, value in kwargs.items()))


def read_norm(probe: Probe, part: nn.Module, path: Path, shape: tuple[int, int, int]) -> Norm:
    """What a norm of rows computes, tried on rows of this shape.

    Raises:
        NotOurs: if it is neither a layer norm nor an rms norm.
    """
    eps = next((value for value in vars(part).values() if isinstance(value, float) and 0 < value < 0.1), None)
    x = probe.rows(*shape)
    x[0] *= 1e-3  # so small that eps counts
    theirs = probe.in_both_modes(lambda: part(x))
    weight, bias = affine_of(part)
    for kind in ("layer", "rms") if eps is not None else ():
        assert eps is not None
        if kind == "layer":
            ours = F.layer_norm(x, shape[-1:], weight, bias, eps)
        else:
            ours = F.rms_norm(x, shape[-1:], weight, eps)
        if difference([ours] * 2, theirs) < TOLERANCE:
            return Norm(path, kind, eps)
    raise NotOurs(f"{'.'.join(path)}: a {type(part).__name__}, neither a layer norm nor an rms norm")


def is_as_it_was(module: nn.Module, types: tuple[tuple[Path, type], ...]) -> bool:
    """Whether parts that are not called would do nothing but their class's forward."""
    if is_any_hooked() or is_forward_mode() or is_transforming():
        return False
    for path, kind in types:
        part: Any = at(module, path)
        if type(part) is not kind or is_hooked(part):  # type: ignore[arg-type]
            return False
    return True
