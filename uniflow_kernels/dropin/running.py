"""How a recognised head is run: by the fused blocks, by their definition, or module by module.

Nothing here holds a part of the head: its parameters and submodules stay where they are and are read in every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniflow_kernels.dropin import deferral
from uniflow_kernels.ops.flow_blocks import (
    Affine,
    Block,
    Form,
    block_after_block,
    final_norm,
    flow_block,
    layer_norm,
    swiglu,
)
from uniflow_kernels.ops.flow_choice import backend_for, call_of, choose_path, dtype_of_products, why_not_device
from uniflow_kernels.ops.flow_head import run_flow_blocks
from uniflow_kernels.packing import packed
from uniflow_kernels.torch_private import (
    children_of,
    is_any_hooked,
    is_forward_mode,
    is_hooked,
    is_transforming,
    parameters_of,
    plain_parts,
)

ROWS_WORTH_READING = 64  # below, comparing takes as long as embedding the time of every row
Path = tuple[str, ...]  # of a submodule, in a block or in the last layer


class Norm(NamedTuple):
    """A norm: where it is (None: a function without a weight), and what it computes, "layer" or "rms"."""

    path: Path | None
    kind: str
    eps: float

    def of(self, part: nn.Module) -> Callable[[Tensor], Tensor]:
        """What is called; in place of torch's layer norm what has the right derivatives of forward-mode derivatives."""
        if self.path is None:
            return self._function
        norm = at(part, self.path)
        if type(norm) is nn.LayerNorm and is_forward_mode() and not is_hooked(norm):
            return functools.partial(layer_norm, weight=norm.weight, bias=norm.bias, eps=norm.eps)
        return norm

    def _function(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return layer_norm(x, None, None, self.eps)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


class Mlp(NamedTuple):
    """A block's MLP: the submodule that is called (None: its linear layers are), those layers, and "silu" or "swiglu".

    Of two layers up, the first is the gate.
    """

    path: Path | None
    up: tuple[Path, ...]
    down: Path
    kind: str

    def of(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        """What is called."""
        if self.path is not None:
            return at(block, self.path)
        return self.by_layers(block)

    def by_layers(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        """The same by its layers."""
        ups, down = self.layers(block)
        activation = F.silu if self.kind == "silu" else swiglu

        def mlp(h: Tensor) -> Tensor:
            up = ups[0](h) if len(ups) == 1 else torch.cat([layer(h) for layer in ups], -1)
            return down(activation(up))

        return mlp

    def layers(self, block: nn.Module) -> tuple[list[Any], Any]:
        """The linear layers up, and the one down."""
        return [at(block, path) for path in self.up], at(block, self.down)


class Parts(NamedTuple):
    """Where a block, or the last layer, has what.

    Attributes:
        norm: the norm.
        modulation: the linear layer that makes the modulation, if it has one of its own.
        mlp: the block's.
        linear: the last layer's.
    """

    norm: Norm
    modulation: Path | None
    mlp: Mlp = Mlp(None, (), (), "")
    linear: Path = ()

    @property
    def called(self) -> list[Path]:
        """The submodules that are called as they are."""
        mlp = [self.mlp.path] if self.mlp.path else [*self.mlp.up, self.mlp.down]
        return [path for path in (self.norm.path, self.modulation, *mlp, self.linear) if path]


class Rows(NamedTuple):
    """The arguments that a head's forward requires, and those that may be given for one row where all rows share it.

    Attributes:
        names: all that it requires, in order.
        x: the one that has a row for each row of the result, of `ndim` dimensions.
        times: tensors of one number a row.
        condition: a wide tensor, which may have one row where all times do.
    """

    names: tuple[str, ...]
    x: str
    ndim: int
    times: tuple[str, ...]
    condition: str | None

    def share(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments of a call, with one row of what all rows share."""
        given = {**dict(zip(self.names, args)), **kwargs}  # noqa: B905 - the others are given by name
        if len(args) + len(kwargs) != len(self.names) or given.keys() != set(self.names):
            return args, kwargs
        x, times = given[self.x], [given[name] for name in self.times]
        if not isinstance(x, Tensor) or x.ndim != self.ndim or len(x) < 2:
            return args, kwargs
        if not all(isinstance(t, Tensor) and t.ndim and len(t) == len(x) for t in times):
            return args, kwargs
        times = [t[:1] if _same_in_all_rows(t) else t for t in times]
        given.update(zip(self.times, times, strict=True))
        c = given.get(self.condition or "")
        if isinstance(c, Tensor) and c.ndim and c.stride(0) == 0 and all(len(t) == 1 for t in times):
            given[str(self.condition)] = c[:1]
        return (), given


class Places(NamedTuple):
    """Where the tensors lie in all that is inside: those of blocks (norm, down, up), modulations, and the last one."""

    blocks: tuple[tuple[int, ...], ...]
    modulations: tuple[int, ...]
    last: int | None


@dataclass(frozen=True)
class Head:
    """A recognised head: what its parts are called and how they are put together. Holds no part of the module.

    Attributes:
        names: of its blocks, its last layer and shared modulations.
        block: where a block has what.
        last: where the last layer has what.
        width: W.
        depth: how many blocks.
        order: in which modulations lie.
        activated: whether SiLU of the condition is what blocks are given.
        types: classes of all that is in blocks and last layer.
        rows: which arguments rows may share.
        form: the kind of head as the kernels know it.
        why_not_fused: why there is no such kind.
        places: where its tensors are; known if it has a form.
        functional: whether all inside is PyTorch's own and no tensor needs a copy, so that no module must be called.
    """

    names: deferral.Names
    block: Parts
    last: Parts
    width: int
    depth: int
    order: str
    activated: bool
    types: frozenset[type]
    rows: Rows | None = None
    form: Form | None = None
    why_not_fused: str | None = None
    places: Places | None = None
    functional: bool = False

    def __str__(self) -> str:
        form = f"{self.depth} blocks of {self.width}, {self.block.mlp.kind} MLP, {self.order}"
        kernels = "Triton where it can serve" if self.why_not_fused is None else f"plain only: {self.why_not_fused}"
        return f"flow head ({form}); {kernels}"

    def prepare(self, module: nn.Module) -> None:
        """What must be done before `forward` can be compiled."""
        deferral.prepare(type(module), self.names)

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What `module(*args, **kwargs)` computes; by its blocks' own forwards where something inside must fire."""
        inside = self.inside(module)
        ready = not torch.compiler.is_compiling() or deferral.is_prepared(type(module), self.names)
        if ready and (inside is not None or self._are_bypassed_plain(module)):
            shared = (args, kwargs) if self.rows is None else self.rows.share(args, kwargs)
            try:
                return deferral.run(module, self.names, lambda x, y: self._compute(module, x, y, inside), *shared)
            except deferral.Deviation:
                pass
        return type(module).forward(module, *args, **kwargs)

    def inside(self, module: nn.Module) -> list[Any] | None:
        """The blocks, the last layer and the shared modulations, and all in them; None if one is not as it was."""
        return plain_parts(self.roots_of(module), self.types)

    def roots_of(self, module: nn.Module) -> list[Any]:
        """The blocks, the last layer and the shared modulations."""
        return [*self.blocks_of(module), self._last(module), *self.groups_of(module)]

    def _compute(self, module: nn.Module, x: Tensor, y: Tensor, inside: list[Any] | None) -> Tensor:
        """All from the blocks on; `inside` as of the module."""
        recompute = bool(module.__dict__.get("grad_checkpointing")) and torch.is_grad_enabled()
        return self.linear_of(module)(self._blocks(module, x, y, inside, recompute))

    def _blocks(self, module: nn.Module, x: Tensor, y: Tensor, inside: list[Any] | None, recompute: bool) -> Tensor:
        reason = self._why_not_fused(x, y, inside)
        why_not = reason or why_not_device(x.device, dtype_of_products(x), self.width)
        path = "auto" if why_not is None else backend_for(why_not)  # eager, unless kernels were asked for
        if reason is None and (self.functional or why_not is None):
            assert self.form is not None
            assert inside is not None
            tensors = self.tensors(inside)
            path = path if why_not is not None else choose_path(call_of(x, y, *tensors))
            if self.functional or path != "eager":
                how = self.form, "block" if recompute else "none", path
                return run_flow_blocks(x, y, *tensors, *how, activated=self.activated)
        return self.plain(module, x, self.activation_of(y), recompute)

    def activation_of(self, y: Tensor) -> Tensor:
        """What modulations are made of the condition from."""
        return y if self.activated else F.silu(y)

    def plain(self, module: nn.Module, x: Tensor, a: Tensor, recompute: bool = False) -> Tensor:
        """What `flow_blocks` computes, by calling norms, MLPs and linear layers: hooks and adapters on them work."""
        blocks = [functools.partial(self.block_of, block, a) for block in self.blocks_of(module)]
        shared = [functools.partial(group, a) for group in self.groups_of(module)]
        x = block_after_block(x, blocks, shared, recompute)
        return self._last_norm(self._last(module), x, a)

    def linear_of(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The last layer's linear layer."""
        return at(self._last(module), self.last.linear)

    def last_of(self, last: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        """The last layer."""
        return at(last, self.last.linear)(self._last_norm(last, x, a))

    def _last_norm(self, last: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        modulation = None if self.last.modulation is None else at(last, self.last.modulation)(a)
        return final_norm(x, modulation, self.order, self.last.norm.of(last))

    def block_of(self, block: nn.Module, a: Tensor, x: Tensor, modulation: Tensor | None) -> Tensor:
        """One block; `modulation` is its group's, where it has none of its own."""
        if self.block.modulation is not None:
            modulation = at(block, self.block.modulation)(a)
        assert modulation is not None
        return flow_block(x, modulation, self.order, self.block.norm.of(block), self.block.mlp.of(block))

    def tensors(self, inside: list[Any]) -> tuple[list[Block], list[Affine], Affine | None]:
        """Blocks, modulations and final modulation, as `fused_flow_blocks` takes them."""
        assert self.places is not None
        blocks = []
        for norm, down, *ups in self.places.blocks:
            up = affine_of(inside[ups[0]]) if len(ups) == 1 else _side_by_side([inside[place] for place in ups])
            blocks.append(Block(affine_of(inside[norm]), up, affine_of(inside[down])))
        last = self.places.last
        modulations = [affine_of(inside[place]) for place in self.places.modulations]
        return blocks, modulations, None if last is None else affine_of(inside[last])

    def blocks_of(self, module: nn.Module) -> list[Any]:
        """The blocks."""
        return list(children_of(at(module, (self.names.blocks,))).values())

    def groups_of(self, module: nn.Module) -> list[Any]:
        """The layers that make modulations of several blocks."""
        return [] if self.names.groups is None else list(children_of(at(module, (self.names.groups,))).values())

    def _last(self, module: nn.Module) -> Any:
        return children_of(module)[self.names.last]

    def _why_not_fused(self, x: Tensor, y: Tensor, inside: list[Any] | None) -> str | None:
        if self.why_not_fused is not None:
            return self.why_not_fused
        of_x = x.shape[x.ndim - y.ndim :] if y.ndim <= x.ndim else ()
        if len(of_x) != y.ndim or any(mine not in (1, theirs) for mine, theirs in zip(y.shape, of_x, strict=True)):
            return f"the condition {tuple(y.shape)} has more rows than x {tuple(x.shape)}"
        return None if inside is not None else "a submodule was replaced, wrapped or given a hook"

    def _are_bypassed_plain(self, module: nn.Module) -> bool:
        """Whether submodules whose own forward is not called are as they were."""
        for wholes, parts in ((self.blocks_of(module), self.block), ([self._last(module)], self.last)):
            for whole in wholes:
                called = [at(whole, path) for path in parts.called]
                around = [whole]
                for part in around:  # grows on the way
                    if type(part) not in self.types or is_hooked(part):
                        return False
                    inside = [child for child in children_of(part).values() if child is not None]
                    around += [child for child in inside if not any(child is one for one in called)]
        return not is_any_hooked()


def _same_in_all_rows(t: Tensor) -> bool:
    """As far as strides or, on a CPU, numbers say; a GPU is not waited for, and no traced graph depends on it."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    if t.stride(0) == 0:
        return True
    readable = t.device.type == "cpu" and type(t) is Tensor and not t.requires_grad and t.shape[0] >= ROWS_WORTH_READING
    if not readable or torch.compiler.is_compiling() or is_transforming():
        return False
    first, last = t[:: t.shape[0] - 1].tolist()  # where times differ, these do mostly, and it costs next to nothing
    return first == last and bool((t == t[:1]).all())


def at(module: Any, path: Path) -> Any:
    """The submodule there; any type, since what it is was looked at once."""
    for name in path:
        module = children_of(module)[name]
    return module


def affine_of(layer: Any) -> Affine:
    """Weight and bias of a norm or a linear layer."""
    found: Any = parameters_of(layer)
    if "weight" in found:
        return Affine(found["weight"], found.get("bias"))
    return Affine(layer.weight, getattr(layer, "bias", None))


def _side_by_side(layers: list[nn.Linear]) -> Affine:
    """One layer of several; without gradients its tensors are kept while no parameter changes."""

    def beside(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors) if torch.is_grad_enabled() else packed("side by side", tensors, _cat)

    bias = None if layers[0].bias is None else beside([layer.bias for layer in layers])
    return Affine(beside([layer.weight for layer in layers]), bias)


def _cat(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)
