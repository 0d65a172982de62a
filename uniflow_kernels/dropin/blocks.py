"""Blocks of diffusion transformers (DiT, SiT, LightningDiT, diffusers' with AdaLayerNormZero).

A block makes shift, scale and gate for its attention and for its MLP by one linear layer of a condition. What stands
around both are adaptive norms and gated residuals, which are row kernels; attention, MLP and what makes the condition
stay the block's own. A block is known by what it does: a copy, whose attention and MLP only note what they are given,
has to give them, and return, what the formula says.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniflow_kernels.dropin.probe import (
    TOLERANCE,
    NotOurs,
    Probe,
    Unseen,
    check_untouched,
    difference,
    is_seen,
    own_forward,
)
from uniflow_kernels.dropin.running import affine_of, at
from uniflow_kernels.ops.flow_choice import is_plain
from uniflow_kernels.ops.modulated_norm import gated_residual_norm, modulated_norm
from uniflow_kernels.torch_private import (
    children_of,
    is_any_hooked,
    is_forward_mode,
    is_hooked,
    is_transforming,
)

PARTS = 6  # shift, scale and gate of the attention, then of the MLP
BATCH, LENGTH = 2, 3


class Source(NamedTuple):
    """Where an argument of a part comes from: the block's argument of this name, x's dtype, or a constant."""

    kind: str
    value: Any = None

    def of(self, given: Mapping[str, Any], x: Tensor) -> Any:
        """The argument."""
        if self.kind == "argument":
            return given.get(self.value)
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

    path: tuple[str, ...]
    kind: str
    eps: float

    def how(self, block: nn.Module) -> dict[str, Any]:
        """As `modulated_norm` takes it."""
        weight, bias = affine_of(at(block, self.path))
        return {"weight": weight, "bias": bias, "norm": self.kind, "eps": self.eps}


@dataclass(frozen=True)
class Block:
    """A recognised block; holds no part of the module.

    Attributes:
        names: of all arguments of its forward; the first is x.
        free: those that may be given; the others must be left to their defaults.
        condition: the argument that is the condition, or what makes it and its call.
        modulation: the linear layer that makes shift, scale and gate.
        activated: whether the condition is given to it without SiLU.
        norms: before attention and MLP.
        attention, mlp: their names.
        attends: what attention is given beside x.
        types: path -> class of the parts that are not called.
    """

    names: tuple[str, ...]
    free: frozenset[str]
    condition: str | tuple[tuple[str, ...], Call]
    modulation: tuple[str, ...]
    activated: bool
    norms: tuple[Norm, Norm]
    attention: str
    mlp: str
    attends: Call
    types: tuple[tuple[tuple[str, ...], type], ...]

    is_whole: ClassVar[bool] = False  # what is inside may be served too

    def __str__(self) -> str:
        return (
            f"transformer block ({self.norms[0].kind} norm); adaptive norms and gated residuals by Triton where it can "
            "serve, else its own forward"
        )

    def prepare(self, module: nn.Module) -> None:
        """Nothing must be done before `forward` can be compiled."""

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What `module(*args, **kwargs)` computes; by its own forward where no kernel serves or a hook must fire."""
        x = args[0] if args else kwargs.get(self.names[0])
        if isinstance(x, Tensor) and not is_plain(x.is_cuda) and x.ndim == 3 and self._is_as_it_was(module):
            given = {**dict(zip(self.names, args)), **kwargs}  # noqa: B905 - names may be left out
            known = all(name in self.free or value is None for name, value in given.items())
            if known and len(given) == len(args) + len(kwargs):
                modulation = self.modulated(module, given, x)
                if modulation.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
                    return self.compute(module, given, x, modulation)
        return type(module).forward(module, *args, **kwargs)

    def modulated(self, module: nn.Module, given: Mapping[str, Any], x: Tensor) -> Tensor:
        """Shifts, scales and gates, [B, 6 W]."""
        if isinstance(self.condition, str):
            condition = given[self.condition]
        else:
            path, call = self.condition
            condition = call.of(at(module, path), given, x)
        return at(module, self.modulation)(condition if self.activated else F.silu(condition))

    def compute(self, module: nn.Module, given: Mapping[str, Any], x: Tensor, modulation: Tensor) -> Tensor:
        """The block behind its modulations."""
        parts: Any = children_of(module)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.unsqueeze(1).chunk(PARTS, -1)
        h = modulated_norm(x, shift, scale, **self.norms[0].how(module))
        attended = self.attends.of(parts[self.attention], given, x, h)
        x, h = gated_residual_norm(x, gate, attended, shift_mlp, scale_mlp, **self.norms[1].how(module))
        return x + gate_mlp * parts[self.mlp](h)

    def _is_as_it_was(self, module: nn.Module) -> bool:
        """Whether the parts that are not called would do nothing but their class's forward."""
        if is_any_hooked() or is_forward_mode() or is_transforming():
            return False
        for path, kind in self.types:
            part: Any = at(module, path)
            if type(part) is not kind or is_hooked(part):  # type: ignore[arg-type]
                return False
        return True


