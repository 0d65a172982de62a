"""Blocks of diffusion transformers (DiT, SiT, LightningDiT, diffusers' with AdaLayerNormZero).

A block makes shift, scale and gate for its attention and for its MLP by one linear layer of a condition. What stands
around both are adaptive norms and gated residuals, which are row kernels; attention, MLP and what makes the condition
stay the block's own. A block is known by what it does: a copy, whose attention and MLP only note what they are given,
has to give them, and return, what the formula says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniflow_kernels.dropin.parts import (
    Call,
    Norm,
    Notes,
    Path,
    call_of,
    defaults_of,
    handed_on,
    is_as_it_was,
    is_wide,
    parameters_of_forward,
    read_norm,
)
from uniflow_kernels.dropin.probe import TOLERANCE, NotOurs, Probe, check_untouched, difference, own_forward
from uniflow_kernels.dropin.running import at
from uniflow_kernels.ops.flow_choice import is_plain
from uniflow_kernels.ops.modulated_norm import gated_residual_norm, modulated_norm
from uniflow_kernels.torch_private import children_of

PARTS = 6  # shift, scale and gate of the attention, then of the MLP
BATCH, LENGTH = 2, 3


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
    condition: str | tuple[Path, Call]
    modulation: Path
    activated: bool
    norms: tuple[Norm, Norm]
    attention: str
    mlp: str
    attends: Call
    types: tuple[tuple[Path, type], ...]

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
        if isinstance(x, Tensor) and not is_plain(x.is_cuda) and x.ndim == 3 and is_as_it_was(module, self.types):
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
    free = [name for name in others if is_wide(children_of(module)[name])]
    if len(layers) > 1 or len(free) != 2:
        if len(layers) == 1 and len(free) < 2:
            return None  # an MLP that is wide, say
        count = "one layer" if len(layers) == 1 else f"{len(layers)} layers"
        raise NotOurs(f"{count} of modulations, and {', '.join(free) or 'nothing'} between its norms")
    check_untouched(module, but=[part for name in free for part in children_of(module)[name].modules()])  # type: ignore[union-attr]
    with Probe(module) as probe:
        return _Reading(probe, next(iter(layers)), free).block()


class _Reading:
    """A block that is being looked at."""

    def __init__(self, probe: Probe, modulation: tuple[str, str], free: list[str]) -> None:
        self.probe, self.copy, self.modulation = probe, probe.module, modulation
        holder: Any = children_of(self.copy)[modulation[0]]
        layer: Any = children_of(holder)[modulation[1]]
        self.width: int = layer.in_features
        self.x = probe.rows(BATCH, LENGTH, self.width)
        self.parts = {name: Notes(probe.rows(BATCH, LENGTH, self.width)) for name in free}
        children_of(self.copy).update(self.parts)
        makers = [name for name, part in holder.named_children() if name != modulation[1] and is_wide(part)]
        if len(makers) > 1:
            raise NotOurs(f"{modulation[0]}: {', '.join(makers)} make its condition")
        self.maker = makers[0] if makers else None
        if self.maker is not None:
            self.made = Notes(probe.rows(BATCH, self.width))
            children_of(holder)[self.maker] = self.made
        self.parameters = parameters_of_forward(self.copy)

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
        out, calls, free = handed_on(lambda more: self._call(given, more), free)
        condition = given[required[1]] if self.maker is None else self.made.out
        source = required[1] if self.maker is None else ((self.modulation[0], self.maker), calls[self.maker])
        first, second = self.order
        block = Block(
            tuple(names),
            frozenset((*free, *required)),
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
            elif not children_of(part) and type(part) is not Notes:
                handles.append(part.register_forward_hook(self._note_norm))
        try:
            out = self.probe.in_both_modes(lambda: own_forward(self.copy)(self.copy, **given, **more))
        finally:
            for handle in handles:
                handle.remove()
        if difference(out[:1], out[1:]) > 0 or len(order) != 4 or order[:2] != order[2:] or len(set(order)) != 2:
            raise NotOurs("it does not call attention and MLP once each, or another way in training")
        self.order = order[:2]
        calls = {}
        for name, part in noting.items():
            args, kwargs = part.calls[0]
            handed = args[1:] if name in self.parts else args
            if name in self.parts and not (args and isinstance(args[0], Tensor)):
                raise NotOurs(f"{name}: is not given what the norm before it returns")
            calls[name] = call_of(handed, kwargs, more, defaults_of(self.parameters), self.x)
        return out[0], calls

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
        shape = BATCH, LENGTH, self.width
        first, second = (read_norm(self.probe, part, paths[part], shape) for part in called)
        return first, second

    def _types(self) -> tuple[tuple[Path, type], ...]:
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
