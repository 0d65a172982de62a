"""Per-token heads of other projects (MAR and its relatives): how one is recognised, and what replaces its forward.

A head is known by its submodules and by its numbers: what its own forward returns for a few random rows must be what
the family's formula returns. Its parameters and submodules stay where they are and are read again in every call.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from uniflow_kernels.dropin.probe import ROWS, TOLERANCE, NotOurs, Probe, check_untouched, difference, drops
from uniflow_kernels.dropin.probe import own_forward as own_forward_of
from uniflow_kernels.ops.flow_blocks import (
    MODULATION_ORDERS,
    Affine,
    Block,
    Form,
    final_norm,
    flow_block,
    flow_blocks,
    swiglu,
)
from uniflow_kernels.ops.flow_choice import rows_known, served_by
from uniflow_kernels.ops.flow_head import fused_flow_blocks
from uniflow_kernels.packing import packed
from uniflow_kernels.torch_private import children_of, is_any_hooked, is_hooked, is_transforming, parameters_of

# what the projects call the same thing
INPUTS = ("input_proj", "noisy_images_proj")
CONDITIONS = ("cond_embed", "cond_proj")
TIMES = ("time_embed", "t_embedder")
BLOCKS = ("res_blocks", "layers")
NORMS = ("in_ln", "norm")
FINAL = "final_layer"
MODULATION = "adaLN_modulation"
GROUPS = "ada_ln_blocks"  # SphereAR: linear layers of the head, each for several blocks
FINAL_WITHOUT_SILU = "ada_ln_modulation"  # SphereAR
INDEX = "index_cond_embed"  # FAR: of an optional argument, added to the condition
ARGUMENTS = {
    **dict.fromkeys(("x", "noisy_images"), "x"),
    **dict.fromkeys(("t", "s", "timesteps", "timestep"), "t"),
    **dict.fromkeys(("c", "condition", "cond", "z"), "c"),
    "index": "index",
}
TIME_SCALES = (1, 1000)  # what a head itself multiplies t by (Ming-UniVision: 1000)

OWN_NORMS = (nn.LayerNorm, nn.RMSNorm)
ROWS_WORTH_READING = 64  # below, comparing takes as long as embedding the time of every row


class Mlp(NamedTuple):
    """Where a block has its MLP: the submodule that is called (None: the block itself), and its linear layers."""

    holder: str | None
    up: tuple[str, ...]
    down: str
    kind: str


MLPS = (
    Mlp("mlp", ("0",), "2", "silu"),
    Mlp("mlp", ("w12",), "w3", "swiglu"),  # Ming-UniVision
    Mlp("ffn", ("gate_proj", "up_proj"), "down_proj", "swiglu"),  # VibeVoice
    Mlp(None, ("w1",), "w2", "swiglu"),  # SphereAR
)


class Arguments(NamedTuple):
    """The parameters of a head's forward: all names in order, those of each role, and those it has no use for."""

    names: tuple[str, ...]
    x: str
    times: tuple[str, ...]
    condition: str
    row_index: str | None
    unused: frozenset[str]

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
            return given if all(value is None or name in free for name, value in given.items()) else None
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
        x = _parts(module)[self.projection](given[self.arguments.x])
        y = self._condition(module, given)
        recompute = bool(module.__dict__.get("grad_checkpointing")) and torch.is_grad_enabled()
        if self._fused(x, y, whole):
            assert self.form is not None
            how = {**self.form._asdict(), "recompute": "block" if recompute else "none"}
            x = fused_flow_blocks(x, y, *self._tensors(module), **how)
        elif whole and self.functional and not recompute:
            assert self.form is not None
            x = flow_blocks(x, F.silu(y), *self._tensors(module), self.form)
        else:
            x = self._plain(module, x, F.silu(y), recompute)
        return _parts(module)[FINAL].linear(x)

    def _condition(self, module: nn.Module, given: dict[str, Any]) -> Tensor:
        """Time and condition embedded and added, one row for all rows where they share both."""
        parts = _parts(module)
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

    def _plain(self, module: nn.Module, x: Tensor, a: Tensor, recompute: bool = False) -> Tensor:
        """What `flow_blocks` computes, by calling norms, MLPs and linear layers: hooks and adapters on them work."""
        blocks, modulation = _children(module, self.blocks), None
        for i, block in enumerate(blocks):
            if self.grouped:
                groups = _children(module, GROUPS)
                per_group = len(blocks) // len(groups)
                modulation = groups[i // per_group](a) if i % per_group == 0 else modulation
            parts = (block, x, a, modulation)
            x = checkpoint(self._block, *parts, use_reentrant=False) if recompute else self._block(*parts)
        last = self._final_modulation(module)
        return final_norm(x, None if last is None else last(a), self.order, _parts(module)[FINAL].norm_final)

    def _block(self, block: nn.Module, x: Tensor, a: Tensor, modulation: Tensor | None) -> Tensor:
        """One block; `modulation` is its group's, where it has none of its own."""
        parts: Any = _parts(block)
        modulation = _parts(parts[MODULATION])["1"](a) if modulation is None else modulation
        return flow_block(x, modulation, self.order, parts[self.norm], self._mlp(block))

    def _mlp(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        parts: Any = _parts(block)
        if self.mlp.holder is not None:
            return parts[self.mlp.holder]
        return lambda h: parts[self.mlp.down](swiglu(parts[self.mlp.up[0]](h)))

    def _modulations(self, module: nn.Module) -> list[nn.Module]:
        if self.grouped:
            return _children(module, GROUPS)
        return [_parts(_parts(block)[MODULATION])["1"] for block in _children(module, self.blocks)]

    def _final_modulation(self, module: nn.Module) -> nn.Module | None:
        if self.final_modulation is None:
            return None
        last: Any = _parts(_parts(module)[FINAL])[self.final_modulation]
        return _parts(last)["1"] if self.final_modulation == MODULATION else last

    def _tensors(self, module: nn.Module) -> tuple[list[Block], list[Affine], Affine | None]:
        """Blocks, modulations and final modulation, as `fused_flow_blocks` takes them."""
        blocks = []
        for block in _children(module, self.blocks):
            ups, down = _linears(block, self.mlp)
            up = _affine(ups[0]) if len(ups) == 1 else _side_by_side(ups)
            blocks.append(Block(_affine(_parts(block)[self.norm]), up, _affine(down)))
        last = self._final_modulation(module)
        return blocks, list(map(_affine, self._modulations(module))), None if last is None else _affine(last)

    def _fused(self, x: Tensor, y: Tensor, whole: bool) -> bool:
        """Whether the blocks run as one op; `whole`: whether all inside is as it was when it was looked at."""
        what = x.device, x.dtype, self.width, rows_known(x)
        return served_by(*what) != "eager" and served_by(*what, self._why_not_fused(x, y, whole)) != "eager"

    def _why_not_fused(self, x: Tensor, y: Tensor, whole: bool) -> str | None:
        if self.why_not_fused is not None:
            return self.why_not_fused
        of_x = x.shape[x.ndim - y.ndim :] if y.ndim <= x.ndim else ()
        if len(of_x) != y.ndim or any(mine not in (1, theirs) for mine, theirs in zip(y.shape, of_x, strict=True)):
            return f"the condition {tuple(y.shape)} has more rows than x {tuple(x.shape)}"
        return None if whole else "a submodule was replaced, wrapped or given a hook"

    def _inside(self, module: nn.Module) -> list[nn.Module]:
        """The blocks, the last layer and the shared modulations, with all that is in them."""
        found = [*_children(module, self.blocks), _parts(module)[FINAL]]
        found += _children(module, GROUPS) if self.grouped else ()
        for part in found:  # grows on the way
            found += [child for child in children_of(part).values() if child is not None]
        return found

    def _bypassed(self, module: nn.Module) -> list[nn.Module]:
        """The submodules whose own forward is not called."""
        found = []
        for whole in (*_children(module, self.blocks), _parts(module)[FINAL]):
            found.append(whole)
            modulation = _parts(whole).get(MODULATION)
            if modulation is not None:
                found += (modulation, _parts(modulation).get("0"))
        return found

    def _untouched(self, parts: Iterable[nn.Module]) -> bool:
        """Whether calling them does nothing but their class's forward, and the class is one that was looked at."""
        if is_any_hooked():
            return False
        return not any(type(part) not in self.types or is_hooked(part) for part in parts)


def recognise(module: nn.Module) -> Head | None:
    """The head that `module` is; None if it does not even look like one.

    Raises:
        NotOurs: if it looks like one and is none, saying why.
    """
    parts = _parts(module)
    blocks = parts.get(_first(parts, BLOCKS) or "")
    final = parts.get(FINAL)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks) or final is None or not _first(parts, INPUTS):
        return None
    check_untouched(module)
    head = _read(module, list(blocks), final)
    with Probe(module) as probe:
        _check_mlps(head, probe)
        form, why_not = _form(head, probe)
        functional = form is not None and len(head.mlp.up) == 1 and _norm_types(head, module) <= set(OWN_NORMS)
        return _matched(replace(head, form=form, why_not_fused=why_not, functional=functional), probe)


def _read(module: nn.Module, blocks: list[nn.Module], final: nn.Module) -> Head:
    """By names and shapes alone."""
    parts = _parts(module)
    projection = _linear(module, _first(parts, INPUTS) or INPUTS[0])
    width, name = projection.out_features, _first(parts, CONDITIONS)
    condition = _linear(module, name or CONDITIONS[0])
    time = _first(parts, TIMES)
    if (condition.out_features != width) if time else (condition.out_features % width or not name):
        raise NotOurs(f"{name}: makes {condition.out_features} numbers, and the blocks are {width} wide")
    first = blocks[0]
    mlp = next((mlp for mlp in MLPS if _has_mlp(first, mlp)), None)
    norm = _first(_parts(first), NORMS)
    if mlp is None or norm is None:
        raise NotOurs("a block has no norm, or no MLP of two or three linear layers, under a name that is known")
    grouped = GROUPS in parts
    groups = _children(module, GROUPS) if grouped else []
    if grouped and (not groups or len(blocks) % len(groups)):
        raise NotOurs(f"{GROUPS}: {len(groups)} do not divide the {len(blocks)} blocks")
    for block in blocks:
        if not _has_mlp(block, mlp) or norm not in _parts(block):
            raise NotOurs("its blocks are not all of one kind")
        if grouped == (MODULATION in _parts(block)):
            raise NotOurs("a block has no modulation" if not grouped else f"modulations in blocks and in {GROUPS}")
        _check_widths(block, mlp, width)
    modulations = groups if grouped else [_modulation(block) for block in blocks]
    if any(not isinstance(m, nn.Linear) or m.weight.shape != (3 * width, width) for m in modulations):
        raise NotOurs(f"a modulation is not a linear layer from {width} to {3 * width}")
    final_modulation = _first(_parts(final), (MODULATION, FINAL_WITHOUT_SILU))
    last = _modulation(final) if final_modulation == MODULATION else _parts(final).get(final_modulation or "")
    if final_modulation and (not isinstance(last, nn.Linear) or last.weight.shape != (2 * width, width)):
        raise NotOurs(f"{FINAL}: its modulation is not a linear layer from {width} to {2 * width}")
    if "norm_final" not in _parts(final) or _linear(final, "linear").in_features != width:
        raise NotOurs(f"{FINAL}: has no norm_final, or no linear layer from {width}")
    return Head(
        _first(parts, INPUTS) or "",
        name or "",
        time,
        _first(parts, BLOCKS) or "",
        norm,
        mlp,
        grouped,
        final_modulation,
        width,
        len(blocks),
        _arguments(module, time),
        frozenset(type(part) for whole in (*blocks, final, *groups) for part in whole.modules()),
    )


def _arguments(module: nn.Module, time: str | None) -> Arguments:
    parameters = list(inspect.signature(own_forward_of(module)).parameters.values())[1:]
    names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    roles: dict[str, list[str]] = {"x": [], "t": [], "c": [], "index": []}
    for name in names:
        roles.get(ARGUMENTS.get(name, ""), []).append(name)
    embedders = _parts(module).get(time or "")
    wanted = 0 if time is None else len(embedders) if isinstance(embedders, nn.ModuleList) else 1
    counts = [len(roles[role]) for role in ("x", "c", "t")]
    if counts != [1, 1, wanted]:
        raise NotOurs(f"forward({', '.join(names)}): expected x, c and {wanted} of t, by the names that are known")
    index = roles["index"][0] if roles["index"] and INDEX in _parts(module) else None
    return Arguments(names, roles["x"][0], tuple(roles["t"]), roles["c"][0], index, frozenset())


def _check_mlps(head: Head, probe: Probe) -> None:
    """Each MLP is its linear layers around SiLU."""
    activation = F.silu if head.mlp.kind == "silu" else swiglu
    for i, block in enumerate(_children(probe.module, head.blocks)):
        ups, down = _linears(block, head.mlp)
        h = probe.rows(ROWS, head.width)
        by_linears = [down(activation(torch.cat([up(h) for up in ups], -1)))] * 2
        own = probe.in_both_modes(functools.partial(head._mlp(block), h))
        if difference(by_linears, own) > TOLERANCE:
            raise NotOurs(f"{head.blocks}.{i}: its MLP's activation is not SiLU, or it does something more")


def _form(head: Head, probe: Probe) -> tuple[Form | None, str | None]:
    """The kind of head as the kernels know it, or why there is no such kind.

    Raises:
        NotOurs: if a norm is neither a layer norm nor an rms norm.
    """
    last: Any = _parts(_parts(probe.module)[FINAL])["norm_final"]
    norms = [_parts(block)[head.norm] for block in _children(probe.module, head.blocks)]
    kinds = {_norm_kind(norm, head.width, probe) for norm in [*norms, last]}
    if len(kinds) > 1:
        return None, "its norms are of several kinds"
    norm, eps = kinds.pop()
    if getattr(last, "weight", None) is not None:
        return None, "its last norm has a weight"
    if any(drops(part) for block in _children(probe.module, head.blocks) for part in block.modules()):
        return None, "it has dropout inside"
    linears = [_linears(block, head.mlp) for block in _children(probe.module, head.blocks)]
    used = [*head._modulations(probe.module), *(part for ups, down in linears for part in (*ups, down))]
    other = next((type(part) for part in used if type(part) is not nn.Linear), None)
    if other is not None:
        return None, f"its linear layers are of the class {other.__module__}.{other.__name__}"
    return Form(norm, eps, head.mlp.kind), None


def _norm_types(head: Head, module: nn.Module) -> set[type]:
    norms = [_parts(block)[head.norm] for block in _children(module, head.blocks)]
    return {type(norm) for norm in [*norms, _parts(module)[FINAL].norm_final]}


def _norm_kind(norm: nn.Module, width: int, probe: Probe) -> tuple[str, float]:
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if isinstance(eps, float) and (weight is None or weight.shape == (width,)):
        x = probe.rows(ROWS, width, scale=1e-3)  # so small that eps counts
        own = probe.in_both_modes(lambda: norm(x))
        if difference([F.layer_norm(x, x.shape[-1:], weight, bias, eps)] * 2, own) < TOLERANCE:
            return "layer", eps
        if bias is None and difference([F.rms_norm(x, x.shape[-1:], weight, eps)] * 2, own) < TOLERANCE:
            return "rms", eps
    raise NotOurs(f"{type(norm).__name__}: neither a layer norm nor an rms norm with an eps")


def _matched(head: Head, probe: Probe) -> Head:
    """`head` with what only numbers tell: the order of its modulations, and what it multiplies t by."""
    closest, reason = float("inf"), None
    for dims in (1, 2) if head.time else (1,):  # t [M], or [M, 1] (pocket-tts)
        inputs = _inputs(head, probe, dims)
        try:
            arguments, own = _own_outputs(head, probe, inputs)
        except NotOurs as error:
            reason = reason or error
            continue
        for order, scale in itertools.product(MODULATION_ORDERS, TIME_SCALES if head.time else (1,)):
            form = head.form and head.form._replace(modulation_order=order)
            tried = replace(head, arguments=arguments, order=order, time_scale=scale, form=form)
            apart = max(_apart(tried, probe, given, theirs) for given, theirs in zip(inputs, own, strict=True))
            if apart < TOLERANCE:
                return tried
            closest = min(closest, apart)
    if reason is not None and closest == float("inf"):
        raise reason
    raise NotOurs(f"its forward computes something else (apart by {closest:.1e}): another order, or a further term")


def _inputs(head: Head, probe: Probe, dims: int) -> list[dict[str, Any]]:
    """Arguments to try, by name: without and, where there is one, with an index."""
    condition: Any = _parts(probe.module)[head.condition]
    projection: Any = _parts(probe.module)[head.projection]
    pixels = condition.out_features // head.width
    x = probe.rows(ROWS, *(() if head.time else (pixels,)), projection.in_features)
    given = {head.arguments.x: x, head.arguments.condition: probe.rows(ROWS, condition.in_features)}
    given |= {
        name: probe.times(ROWS, 1).squeeze(-1) if dims == 1 else probe.times(ROWS, 1) for name in head.arguments.times
    }
    with_index = [{**given, head.arguments.row_index: probe.rows(ROWS, 1)}] if head.arguments.row_index else []
    return [given, *with_index]


def _own_outputs(head: Head, probe: Probe, inputs: list[dict[str, Any]]) -> tuple[Arguments, list[list[Tensor]]]:
    """What its own forward returns for each of the inputs, in both modes; and its arguments with the unused ones."""
    arguments, forward = head.arguments, own_forward_of(probe.module)
    roles = {arguments.x, *arguments.times, arguments.condition, arguments.row_index}
    others = frozenset(name for name in arguments.names if name not in roles)

    def outputs(extra: dict[str, Any]) -> list[list[Tensor]]:
        return [probe.in_both_modes(functools.partial(forward, probe.module, **given, **extra)) for given in inputs]

    try:  # with an object that nothing can be done with, which shows that nothing is
        return arguments._replace(unused=others), outputs({name: object() for name in others})
    except NotOurs:
        if not others:
            raise
    return arguments, outputs({})


def _apart(head: Head, probe: Probe, given: dict[str, Any], own: list[Tensor]) -> float:
    """How far our two ways of computing it are from its own."""
    module = probe.module
    x: Tensor = _parts(module)[head.projection](given[head.arguments.x])
    y = head._condition(module, given)
    try:
        linear = _parts(module)[FINAL].linear
        apart = difference(probe.in_both_modes(lambda: linear(head._plain(module, x, F.silu(y)))), own)
        if head.form is None:
            return apart
        out = linear(flow_blocks(x, F.silu(y), *head._tensors(module), head.form))
        return max(apart, difference([out] * 2, own))
    except RuntimeError:  # shapes that do not go together
        return float("inf")


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


def _first(found: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if found.get(name) is not None), None)


