"""How a recognised head is run: by the fused blocks where kernels serve it, else by its own forward.

Nothing here holds a part of the head: its parameters and submodules stay where they are and are read in every call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from uniflow_kernels import cpu_kernels
from uniflow_kernels.choice import requested
from uniflow_kernels.dropin import deferral
from uniflow_kernels.ops.flow_blocks import Affine, Block, Form
from uniflow_kernels.ops.flow_choice import (
    backend_for,
    call_of,
    choose_path,
    dtype_of_products,
    few_rows,
    is_plain,
    why_not_device,
)
from uniflow_kernels.ops.flow_head import run_flow_blocks
from uniflow_kernels.packing import packed
from uniflow_kernels.torch_private import (
    TRACES_STAND_INS,
    children_of,
    is_dispatch_watched,
    is_forward_mode,
    is_transforming,
    parameters_of,
    plain_parts,
)

ROWS_WORTH_READING = 256  # below, comparing takes as long as embedding the time of every row
WORTH_PUTTING_OFF = 512  # blocks times their width: of less, to run them together takes as long as to run them
Path = tuple[str, ...]  # of a submodule


class Rows(NamedTuple):
    """The arguments that a head's forward requires, and those that may be given for one row where all rows share it.

    Attributes:
        names: all that it requires, in order.
        x: the one that has a row for each row of the result, of `ndim` dimensions; `place` is where it stands.
        times: tensors of one number a row.
        condition: a wide tensor, which may have one row where all times do.
    """

    names: tuple[str, ...]
    x: str
    place: int
    ndim: int
    times: tuple[str, ...]
    condition: str | None

    def share(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments of a call, with one row of what all rows share."""
        x = args[self.place] if self.place < len(args) else kwargs.get(self.x)
        if not isinstance(x, Tensor) or x.ndim != self.ndim or x.shape[0] < 2:
            return args, kwargs
        given = {**dict(zip(self.names, args)), **kwargs}  # noqa: B905 - the others are given by name
        if len(args) + len(kwargs) != len(self.names) or len(given) != len(self.names):
            return args, kwargs
        times: list[Any] = [given.get(name) for name in self.times]
        if not all(isinstance(t, Tensor) and t.ndim and t.shape[0] == x.shape[0] for t in times):
            return args, kwargs
        shared = [_same_in_all_rows(t) for t in times]
        if not any(shared):
            return args, kwargs
        given.update((name, t[:1]) for name, t, same in zip(self.times, times, shared, strict=True) if same)
        c = given.get(self.condition or "")
        if isinstance(c, Tensor) and c.ndim and c.stride(0) == 0 and all(shared):
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
        linear: where the last layer has its linear layer.
        width: W.
        depth: the number of blocks.
        form: the kind of head.
        activated: whether what the blocks are given is the condition behind SiLU.
        types: the classes of all that is inside.
        places: of the tensors.
        rows: the arguments that may be given for one row in place of all, if there are any.
        decorated: whether forwards are decorated with torch.compile.
    """

    names: deferral.Names
    linear: Path
    width: int
    depth: int
    form: Form
    activated: bool
    types: frozenset[type]
    places: Places
    rows: Rows | None = None
    decorated: bool = False

    is_whole: ClassVar[bool] = True

    def __str__(self) -> str:
        form = f"{self.depth} blocks of {self.width}, {self.form.mlp} MLP, {self.form.modulation_order}"
        how = "; there without its torch.compile decorator: compile the patched model" if self.decorated else ""
        return (
            f"flow head ({form}); Triton where it can serve{how}, else the CPU part for few rows, else its own forward"
        )

    def prepare(self, module: nn.Module) -> None:
        """What must be done before `forward` can be compiled."""
        deferral.prepare(type(module), self.names)

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What `module(*args, **kwargs)` computes; by its own forward where no kernel serves it or something must fire.

        Derivatives of forward-mode derivatives are those of our layer norm, since torch's are wrong.
        """
        if self.rows is not None:
            args, kwargs = self.rows.share(args, kwargs)
        inside = self._served(module, args, kwargs)
        if inside is not None and (not torch.compiler.is_compiling() or self._is_traceable(module)):
            try:
                return deferral.run(module, self.names, lambda x, y: self._compute(module, x, y, inside), args, kwargs)
            except deferral.Deviation:
                pass
        return type(module).forward(module, *args, **kwargs)

    def _served(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """All that is inside, if the blocks are to run as one."""
        part: Any = module
        for name in (self.names.last, *self.linear):  # `at`, written out: next to a forward of one row each call counts
            part = None if part is None else children_of(part).get(name)
        weight: Any = None if part is None else parameters_of(part).get("weight")
        if weight is not None and is_plain(weight.is_cuda):  # takes a tenth of the time of what follows
            return self.inside(module) if is_forward_mode() or self._are_few(weight, args, kwargs) else None
        forward_mode = is_forward_mode()
        inside: list[Any] | None = None
        reason: str | None = _CHANGED
        if weight is not None:
            reason = why_not_device(weight.device, dtype_of_products(weight), self.width)
            if reason is None or forward_mode:
                inside = self.inside(module)
                reason = _CHANGED if inside is None else reason
        # raises if kernels were asked for and cannot
        return None if backend_for(reason) == "eager" and not forward_mode else inside

    def _are_few(self, weight: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the CPU part may serve, as far as the rows of the call's first tensor say."""
        if self.depth * self.width < WORTH_PUTTING_OFF or type(weight) is not nn.Parameter:
            return False
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        first = next((given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)), None)
        if first is None or first.shape[:-1].numel() > few_rows(weight.dtype, self.width):
            return False
        return requested() == "auto" and cpu_kernels.why_not_on(weight.device) is None and not is_dispatch_watched()

    def _is_traceable(self, module: nn.Module) -> bool:
        return TRACES_STAND_INS and deferral.is_prepared(type(module), self.names)

    def inside(self, module: nn.Module) -> list[Any] | None:
        """The blocks, the last layer and the shared modulations, and all in them; None if one is not as it was."""
        return plain_parts(self.roots_of(module), self.types)

    def roots_of(self, module: nn.Module) -> list[Any]:
        """The blocks, the last layer and the shared modulations."""
        parts: Any = children_of(module)
        groups = () if self.names.groups is None else children_of(parts[self.names.groups]).values()
        return [*children_of(parts[self.names.blocks]).values(), parts[self.names.last], *groups]

    def _compute(self, module: nn.Module, x: Tensor, y: Tensor, inside: list[Any]) -> Tensor:
        """All from the blocks on."""
        tensors = self.tensors(inside)
        call = call_of(x, y, *tensors)
        if not torch.is_autocast_enabled(x.device.type) and any(t.dtype != x.dtype for t in (y, *call.tensors)):
            raise deferral.Deviation  # what is cast where, only the blocks know
        recompute = torch.is_grad_enabled() and _recomputes(module, inside[0])
        how = self.form, "block" if recompute else "none", choose_path(call)
        return self._linear_of(module)(run_flow_blocks(x, y, *tensors, *how, activated=self.activated))

    def tensors(self, inside: list[Any]) -> tuple[list[Block], list[Affine], Affine | None]:
        """Blocks, modulations and final modulation, as `fused_flow_blocks` takes them."""
        blocks = []
        for norm, down, *ups in self.places.blocks:
            up = affine_of(inside[ups[0]]) if len(ups) == 1 else _side_by_side([inside[place] for place in ups])
            blocks.append(Block(affine_of(inside[norm]), up, affine_of(inside[down])))
        last = self.places.last
        modulations = [affine_of(inside[place]) for place in self.places.modulations]
        return blocks, modulations, None if last is None else affine_of(inside[last])

    def _linear_of(self, module: nn.Module) -> Any:
        return at(module, (self.names.last, *self.linear))


def _recomputes(module: nn.Module, block: nn.Module) -> bool:
    """Whether the head, or as in transformers' GradientCheckpointingLayer the block, computes blocks again."""
    of_block = block.__dict__
    return bool(module.__dict__.get("grad_checkpointing")) or (
        bool(of_block.get("gradient_checkpointing")) and of_block["training"]
    )


_CHANGED = "a submodule was replaced, wrapped or given a hook"


def _same_in_all_rows(t: Tensor) -> bool:
    """As far as strides or, on a CPU, numbers say; a GPU is not waited for, and no traced graph depends on it."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    if t.stride(0) == 0:
        return True
    if torch.compiler.is_compiling() or t.shape[0] < ROWS_WORTH_READING or t.device.type != "cpu":
        return False
    if type(t) is not Tensor or t.requires_grad or is_transforming():
        return False
    first, last = t[:: t.shape[0] - 1].tolist()  # where times differ, these do mostly, and it costs next to nothing
    return first == last and bool((t == t[:1]).all())


def at(module: Any, path: Path) -> Any:
    """The submodule there, None if there is none; any type, since what it is was looked at once."""
    for name in path:
        module = None if module is None else children_of(module).get(name)
    return module


def affine_of(layer: Any) -> Affine:
    """Weight and bias of a norm or a linear layer."""
    found: Any = parameters_of(layer)
    if "weight" in found:
        return Affine(found["weight"], found.get("bias"))
    return Affine(getattr(layer, "weight", None), getattr(layer, "bias", None))  # type: ignore[arg-type]


def _side_by_side(layers: list[nn.Linear]) -> Affine:
    """One layer of several; without gradients its tensors are kept while no parameter changes."""

    def beside(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors) if torch.is_grad_enabled() else packed("side by side", tensors, _cat)

    bias = None if layers[0].bias is None else beside([layer.bias for layer in layers])
    return Affine(beside([layer.weight for layer in layers]), bias)


def _cat(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)
