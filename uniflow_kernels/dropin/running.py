"""How a recognised head is run: by the fused blocks, by their definition, or module by module.

Nothing here holds a part of the head: its parameters and submodules stay where they are and are read in every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniflow_kernels.ops.flow_blocks import (
    MODULATION_ORDERS,
    Affine,
    Block,
    Form,
    block_after_block,
    final_norm,
    flow_block,
    layer_norm,
    swiglu,
)
from uniflow_kernels.ops.flow_choice import Call, call_of, choose_path, dtype_of_products, why_not_device
from uniflow_kernels.ops.flow_head import run_flow_blocks
from uniflow_kernels.packing import packed
from uniflow_kernels.torch_private import (
    children_of,
    is_any_hooked,
    is_forward_mode,
    is_hooked,
    is_transforming,
    parameters_of,
)

FINAL = "final_layer"
MODULATION = "adaLN_modulation"
GROUPS = "ada_ln_blocks"  # SphereAR: linear layers of the head, each for several blocks
INDEX = "index_cond_embed"  # FAR: of an optional argument, added to the condition
ROWS_WORTH_READING = 64  # below, comparing takes as long as embedding the time of every row


class Mlp(NamedTuple):
    """Where a block has its MLP: the submodule that is called (None: the block itself), and its linear layers."""

    holder: str | None
    up: tuple[str, ...]
    down: str
    kind: str


class Arguments(NamedTuple):
    """The parameters of a head's forward: all names in order, those of each role, those it has no use for.

    `left_out` are those that None stands for when they are not given.
    """

    names: tuple[str, ...]
    x: str
    times: tuple[str, ...]
    condition: str
    row_index: str | None
    unused: frozenset[str]
    left_out: frozenset[str]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Name -> value of one call; None if the call needs the head's own forward."""
        given = dict(zip(self.names, args))  # noqa: B905 - names may be left out
        if kwargs:
            given.update(kwargs)
        if len(given) != len(args) + len(kwargs):
            return None
        for name in self.needed:
            if not isinstance(given.get(name), Tensor):
                return None
        if len(given) > len(self.needed):
            free = (*self.needed, *self.unused, self.row_index)
            known = (name in free or (value is None and name in self.left_out) for name, value in given.items())
            return given if all(known) else None
        return given

    @property
    def needed(self) -> tuple[str, ...]:
        """The names without which there is no call."""
        return (self.x, self.condition, *self.times)