class _Notes(nn.Module):
    """Stands for a part that may compute anything: notes what it is given, and returns numbers."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out, self.calls = out, list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Always the same."""
        self.calls.append((args, kwargs))
        return self.out


def recognise(module: nn.Module) -> Block | None:
    """The block that `module` is; None if it does not even look like one.

    Raises:
        NotOurs: if it looks like one and is none, saying why.
    """
    layers = {
        (outer, inner): layer
        for outer, part in module.named_children()
        for inner, layer in part.named_children()
        if type(layer) is nn.Linear and layer.out_features == PARTS * layer.in_features
    }
    if not layers or isinstance(module, (nn.ModuleList, nn.Sequential)):
        return None
    others = [name for name, part in module.named_children() if name not in {outer for outer, _ in layers}]
    free = [name for name in others if _is_wide(children_of(module)[name])]
    if len(layers) > 1 or len(free) != 2:
        if len(layers) == 1 and len(free) < 2:
            return None  # an MLP that is wide, say
        count = "one layer" if len(layers) == 1 else f"{len(layers)} layers"
        raise NotOurs(f"{count} of modulations, and {', '.join(free) or 'nothing'} between its norms")
    check_untouched(module, but=[part for name in free for part in children_of(module)[name].modules()])  # type: ignore[union-attr]
    with Probe(module) as probe:
        return _Reading(probe, next(iter(layers)), free).block()


def _is_wide(part: nn.Module | None) -> bool:
    return part is not None and any(parameter.ndim > 1 for parameter in part.parameters())


