"""Per-token heads of other projects (MAR and its relatives): how one is recognised.

A head is known by what it does with a few random rows: its own forward hands x through a list of blocks, each an
adaptive norm, an MLP and a gated residual under the same condition, and through a last layer. Which submodule is what
is read from the calls that it makes; that it is nothing else, from what they return.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniflow_kernels.dropin import deferral
from uniflow_kernels.dropin.calling import INPUTS, Called, Chain, Lists, call, linears, own, parts_in
from uniflow_kernels.dropin.probe import (
    ROWS,
    TOLERANCE,
    NotOurs,
    Probe,
    Unseen,
    check_untouched,
    difference,
    drops,
    is_decorated,
    is_seen,
)
from uniflow_kernels.dropin.running import Head, Path, Places, Rows, affine_of, at
from uniflow_kernels.ops.flow_blocks import (
    MODULATION_ORDERS,
    Form,
    FromLayers,
    final_norm,
    flow_block,
    flow_blocks,
    layer_norm,
    swiglu,
)
from uniflow_kernels.torch_private import children_of, parameters_of, tree_leaves

# a module with parts called so is meant to be a head: if it is none, the report says why
BLOCKS = ("res_blocks", "layers")
LAST = "final_layer"

EPSILONS = (1e-6, 1e-5, 1e-8, 1e-12)  # of a norm that is a function


class Norm(NamedTuple):
    """A norm: where it is (None: a function without a weight), and what it computes, "layer" or "rms"."""

    path: Path | None
    kind: str
    eps: float

    def of(self, part: nn.Module) -> Callable[[Tensor], Tensor]:
        """What it computes, of the weight that it has in this part."""
        weight, bias = (None, None) if self.path is None else affine_of(at(part, self.path))
        if self.kind == "layer":
            return lambda x: layer_norm(x, weight, bias, self.eps)
        return lambda x: F.rms_norm(x, x.shape[-1:], weight, self.eps)


class Mlp(NamedTuple):
    """A block's MLP: the submodule that is called (None: its linear layers are), those layers, and "silu" or "swiglu".

    Of two layers up, the first is the gate.
    """

    path: Path | None
    up: tuple[Path, ...]
    down: Path
    kind: str

    def of(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        """What it computes, by its layers in this block."""
        activation = F.silu if self.kind == "silu" else swiglu
        return lambda h: at(block, self.down)(activation(torch.cat([at(block, up)(h) for up in self.up], -1)))


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

    def block(self, block: nn.Module, order: str, x: Tensor, a: Tensor, modulation: Tensor | None) -> Tensor:
        """A block by its formula; `modulation` where it makes none of a."""
        made: Any = modulation if self.modulation is None else at(block, self.modulation)(a)
        return flow_block(x, made, order, self.norm.of(block), self.mlp.of(block))

    def last(self, last: nn.Module, order: str, x: Tensor, a: Tensor) -> Tensor:
        """The last layer by its formula."""
        modulation = None if self.modulation is None else at(last, self.modulation)(a)
        return at(last, self.linear)(final_norm(x, modulation, order, self.norm.of(last)))


def recognise(module: nn.Module) -> Head | None:
    """The head that `module` is; None if it does not even look like one.

    Raises:
        NotOurs: if it looks like one and is none, saying why.
    """
    lists, parts = _lists(module), dict(module.named_children())
    if not lists:
        return None
    named = LAST in parts and any(name in parts for name in INPUTS) and any(names.blocks in BLOCKS for names in lists)
    reading = None
    try:
        check_untouched(module)
        with Probe(module) as probe:
            reading = _Reading(probe, *call(probe, lists))
            return reading.head()
    except NotOurs:
        if named or reading is not None:
            raise
    return None


def _lists(module: nn.Module) -> list[Lists]:
    named = [(name, list(part)) for name, part in module.named_children() if isinstance(part, nn.ModuleList)]
    lists = {name: parts for name, parts in named if parts}
    layers = [name for name, parts in lists.items() if all(type(part) is nn.Linear for part in parts)]
    found = []
    for name, parts in lists.items():
        if name not in layers and all(2 <= len(linears(block)) <= 4 for block in parts):
            found += [Lists(name, other) for other in layers if len(parts) % len(lists[other]) == 0]
            found += [Lists(name, None)]
    return found


class _Reading:
    """A module that hands x through its blocks, being looked at."""

    def __init__(self, probe: Probe, lists: Lists, chain: Chain) -> None:
        self.probe, self.copy, self.lists, self.chain = probe, probe.module, lists, chain
        self.names = {part: tuple(name.split(".")) for name, part in self.copy.named_modules() if name}

    def head(self) -> Head:
        """The head.

        Raises:
            NotOurs: if it is none, saying why.
        """
        chain, names = self.chain, self.lists
        layers = [] if names.groups is None else parts_in(self.copy, names.groups)
        block, activated = self._parts(chain.blocks[0], ("shift", "scale", "gate"))
        last, last_activated = self._parts(chain.last, ("shift", "scale"))
        if last.modulation is not None and activated != last_activated:
            raise NotOurs("the modulations of its blocks and of its last layer are not made in the same way")
        self.activated = activated
        self.width = chain.blocks[0].given[0].shape[-1]
        norms: list[tuple[Called, Norm]] = []
        orders: tuple[str, ...] = MODULATION_ORDERS
        for called in chain.blocks:
            order, block = self._matched_block(block, called, orders)
            norms.append((called, block.norm))
            orders = (order,)
        last = self._matched_last(last, order, chain.last)
        form = self._form(block.mlp.kind, order, [*norms, (chain.last, last.norm)])
        inside = [part for called in (*chain.blocks, chain.last) for part in called.module.modules()]
        head = Head(
            deferral.Names(names.blocks, self._name(chain.last.module), names.groups),
            last.linear,
            self.width,
            len(chain.blocks),
            form,
            activated,
            frozenset(type(part) for part in (*inside, *layers)),
            self._places(block, last),
            decorated=any(is_decorated(part) for part in (self.probe.original, *inside)),
        )
        self._check_whole(head)
        return replace(head, rows=self._rows())

    def _name(self, part: nn.Module) -> str:
        return ".".join(self.names[part])

    # --- what is what ---

    def _parts(self, called: Called, modulated: tuple[str, ...]) -> tuple[Parts, bool]:
        """Where a block, or the last layer, has what, and whether its modulation is made without SiLU."""
        whole, x = called.module, called.given[0]
        paths: dict[nn.Module, Path] = {part: tuple(name.split(".")) for name, part in whole.named_modules() if name}
        calls = [call for call in self.chain.calls if call.module in paths]
        layers = [call for call in calls if isinstance(call.module, nn.Linear)]
        modulation, activated = None, True
        for layer, after in itertools.product(layers, (True, False)):
            made = self.chain.condition if after else F.silu(self.chain.condition)
            if modulation is None and difference([layer.given[0]], [made]) < TOLERANCE:
                modulation, activated = layer, after
        if modulation is None and "gate" in modulated and self.lists.groups is None:
            raise NotOurs(f"{self._name(whole)}: no linear layer makes a modulation of the condition, or of SiLU of it")
        if modulation is not None and modulation.out.shape[-1] != len(modulated) * x.shape[-1]:
            sizes = f"{modulation.out.shape[-1]} numbers of {x.shape[-1]}"
            raise NotOurs(f"{self._name(modulation.module)}: makes {sizes}, which are not {', '.join(modulated)}")
        norm = next((call for call in calls if call.given and call.given[0] is x and not linears(call.module)), None)
        others = [layer for layer in layers if layer is not modulation]
        for more in calls:
            if not any(more is known for known in (norm, modulation, *others)) and parameters_of(more.module):
                raise NotOurs(
                    f"{self._name(more.module)}: no part of the blocks that are served: norm of x, modulation, MLP"
                )
        path = None if norm is None else paths[norm.module]
        parts = Parts(Norm(path, "", 0.0), None if modulation is None else paths[modulation.module])
        order = [paths[layer.module] for layer in others]
        if "gate" in modulated:
            return parts._replace(mlp=self._mlp(whole, order, calls)), activated
        if len(order) != 1:
            raise NotOurs(f"{self._name(whole)}: has {len(order)} linear layers beside a modulation, not one")
        return parts._replace(linear=order[0]), activated

    def _mlp(self, block: nn.Module, order: list[Path], calls: list[Called]) -> Mlp:
        """The MLP that a block's linear layers, in the order in which they are called, are part of."""
        *ups, down = order or [()]
        into = sum(at(block, up).out_features for up in ups)
        share = into / at(block, down).in_features if ups else 0
        if share not in (1, 2) or len(ups) > share:
            layers = ", ".join(".".join(path) for path in order) or "none"
            raise NotOurs(f"{self._name(block)}: no MLP that is known, of the linear layers {layers}")
        together = tuple(
            names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*order, strict=False))
        )
        alone = together and any(call.module is at(block, together) and len(call.given) == 1 for call in calls)
        mlp = Mlp(together if alone else None, tuple(ups), down, "silu" if share == 1 else "swiglu")
        if mlp.path is None:
            return mlp
        h = self.probe.rows(ROWS, at(block, ups[0]).in_features)
        theirs = self.probe.in_both_modes(lambda: at(block, together)(h))
        for tried in (mlp, mlp._replace(up=mlp.up[::-1])):
            if difference([tried.of(block)(h)] * 2, theirs) < TOLERANCE:
                return tried
        raise NotOurs(f"{self._name(at(block, mlp.path))}: its activation is not SiLU, or it does something more")

    # --- that it is nothing else ---

    def _matched_block(self, parts: Parts, called: Called, orders: tuple[str, ...]) -> tuple[str, Parts]:
        """What only numbers tell of a block: its norm, and how modulations and an MLP's layers lie."""
        block, width = called.module, self.width
        x, y, m = self._rows_of_any_size(), self.probe.rows(ROWS, width), self.probe.rows(ROWS, 3 * width)
        condition = [y] if self.lists.groups is None else list(m.chunk(3, -1))
        more = [Unseen() for _ in called.given[1 + len(condition) :]]
        try:
            theirs = self.probe.in_both_modes(lambda: called.again(x, *condition, *more))
        finally:
            if any(map(is_seen, more)):
                raise NotOurs(f"{self._name(block)}: looks at what it is given beside x and the condition")
        a, mlp = y if self.activated else F.silu(y), parts.mlp
        ups = (mlp.up,) if mlp.path or len(mlp.up) == 1 else (mlp.up, mlp.up[::-1])
        for order, norm, up in itertools.product(orders, self._norms(parts.norm, block), ups):
            tried = parts._replace(norm=norm, mlp=mlp._replace(up=up))
            if self._apart(functools.partial(tried.block, block, order, x, a, m), theirs) < TOLERANCE:
                return order, tried
        raise NotOurs(f"{self._name(block)}: computes something else: another order, or a further term")

    def _matched_last(self, parts: Parts, order: str, called: Called) -> Parts:
        """The same of the last layer."""
        last, x, y = called.module, self._rows_of_any_size(), self.probe.rows(ROWS, self.width)
        theirs = self.probe.in_both_modes(lambda: called.again(x, *(y for _ in called.given[1:])))
        a = y if self.activated else F.silu(y)
        for norm in self._norms(parts.norm, last):
            tried = parts._replace(norm=norm)
            if self._apart(functools.partial(tried.last, last, order, x, a), theirs) < TOLERANCE:
                return tried
        raise NotOurs(f"{self._name(last)}: computes something else: another order than the blocks, or a further term")

    def _rows_of_any_size(self) -> Tensor:
        """Rows of which one is so small that a norm's eps counts."""
        x = self.probe.rows(ROWS, self.width)
        x[0] *= 1e-3
        return x

    def _apart(self, ours: Callable[[], Tensor], theirs: list[Tensor]) -> float:
        try:
            return difference(self.probe.in_both_modes(ours), theirs)
        except NotOurs:  # shapes that do not go together
            return float("inf")

    def _norms(self, norm: Norm, whole: nn.Module) -> list[Norm]:
        """What a norm may be. What one is that is a function, only the whole can tell."""
        module = at(whole, norm.path or ())
        if module is None:
            raise NotOurs("its blocks are not all of one kind")
        found = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 0.1]
        tried = [Norm(norm.path, kind, eps) for eps in dict.fromkeys((*found, *EPSILONS)) for kind in ("layer", "rms")]
        if norm.path is None:
            return tried
        x = 1e-3 * self.probe.rows(ROWS, self.width)
        theirs = self.probe.in_both_modes(lambda: module(x))
        for one in tried:
            if self._apart(lambda: one.of(whole)(x), theirs) < TOLERANCE:  # noqa: B023
                return [one]
        raise NotOurs(f"{self._name(module)}: a {type(module).__name__}, neither a layer norm nor an rms norm")

    def _form(self, mlp: str, order: str, norms: list[tuple[Called, Norm]]) -> Form:
        """The kind of head as the kernels know it.

        Raises:
            NotOurs: if there is no such kind.
        """
        kinds = {(norm.kind, norm.eps) for _, norm in norms}
        if len(kinds) > 1:
            raise NotOurs("its norms are of several kinds")
        *blocks, last = (
            norm.path is not None and affine_of(at(called.module, norm.path)).weight is not None
            for called, norm in norms
        )
        if last:
            raise NotOurs("its last norm has a weight")
        if not all(blocks):
            raise NotOurs("a norm of its blocks has no weight")
        for called, _ in norms[:-1]:
            if any(drops(part) for part in called.module.modules()):
                raise NotOurs("it has dropout inside")
            for layer in linears(called.module):
                if type(layer) is not nn.Linear:
                    kind = f"{type(layer).__module__}.{type(layer).__name__}"
                    raise NotOurs(f"{self._name(layer)}: a linear layer of the class {kind}")
        return Form(*kinds.pop(), mlp, order)

    def _inside(self) -> list[nn.Module]:
        """The copy's parts in the order in which `Head.inside` has the module's."""
        groups = [] if self.lists.groups is None else parts_in(self.copy, self.lists.groups)
        parts: list[Any] = [*(called.module for called in (*self.chain.blocks, self.chain.last)), *groups]
        for part in parts:  # grows on the way
            parts += [child for child in children_of(part).values() if child is not None]
        return parts

    def _places(self, block: Parts, last: Parts) -> Places:
        """Where the tensors lie in what is inside."""
        order = {part: place for place, part in enumerate(self._inside())}
        blocks, modulations = [], []
        for called in self.chain.blocks:
            paths = (block.norm.path or (), block.mlp.down, *block.mlp.up)
            blocks.append(tuple(order[at(called.module, path)] for path in paths))
            if block.modulation is not None:
                modulations.append(order[at(called.module, block.modulation)])
        if self.lists.groups is not None:
            modulations = [order[layer] for layer in parts_in(self.copy, self.lists.groups)]
        final = None if last.modulation is None else order[at(self.chain.last.module, last.modulation)]
        return Places(tuple(blocks), tuple(modulations), final)

    def _check_whole(self, head: Head) -> None:
        """Its forward with the blocks put off returns what its forward returns."""

        def compute(x: Tensor, y: Tensor) -> Tensor:
            blocks, modulations, final = head.tensors(self._inside())
            given = FromLayers(y if head.activated else F.silu(y), modulations, final)
            return at(self.chain.last.module, head.linear)(flow_blocks(x, blocks, given, head.form))

        theirs = self.probe.in_both_modes(lambda: own(self.probe, self.chain.given))
        ours = self.probe.in_both_modes(lambda: deferral.run(self.copy, head.names, compute, (), self.chain.given))
        if difference(ours, theirs) > TOLERANCE:
            raise NotOurs("its forward does something more with what its blocks return")
        kept = [leaf for part in self.copy.modules() for leaf in tree_leaves(list(vars(part).values()))]
        if any(type(leaf) is deferral.Between for leaf in kept):
            raise NotOurs("its forward keeps what its blocks return")

    def _rows(self) -> Rows | None:
        """Which arguments its forward takes for one row in place of all."""
        names: dict[str, list[str]] = {"x": [], "t": [], "c": [], "other": []}
        for name, role in self.chain.roles.items():
            names[role].append(name)
        times = {name: self.chain.given[name] for name in names["t"]}
        if names["other"] or not times or not all(isinstance(t, Tensor) for t in times.values()):
            return None

        def alike(shared: list[str]) -> bool:
            one = {name: self.chain.given[name][:1] for name in shared}
            all_rows = {name: row.expand(ROWS, *row.shape[1:]) for name, row in one.items()}
            ours, theirs = (lambda more=more: own(self.probe, self.chain.given | more) for more in (one, all_rows))
            return self._apart(ours, self.probe.in_both_modes(theirs)) < TOLERANCE

        if not alike(names["t"]):
            return None
        condition = names["c"][0] if alike(names["t"] + names["c"]) else None
        x = names["x"][0]
        return Rows(
            tuple(self.chain.roles),
            x,
            list(self.chain.roles).index(x),
            self.chain.given[x].ndim,
            tuple(times),
            condition,
        )