@dataclass(frozen=True)
class Head:
    """A recognised head: what its parts are called and how they are put together. Holds no part of the module."""

    projection: str
    condition: str
    time: str | None
    blocks: str
    norm: str
    mlp: Mlp
    grouped: bool
    final_modulation: str | None
    width: int
    depth: int
    arguments: Arguments
    types: frozenset[type]
    time_scale: int = 1
    order: str = MODULATION_ORDERS[0]
    form: Form | None = None
    why_not_fused: str | None = None
    functional: bool = False  # all inside is PyTorch's own, and its tensors need no copy: no module must be called

    def __str__(self) -> str:
        form = f"{self.depth} blocks of {self.width}, {self.mlp.kind} MLP, {self.order}"
        kernels = "Triton where it can serve" if self.why_not_fused is None else f"plain only: {self.why_not_fused}"
        return f"flow head ({form}); {kernels}"

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """What `module(*args, **kwargs)` computes; by its own forward where something inside must fire."""
        given = self.arguments.bind(args, kwargs)
        whole = given is not None and self._untouched(self._inside(module))
        if given is None or not (whole or self._untouched(self._bypassed(module))):
            return type(module).forward(module, *args, **kwargs)
        x = parts_of(module)[self.projection](given[self.arguments.x])
        y = self.embedded(module, given)
        return parts_of(module)[FINAL].linear(self._blocks(module, x, y, whole))

    def _blocks(self, module: nn.Module, x: Tensor, y: Tensor, whole: bool) -> Tensor:
        """All between the projections; `whole`: whether all inside is as it was when it was looked at."""
        recompute = bool(module.__dict__.get("grad_checkpointing")) and torch.is_grad_enabled()
        dtype, reason = dtype_of_products(x), self._why_not_fused(x, y, whole)
        # where only the modules can serve, their tensors need not be put together
        if reason is None and (self.functional or why_not_device(x.device, dtype, self.width) is None):
            assert self.form is not None
            tensors = self.tensors(module)
            path = choose_path(call_of(x, y, *tensors))
            if self.functional or path != "eager":
                return run_flow_blocks(x, y, *tensors, self.form, "block" if recompute else "none", path)
        else:
            choose_path(Call(x.device, dtype, self.width, 0, rows=None, why_not=reason))  # raises, or eager
        return self.plain(module, x, F.silu(y), recompute)

    def embedded(self, module: nn.Module, given: dict[str, Any]) -> Tensor:
        """Time and condition embedded and added, one row for all rows where they share both."""
        parts = parts_of(module)
        c = given[self.arguments.condition]
        if self.time is None:
            return parts[self.condition](c).reshape(c.shape[0], -1, self.width)
        times = [given[name] for name in self.arguments.times]
        rows = given[self.arguments.x].shape[0]
        if rows > 1 and all(t.ndim and t.shape[0] == rows for t in (c, *times)):
            times = [t[:1] if _same_in_all_rows(t) else t for t in times]
            c = c[:1] if c.stride(0) == 0 and all(t.shape[0] == 1 for t in times) else c
        y = self._time(parts[self.time], times) + parts[self.condition](c)
        index = given.get(self.arguments.row_index) if self.arguments.row_index else None
        return y if index is None else y + parts[INDEX](index)

    def _time(self, embed: Any, times: list[Tensor]) -> Tensor:
        if self.time_scale != 1:
            times = [t * self.time_scale for t in times]
        if not isinstance(embed, nn.ModuleList):
            return embed(times[0])
        embedded = [one(t) for one, t in zip(embed, times, strict=True)]
        return functools.reduce(torch.add, embedded) / len(embedded)

    def plain(self, module: nn.Module, x: Tensor, a: Tensor, recompute: bool = False) -> Tensor:
        """What `flow_blocks` computes, by calling norms, MLPs and linear layers: hooks and adapters on them work."""
        blocks = [functools.partial(self._block, block, a) for block in children_in(module, self.blocks)]
        shared = [functools.partial(group, a) for group in children_in(module, GROUPS)] if self.grouped else []
        x = block_after_block(x, blocks, shared, recompute)
        last, norm = self._final_modulation(module), _normed_by(parts_of(module)[FINAL].norm_final)
        return final_norm(x, None if last is None else last(a), self.order, norm)

    def _block(self, block: nn.Module, a: Tensor, x: Tensor, modulation: Tensor | None) -> Tensor:
        """One block; `modulation` is its group's, where it has none of its own."""
        parts: Any = parts_of(block)
        modulation = parts_of(parts[MODULATION])["1"](a) if modulation is None else modulation
        return flow_block(x, modulation, self.order, _normed_by(parts[self.norm]), self.mlp_of(block))

    def mlp_of(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        """What [..., W] -> [..., W] a block's MLP is."""
        parts: Any = parts_of(block)
        if self.mlp.holder is not None:
            return parts[self.mlp.holder]
        return lambda h: parts[self.mlp.down](swiglu(parts[self.mlp.up[0]](h)))

    def modulations(self, module: nn.Module) -> list[nn.Module]:
        """The linear layers that make the blocks' modulations, one a group."""
        if self.grouped:
            return children_in(module, GROUPS)
        return [parts_of(parts_of(block)[MODULATION])["1"] for block in children_in(module, self.blocks)]

    def _final_modulation(self, module: nn.Module) -> nn.Module | None:
        if self.final_modulation is None:
            return None
        last: Any = parts_of(parts_of(module)[FINAL])[self.final_modulation]
        return parts_of(last)["1"] if self.final_modulation == MODULATION else last

    def tensors(self, module: nn.Module) -> tuple[list[Block], list[Affine], Affine | None]:
        """Blocks, modulations and final modulation, as `fused_flow_blocks` takes them."""
        blocks = []
        for block in children_in(module, self.blocks):
            ups, down = linears_of(block, self.mlp)
            up = affine_of(ups[0]) if len(ups) == 1 else _side_by_side(ups)
            blocks.append(Block(affine_of(parts_of(block)[self.norm]), up, affine_of(down)))
        last = self._final_modulation(module)
        return blocks, list(map(affine_of, self.modulations(module))), None if last is None else affine_of(last)

    def _why_not_fused(self, x: Tensor, y: Tensor, whole: bool) -> str | None:
        if self.why_not_fused is not None:
            return self.why_not_fused
        of_x = x.shape[x.ndim - y.ndim :] if y.ndim <= x.ndim else ()
        if len(of_x) != y.ndim or any(mine not in (1, theirs) for mine, theirs in zip(y.shape, of_x, strict=True)):
            return f"the condition {tuple(y.shape)} has more rows than x {tuple(x.shape)}"
        return None if whole else "a submodule was replaced, wrapped or given a hook"

    def _inside(self, module: nn.Module) -> list[nn.Module]:
        """The blocks, the last layer and the shared modulations, with all that is in them."""
        found = [*children_in(module, self.blocks), parts_of(module)[FINAL]]
        found += children_in(module, GROUPS) if self.grouped else ()
        for part in found:  # grows on the way
            found += [child for child in children_of(part).values() if child is not None]
        return found

    def _bypassed(self, module: nn.Module) -> list[nn.Module]:
        """The submodules whose own forward is not called."""
        found = []
        for whole in (*children_in(module, self.blocks), parts_of(module)[FINAL]):
            found.append(whole)
            modulation = parts_of(whole).get(MODULATION)
            if modulation is not None:
                found += (modulation, parts_of(modulation).get("0"))
        return found

    def _untouched(self, parts: Iterable[nn.Module]) -> bool:
        """Whether calling them does nothing but their class's forward, and the class is one that was looked at."""
        if is_any_hooked():
            return False
        return not any(type(part) not in self.types or is_hooked(part) for part in parts)


def _normed_by(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """A norm, but torch's layer norm with the right derivatives of forward-mode derivatives."""
    if type(norm) is nn.LayerNorm and is_forward_mode() and not is_hooked(norm):
        return functools.partial(layer_norm, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    return norm


def _same_in_all_rows(t: Tensor) -> bool:
    """As far as strides or, on a CPU, numbers say; a GPU is not waited for, and no traced graph depends on it."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    if t.stride(0) == 0:
        return True
    readable = t.device.type == "cpu" and type(t) is Tensor and not t.requires_grad and t.shape[0] >= ROWS_WORTH_READING
    if not readable or torch.compiler.is_compiling() or is_transforming():
        return False
    return bool((t == t[:1]).all())


def parts_of(module: nn.Module) -> Any:
    """Its submodules by name; any type, since what they are was looked at once."""
    return children_of(module)


def children_in(module: nn.Module, name: str) -> list[nn.Module]:
    """The submodules of the list that is called so."""
    return list(parts_of(parts_of(module)[name]).values())


def linears_of(block: nn.Module, mlp: Mlp) -> tuple[list[nn.Linear], nn.Linear]:
    """Of a block's MLP: the layers up, and the layer down."""
    parts = parts_of(block if mlp.holder is None else parts_of(block)[mlp.holder])
    return [parts[name] for name in mlp.up], parts[mlp.down]


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
