"""Per-token heads of other projects (MAR and its relatives): how one is recognised, and what replaces its forward.

A head is known by its submodules and by its numbers: what its own forward returns for a few random rows must be what
the family's formula returns. Its parameters and submodules stay where they are and are read again in every call.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniflow_kernels.dropin.probe import (
    ROWS,
    TOLERANCE,
    NotOurs,
    Probe,
    Unseen,
    check_untouched,
    difference,
    drops,
    is_seen,
)
from uniflow_kernels.dropin.probe import own_forward as own_forward_of
from uniflow_kernels.dropin.running import (
    FINAL,
    GROUPS,
    INDEX,
    MODULATION,
    Arguments,
    Head,
    Mlp,
    children_in,
    linears_of,
    parts_of,
)
from uniflow_kernels.ops.flow_blocks import MODULATION_ORDERS, Form, FromLayers, flow_blocks, swiglu

# what the projects call the same thing
INPUTS = ("input_proj", "noisy_images_proj")
CONDITIONS = ("cond_embed", "cond_proj")
TIMES = ("time_embed", "t_embedder")
BLOCKS = ("res_blocks", "layers")
NORMS = ("in_ln", "norm")
FINAL_WITHOUT_SILU = "ada_ln_modulation"  # SphereAR
ARGUMENTS = {
    **dict.fromkeys(("x", "noisy_images"), "x"),
    **dict.fromkeys(("t", "s", "timesteps", "timestep"), "t"),
    **dict.fromkeys(("c", "condition", "cond", "z"), "c"),
    "index": "index",
}
TIME_SCALES = (1, 1000)  # what a head itself multiplies t by (Ming-UniVision: 1000)

OWN_NORMS = (nn.LayerNorm, nn.RMSNorm)


MLPS = (
    Mlp("mlp", ("0",), "2", "silu"),
    Mlp("mlp", ("w12",), "w3", "swiglu"),  # Ming-UniVision
    Mlp("ffn", ("gate_proj", "up_proj"), "down_proj", "swiglu"),  # VibeVoice
    Mlp(None, ("w1",), "w2", "swiglu"),  # SphereAR
)


def recognise(module: nn.Module) -> Head | None:
    """The head that `module` is; None if it does not even look like one.

    Raises:
        NotOurs: if it looks like one and is none, saying why.
    """
    parts = parts_of(module)
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
    parts = parts_of(module)
    projection = _linear(module, _first(parts, INPUTS) or INPUTS[0])
    width, name = projection.out_features, _first(parts, CONDITIONS)
    condition = _linear(module, name or CONDITIONS[0])
    time = _first(parts, TIMES)
    if (condition.out_features != width) if time else (condition.out_features % width or not name):
        raise NotOurs(f"{name}: makes {condition.out_features} numbers, and the blocks are {width} wide")
    first = blocks[0]
    mlp = next((mlp for mlp in MLPS if _has_mlp(first, mlp)), None)
    norm = _first(parts_of(first), NORMS)
    if mlp is None or norm is None:
        raise NotOurs("a block has no norm, or no MLP of two or three linear layers, under a name that is known")
    grouped = GROUPS in parts
    groups = children_in(module, GROUPS) if grouped else []
    if grouped and (not groups or len(blocks) % len(groups)):
        raise NotOurs(f"{GROUPS}: {len(groups)} do not divide the {len(blocks)} blocks")
    for block in blocks:
        if not _has_mlp(block, mlp) or norm not in parts_of(block):
            raise NotOurs("its blocks are not all of one kind")
        if grouped == (MODULATION in parts_of(block)):
            raise NotOurs("a block has no modulation" if not grouped else f"modulations in blocks and in {GROUPS}")
        _check_widths(block, mlp, width)
    modulations = groups if grouped else [_modulation(block) for block in blocks]
    if any(not isinstance(m, nn.Linear) or m.weight.shape != (3 * width, width) for m in modulations):
        raise NotOurs(f"a modulation is not a linear layer from {width} to {3 * width}")
    final_modulation = _first(parts_of(final), (MODULATION, FINAL_WITHOUT_SILU))
    last = _modulation(final) if final_modulation == MODULATION else parts_of(final).get(final_modulation or "")
    if final_modulation and (not isinstance(last, nn.Linear) or last.weight.shape != (2 * width, width)):
        raise NotOurs(f"{FINAL}: its modulation is not a linear layer from {width} to {2 * width}")
    if "norm_final" not in parts_of(final) or _linear(final, "linear").in_features != width:
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
    embedders = parts_of(module).get(time or "")
    wanted = 0 if time is None else len(embedders) if isinstance(embedders, nn.ModuleList) else 1
    counts = [len(roles[role]) for role in ("x", "c", "t")]
    if counts != [1, 1, wanted]:
        raise NotOurs(f"forward({', '.join(names)}): expected x, c and {wanted} of t, by the names that are known")
    index = roles["index"][0] if roles["index"] and INDEX in parts_of(module) else None
    left_out = frozenset(p.name for p in parameters if p.default is None)
    return Arguments(names, roles["x"][0], tuple(roles["t"]), roles["c"][0], index, frozenset(), left_out)


def _check_mlps(head: Head, probe: Probe) -> None:
    """Each MLP is its linear layers around SiLU."""
    activation = F.silu if head.mlp.kind == "silu" else swiglu
    for i, block in enumerate(children_in(probe.module, head.blocks)):
        ups, down = linears_of(block, head.mlp)
        h = probe.rows(ROWS, head.width)
        by_linears = [down(activation(torch.cat([up(h) for up in ups], -1)))] * 2
        own = probe.in_both_modes(functools.partial(head.mlp_of(block), h))
        if difference(by_linears, own) > TOLERANCE:
            raise NotOurs(f"{head.blocks}.{i}: its MLP's activation is not SiLU, or it does something more")


def _form(head: Head, probe: Probe) -> tuple[Form | None, str | None]:
    """The kind of head as the kernels know it, or why there is no such kind.

    Raises:
        NotOurs: if a norm is neither a layer norm nor an rms norm.
    """
    last: Any = parts_of(parts_of(probe.module)[FINAL])["norm_final"]
    norms = [parts_of(block)[head.norm] for block in children_in(probe.module, head.blocks)]
    kinds = {_norm_kind(norm, head.width, probe) for norm in [*norms, last]}
    if len(kinds) > 1:
        return None, "its norms are of several kinds"
    norm, eps = kinds.pop()
    if getattr(last, "weight", None) is not None:
        return None, "its last norm has a weight"
    if any(drops(part) for block in children_in(probe.module, head.blocks) for part in block.modules()):
        return None, "it has dropout inside"
    linears = [linears_of(block, head.mlp) for block in children_in(probe.module, head.blocks)]
    used = [*head.modulations(probe.module), *(part for ups, down in linears for part in (*ups, down))]
    other = next((type(part) for part in used if type(part) is not nn.Linear), None)
    if other is not None:
        return None, f"its linear layers are of the class {other.__module__}.{other.__name__}"
    return Form(norm, eps, head.mlp.kind), None


def _norm_types(head: Head, module: nn.Module) -> set[type]:
    norms = [parts_of(block)[head.norm] for block in children_in(module, head.blocks)]
    return {type(norm) for norm in [*norms, parts_of(module)[FINAL].norm_final]}


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
    condition: Any = parts_of(probe.module)[head.condition]
    projection: Any = parts_of(probe.module)[head.projection]
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
    signature = inspect.signature(forward).parameters

    def outputs(extra: dict[str, Any]) -> list[list[Tensor]]:
        return [probe.in_both_modes(functools.partial(forward, probe.module, **given, **extra)) for given in inputs]

    unused = {name for name in arguments.names if name not in roles}
    while unused:
        unseen = {name: Unseen() for name in unused}
        failure = None
        try:
            own = outputs(unseen)
            # what `is` would tell apart
            alike = all(_equal(outputs(dict.fromkeys(unused, value)), own) for value in (None, True, False))
        except NotOurs as error:
            failure = error
        seen = {name for name, value in unseen.items() if is_seen(value)}
        if failure is None and alike and not seen:
            return arguments._replace(unused=frozenset(unused)), own
        used = sorted(seen or unused)
        if any(signature[name].default is inspect.Parameter.empty for name in used):
            raise NotOurs(f"its forward looks at {', '.join(used)}") if seen or failure is None else failure
        unused.difference_update(used)
    return arguments, outputs({})


def _equal(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True))


def _apart(head: Head, probe: Probe, given: dict[str, Any], own: list[Tensor]) -> float:
    """How far our two ways of computing it are from its own."""
    module = probe.module
    x: Tensor = parts_of(module)[head.projection](given[head.arguments.x])
    y = head.embedded(module, given)
    try:
        linear = parts_of(module)[FINAL].linear
        apart = difference(probe.in_both_modes(lambda: linear(head.plain(module, x, F.silu(y)))), own)
        if head.form is None:
            return apart
        blocks, modulations, last = head.tensors(module)
        out = linear(flow_blocks(x, blocks, FromLayers(F.silu(y), modulations, last), head.form))
        return max(apart, difference([out] * 2, own))
    except RuntimeError:  # shapes that do not go together
        return float("inf")


def _first(found: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if found.get(name) is not None), None)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    part = parts_of(module).get(name)
    if not isinstance(part, nn.Linear):
        raise NotOurs(f"{name}: expected a linear layer, it is {'missing' if part is None else type(part).__name__}")
    return part


def _modulation(module: nn.Module) -> nn.Module | None:
    """The linear layer of Sequential(SiLU, Linear)."""
    part = parts_of(module)[MODULATION]
    return part[1] if isinstance(part, nn.Sequential) and len(part) == 2 else None


def _has_mlp(block: nn.Module, mlp: Mlp) -> bool:
    parts = parts_of(block if mlp.holder is None else parts_of(block).get(mlp.holder) or nn.Module())
    if len(parts) < len(mlp.up) + 1 or not all(isinstance(parts.get(name), nn.Linear) for name in (*mlp.up, mlp.down)):
        return False
    ups, down = linears_of(block, mlp)
    return sum(up.out_features for up in ups) == down.in_features * (1 if mlp.kind == "silu" else 2)


def _check_widths(block: nn.Module, mlp: Mlp, width: int) -> None:
    ups, down = linears_of(block, mlp)
    if {*(up.in_features for up in ups), down.out_features} != {width}:
        raise NotOurs(f"an MLP is not {width} wide")