class _Reading:
    """A block that is being looked at."""

    def __init__(self, probe: Probe, modulation: tuple[str, str], free: list[str]) -> None:
        self.probe, self.copy, self.modulation = probe, probe.module, modulation
        holder: Any = children_of(self.copy)[modulation[0]]
        layer: Any = children_of(holder)[modulation[1]]
        self.width: int = layer.in_features
        self.x = probe.rows(BATCH, LENGTH, self.width)
        self.parts = {name: _Notes(probe.rows(BATCH, LENGTH, self.width)) for name in free}
        children_of(self.copy).update(self.parts)
        makers = [name for name, part in holder.named_children() if name != modulation[1] and _is_wide(part)]
        if len(makers) > 1:
            raise NotOurs(f"{modulation[0]}: {', '.join(makers)} make its condition")
        self.maker = makers[0] if makers else None
        if self.maker is not None:
            self.made = _Notes(probe.rows(BATCH, self.width))
            children_of(holder)[self.maker] = self.made
        self.parameters = list(inspect.signature(own_forward(self.copy)).parameters.values())[1:]

    def block(self) -> Block:
        """The block.

        Raises:
            NotOurs: if it is none, saying why.
        """
        names = [p.name for p in self.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        required = [p.name for p in self.parameters if p.default is p.empty and p.name in names]
        if len(required) != (2 if self.maker is None else 1) or required[0] != names[0]:
            raise NotOurs(f"forward({', '.join(names)}): expected x and a condition to be required")
        given = {required[0]: self.x}
        given |= {name: self.probe.rows(BATCH, self.width) for name in required[1:]}
        free = set(names) - set(required)
        out, calls = self._run(given, free)
        condition = given[required[1]] if self.maker is None else self.made.out
        source = required[1] if self.maker is None else ((self.modulation[0], self.maker), calls[self.maker])
        first, second = self.order
        block = Block(
            tuple(names),
            frozenset((*self.free, *required)),
            source,
            self.modulation,
            self._activated(condition),
            self._norms(),
            first,
            second,
            calls[first],
            self._types(),
        )
        ours = block.compute(self.copy, given, self.x, block.modulated(self.copy, given, self.x))
        given_to = [self.parts[name].calls for name in self.order]
        apart = [difference([part[-1][0][0]], [part[0][0][0]]) for part in given_to]
        if max(difference([ours], [out]), *apart) > TOLERANCE or calls[second] != Call((), ()):
            raise NotOurs("its forward computes something else: another order, or a further term")
        return block

    def _run(self, given: dict[str, Any], free: set[str]) -> tuple[Tensor, dict[str, Call]]:
        """What it returns, and its calls of parts; finds which arguments are only handed on."""
        while True:
            unseen = {name: Unseen() for name in sorted(free)}
            try:
                calls = self._call(given, unseen)[1]
                left_out = self._call(given, dict.fromkeys(free))[1]
                if not any(map(is_seen, unseen.values())) and left_out == {k: c.left_out for k, c in calls.items()}:
                    break
                failure = None
            except NotOurs as error:
                failure = error
            seen = {name for name, value in unseen.items() if is_seen(value)} or free
            if not free:
                raise failure or NotOurs("its forward does not do the same twice")
            free = free - seen
        self.free = free
        return self._call(given, {name: Unseen() for name in free})[0], calls

    def _call(self, given: dict[str, Any], more: dict[str, Any]) -> tuple[Tensor, dict[str, Call]]:
        noting = {**self.parts, **({} if self.maker is None else {self.maker: self.made})}
        for part in noting.values():
            part.calls.clear()
        self.inputs: list[Tensor] = []  # of the layer of the modulations
        self.normed: list[nn.Module] = []
        order: list[str] = []
        handles = [at(self.copy, self.modulation).register_forward_hook(lambda _, x, __: self.inputs.append(x[0]))]
        names = {part: name for name, part in self.parts.items()}
        for part in self.copy.modules():
            if part in names:
                handles.append(part.register_forward_hook(lambda part, *_: order.append(names[part])))
            elif not children_of(part) and type(part) is not _Notes:
                handles.append(part.register_forward_hook(self._note_norm))
        try:
            out = self.probe.in_both_modes(lambda: own_forward(self.copy)(self.copy, **given, **more))
        finally:
            for handle in handles:
                handle.remove()
        if difference(out[:1], out[1:]) > 0 or len(order) != 4 or order[:2] != order[2:] or len(set(order)) != 2:
            raise NotOurs("it does not call attention and MLP once each, or another way in training")
        self.order = order[:2]
        names_of = {id(value): name for name, value in more.items() if value is not None}
        calls = {}
        for name, part in noting.items():
            args, kwargs = part.calls[0]
            handed = args[1:] if name in self.parts else args
            if name in self.parts and not (args and isinstance(args[0], Tensor)):
                raise NotOurs(f"{name}: is not given what the norm before it returns")
            find = {k: self._source(v, names_of, more) for k, v in kwargs.items()}
            calls[name] = Call(tuple(self._source(v, names_of, more) for v in handed), tuple(find.items()))
        return out[0], calls

    def _source(self, value: Any, names: dict[int, str], more: dict[str, Any]) -> Source:
        if id(value) in names:
            return Source("argument", names[id(value)])
        if value is self.x.dtype:
            return Source("dtype")
        if value is None or type(value) in (bool, int, float, str):
            return Source("constant", value)
        raise NotOurs(f"gives its parts a {type(value).__name__} that it computes")

    def _note_norm(self, part: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        if given and isinstance(given[0], Tensor) and given[0].shape == self.x.shape and isinstance(out, Tensor):
            self.normed.append(part)

    def _activated(self, condition: Tensor) -> bool:
        for after in (True, False):
            if difference([condition if after else F.silu(condition)], [self.inputs[0]]) < TOLERANCE:
                return after
        raise NotOurs("its modulations are not made of the condition, or of SiLU of it")

    def _norms(self) -> tuple[Norm, Norm]:
        paths = {part: tuple(name.split(".")) for name, part in self.copy.named_modules() if name}
        called = list(dict.fromkeys(self.normed))
        if len(called) != 2:
            raise NotOurs(f"{len(called)} norms of x, not two")
        first, second = (self._norm(part, paths[part]) for part in called)
        return first, second

    def _norm(self, part: nn.Module, path: tuple[str, ...]) -> Norm:
        eps = next((value for value in vars(part).values() if isinstance(value, float) and 0 < value < 0.1), None)
        x = self.probe.rows(BATCH, LENGTH, self.width)
        x[0] *= 1e-3  # so small that eps counts
        theirs = self.probe.in_both_modes(lambda: part(x))
        weight, bias = affine_of(part)
        for kind in ("layer", "rms") if eps is not None else ():
            assert eps is not None
            if kind == "layer":
                ours = F.layer_norm(x, (self.width,), weight, bias, eps)
            else:
                ours = F.rms_norm(x, (self.width,), weight, eps)
            if difference([ours] * 2, theirs) < TOLERANCE:
                return Norm(path, kind, eps)
        raise NotOurs(f"{'.'.join(path)}: a {type(part).__name__}, neither a layer norm nor an rms norm")

    def _types(self) -> tuple[tuple[tuple[str, ...], type], ...]:
        """Of all parts that are not called."""
        called = {*self.parts, ".".join(self.modulation)}
        if self.maker is not None:
            called.add(f"{self.modulation[0]}.{self.maker}")
        parts = [(name, part) for name, part in self.probe.original.named_modules() if name]
        return tuple(
            (tuple(name.split(".")), type(part))
            for name, part in parts
            if not any(name == one or name.startswith(f"{one}.") for one in called)
        )