def _parts(module: nn.Module) -> Any:
    """Its submodules by name; any type, since what they are was looked at once."""
    return children_of(module)


def _children(module: nn.Module, name: str) -> list[nn.Module]:
    return list(_parts(_parts(module)[name]).values())


def _linear(module: nn.Module, name: str) -> nn.Linear:
    part = _parts(module).get(name)
    if not isinstance(part, nn.Linear):
        raise NotOurs(f"{name}: expected a linear layer, it is {'missing' if part is None else type(part).__name__}")
    return part


def _modulation(module: nn.Module) -> nn.Module | None:
    """The linear layer of Sequential(SiLU, Linear)."""
    part = _parts(module)[MODULATION]
    return part[1] if isinstance(part, nn.Sequential) and len(part) == 2 else None


def _has_mlp(block: nn.Module, mlp: Mlp) -> bool:
    parts = _parts(block if mlp.holder is None else _parts(block).get(mlp.holder) or nn.Module())
    if len(parts) < len(mlp.up) + 1 or not all(isinstance(parts.get(name), nn.Linear) for name in (*mlp.up, mlp.down)):
        return False
    ups, down = _linears(block, mlp)
    return sum(up.out_features for up in ups) == down.in_features * (1 if mlp.kind == "silu" else 2)


def _linears(block: nn.Module, mlp: Mlp) -> tuple[list[nn.Linear], nn.Linear]:
    parts = _parts(block if mlp.holder is None else _parts(block)[mlp.holder])
    return [parts[name] for name in mlp.up], parts[mlp.down]


def _check_widths(block: nn.Module, mlp: Mlp, width: int) -> None:
    ups, down = _linears(block, mlp)
    if {*(up.in_features for up in ups), down.out_features} != {width}:
        raise NotOurs(f"an MLP is not {width} wide")


def _affine(layer: Any) -> Affine:
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
