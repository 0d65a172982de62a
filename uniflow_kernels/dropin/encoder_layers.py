"""Layers of vision transformers (transformers' ViT, DINO, CLIP, SigLIP and InternVL, timm's `Block`, and their like).

Such a layer is x + s1 * attention(norm1(x)), then x + s2 * MLP(norm2(x)), with LayerScale s or without. It is known by
what it does: a copy, whose attention and MLP only note what they are given, has to give them, and return, what that
says. Where attention is products around something, and the MLP two with an activation between, all of it can run as
`transformer_layers` do. What lies between the products of attention stays the layer's own code, with its masks,
rotations and norms: the attention's forward is called with a stand-in, whose linear layers give what was made before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from uniflow_kernels.dropin import attentions
from uniflow_kernels.dropin.calling import Called, calls_of
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
from uniflow_kernels.dropin.probe import TOLERANCE, NotOurs, Probe, check_untouched, difference, drops, own_forward
from uniflow_kernels.dropin.running import affine_of, at
from uniflow_kernels.ops.flow_choice import dtype_of_products, is_plain
from uniflow_kernels.ops.modulated_norm import norm_has_kernels, residual_norm
from uniflow_kernels.ops.registration import wants_gradient
from uniflow_kernels.ops.transformer_layers import (
    ACTIVATIONS,
    Layer,
    LayerForm,
    choose_layers_path,
    may_have_kernels,
    plain_layer,
    transformer_layers,
)
from uniflow_kernels.torch_private import children_of, fires, is_hooked, parameters_of, plain_parts, tree_leaves

BATCH, LENGTH = 3, 5
ROUNDING = TOLERANCE / 20  # of one operation: forms of GELU differ by no more than TOLERANCE


class Place(NamedTuple):
    """Something that a module has: the path of the module, and what it calls it."""

    path: Path
    name: str


class Products(NamedTuple):
    """Where the products of a layer are.

    Attributes:
        kind: the class of its attention.
        ins: what that calls the linear layers that make queries, keys and values; or the one that does.
        out: the one behind.
        scored: the attention, if it is one that writes its scores.
        fc1, fc2: of the MLP.
        form: the kind of norm and the activation.
        classes: of all parts but attention.
        drops: what drops in them, beside what the layer has on its branches.
    """

    kind: type
    ins: tuple[str, ...]
    out: str
    scored: attentions.Attention | None
    fc1: Path
    fc2: Path
    form: LayerForm
    classes: frozenset[type]
    drops: tuple[Place, ...]


@dataclass(frozen=True)
class EncoderLayer:
    """A recognised layer; holds no part of the module.

    Attributes:
        width: W.
        names: of all arguments of its forward; the first is x.
        free: those that may be given; where others are, its own forward runs.
        norms: before attention and MLP.
        attention, mlp: their names.
        attends: what attention is given beside x.
        in_tuple: whether attention returns a tuple.
        scales: LayerScale of both branches, if there is one.
        types: path -> class of the parts that are not called.
        drops: what drops in them.
        products: where all products are; if they cannot run as those of `transformer_layers`, why not.
    """

    width: int
    names: tuple[str, ...]
    free: frozenset[str]
    norms: tuple[Norm, Norm]
    attention: str
    mlp: str
    attends: Call
    in_tuple: bool
    scales: tuple[Place | None, Place | None]
    types: tuple[tuple[Path, type], ...]
    drops: tuple[Place, ...]
    products: Products | str = ""

    is_whole: ClassVar[bool] = False  # attention inside may be served too

    def __str__(self) -> str:
        scaled = "LayerScale" if any(self.scales) else "no LayerScale"
        kind, how = f"{self.norms[0].kind} norm, {scaled}", "residual and norm by Triton where it can serve"
        if isinstance(self.products, Products):
            kind = f"{kind}, {self.products.form.activation}"
            how = f"without gradients all by what was measured to be the fastest, by oneDNN or Triton; else {how}"
        else:
            how = f"{how}, its products as they are: {self.products}"
        return f"transformer layer of {self.width} ({kind}); {how}, else its own forward"

    def prepare(self, module: nn.Module) -> None:
        """Nothing must be done before `forward` can be compiled."""

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What `module(*args, **kwargs)` computes; by its own forward where no kernel serves or something must fire."""
        x = args[0] if args else kwargs.get(self.names[0])
        if isinstance(x, Tensor) and not torch.compiler.is_compiling() and _is_served(x):
            given = {**dict(zip(self.names, args)), **kwargs}  # noqa: B905 - names may be left out
            known = self.free.issuperset(given) and len(given) == len(args) + len(kwargs)
            if known and self._is_as_it_was(module):
                made = self._by_kernels(module, given, x)
                if made is None and self._has_row_kernels(module, x):
                    made = self.compute(module, given, x)
                if made is not None:
                    return made
        return type(module).forward(module, *args, **kwargs)

    def compute(self, module: nn.Module, given: Mapping[str, Any], x: Tensor) -> Tensor:
        """The layer with attention and MLP as they are, and one operation between them."""
        parts: Any = children_of(module)
        attended = self.attends.of(parts[self.attention], given, x, at(module, self.norms[0].path)(x))
        attended = attended[0] if self.in_tuple else attended
        scale, dtype = self._scale(module, 0), dtype_of_products(x)
        x, h = residual_norm(x, attended, scale, **self.norms[1].how(module), dtype=dtype)
        made, scale = parts[self.mlp](h), self._scale(module, 1)
        return x + made if scale is None else torch.addcmul(x, made, scale)

    def layer(self, module: nn.Module, given: Mapping[str, Any], x: Tensor, products: Products) -> Layer:
        """The layer as `transformer_layers` takes it."""
        attention: Any = children_of(module)[self.attention]
        alone = all(value is None or value is x for value in given.values())  # no mask, say

        def attend(qkv: Tensor) -> Tensor:
            if products.scored is not None and alone:
                return products.scored.between(attention, qkv)
            return _between(attention, products.ins, products.out, qkv, lambda one: self.attends.of(one, given, x, x))

        norms = [affine_of(at(module, norm.path)) for norm in self.norms]
        ins = tuple(affine_of(at(attention, (name,))) for name in products.ins)
        out, fc1, fc2 = (affine_of(at(*where)) for where in self._others(module, attention, products))
        return Layer(norms[0], ins, attend, out, self._scale(module, 0), norms[1], fc1, fc2, self._scale(module, 1))

    @staticmethod
    def _others(module: nn.Module, attention: nn.Module, products: Products) -> tuple[tuple[nn.Module, Path], ...]:
        return (attention, (products.out,)), (module, products.fc1), (module, products.fc2)

    def _scale(self, module: nn.Module, branch: int) -> Tensor | None:
        place = self.scales[branch]
        return None if place is None else parameters_of(at(module, place.path))[place.name]

    def _is_as_it_was(self, module: nn.Module) -> bool:
        """Whether what stands around attention and MLP does nothing but its class's forward, and drops nothing."""
        return is_as_it_was(module, self.types) and not _any_drops(module, self.drops)

    def _has_row_kernels(self, module: nn.Module, x: Tensor) -> bool:
        norm, scale = affine_of(at(module, self.norms[1].path)), self._scale(module, 0)
        if not norm_has_kernels(x, scale, *norm):
            return False
        if getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled():
            return False
        same = all(tensor is None or tensor.dtype == x.dtype for tensor in (scale, *norm))
        return same or torch.is_autocast_enabled(x.device.type)  # what else is cast where, only the layer knows

    def _by_kernels(self, module: nn.Module, given: Mapping[str, Any], x: Tensor) -> Tensor | None:
        """By the path that was measured to be the fastest; None where that is the layer's own forward."""
        products = self.products
        if not isinstance(products, Products) or x.ndim != 3 or not may_have_kernels(x):
            return None
        if torch.is_grad_enabled() and wants_gradient([*module.parameters(), *_tensors(given)]):
            return None
        if not self._is_plain(module, products):
            return None
        layer = self.layer(module, given, x, products)
        path = choose_layers_path(x, [layer], products.form)
        if path == "eager":
            return None
        return next(transformer_layers(x, [layer], products.form, path, more_follow=True))

    def _is_plain(self, module: nn.Module, products: Products) -> bool:
        """Whether no part would do more, if it were called, than its class's forward."""
        parts: Any = children_of(module)
        attention, kind = parts[self.attention], type(parts[self.attention])
        if kind is not products.kind or fires(attention) or _any_drops(module, products.drops):
            return False
        forward = vars(attention).get("forward")
        if forward is not None and getattr(forward, "recognised", None) != products.scored:
            return False
        inside = [part for name, part in parts.items() if name != self.attention]
        return plain_parts([*inside, *children_of(attention).values()], products.classes) is not None


def recognise(module: nn.Module) -> EncoderLayer | None:
    """The layer that `module` is; None if it does not even look like one.

    Raises:
        NotOurs: if it looks like one and is none, saying why.
    """
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        return None
    parts = list(module.named_children())
    wide = [part for _, part in parts if is_wide(part)]
    norms = [name for name, part in parts if not children_of(part) and "norm" in type(part).__name__.lower()]
    if len(wide) != 2 or len(norms) != 2 or not all(map(_has_linears, wide)):
        return None
    if any(vars(part).get("is_causal") is True for part in wide):
        raise NotOurs("its attention is causal")
    inside = [inner for part in wide for inner in part.modules()]
    check_untouched(module, but=inside)
    hooked = any(map(is_hooked, inside))
    names = [name for name, part in parts if part in wide]
    scored = None if hooked else next(filter(None, map(_scored, wide)), None)
    with Probe(module) as probe:
        reading = _Reading(probe, names, norms)
        layer = reading.layer()
        try:
            if hooked:
                raise NotOurs("a hook inside its attention or MLP must fire")
            products: Products | str = reading.products(layer, scored)
        except NotOurs as error:
            products = str(error)
    return EncoderLayer(**{**vars(layer), "products": products})


def _has_linears(part: nn.Module) -> bool:
    """Whether it may be an attention or an MLP: not one linear layer, nor a stack of layers."""
    inside = [type(each) for each in part.modules()][1:]
    return any(issubclass(kind, nn.Linear) for kind in inside) and nn.ModuleList not in inside


def _scored(part: nn.Module) -> attentions.Attention | None:
    try:
        return attentions.recognise(part)
    except NotOurs:
        return None


class _Reading:
    """A layer that is being looked at."""

    def __init__(self, probe: Probe, parts: list[str], norms: list[str]) -> None:
        self.probe, self.copy, self.norms = probe, probe.module, norms
        children: Any = children_of(self.copy)
        self.own: dict[str, Any] = {name: children[name] for name in parts}
        first = next(part for part in self.own[parts[0]].modules() if isinstance(part, nn.Linear))
        self.width: int = first.in_features
        self.x = probe.rows(BATCH, LENGTH, self.width)
        self.outs = {name: probe.rows(BATCH, LENGTH, self.width) for name in parts}
        self.parameters = parameters_of_forward(self.copy)
        self.drops = []
        for path, part in probe.original.named_modules():
            place = tuple(path.split(".")) if path else ()
            self.drops += [Place(place, name) for name in _rates(part)]
        for place in self.drops:
            setattr(at(self.copy, place.path), place.name, 0.0)  # what is dropped is no part of the formula

    def layer(self) -> EncoderLayer:
        """The layer, without its products.

        Raises:
            NotOurs: if it is none, saying why.
        """
        reasons = []
        for in_tuple in (None, *self.own):
            try:
                return self._layer(in_tuple)
            except NotOurs as error:
                reasons.append(error)
        # where attention returned what it does, its code did run
        raise max(reasons, key=lambda reason: not isinstance(reason.__cause__, TypeError | ValueError))

    def _layer(self, in_tuple: str | None) -> EncoderLayer:
        """The layer, if the part of this name returns a tuple in the place of a tensor."""
        names = [p.name for p in self.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.stands = {name: Notes(out, name == in_tuple) for name, out in self.outs.items()}
        children_of(self.copy).update(self.stands)
        try:
            required = [p.name for p in self.parameters[1:] if p.default is p.empty and p.name in names]
            out, calls, free = handed_on(lambda more: self._call(required, more), set(names[1:]))
            attention, mlp = self.order
            shape = BATCH, LENGTH, self.width
            first, second = (read_norm(self.probe, at(self.copy, (n,)), (n,), shape) for n in self.called)
            between = self.given_norms[1]
            scales = (
                self._scale(self.x, self.outs[attention], between, attention),
                self._scale(between, self.outs[mlp], out, mlp),
            )
            around = [Place(p, name) for p, name in self.drops if not p or p[0] not in self.own]
            layer = EncoderLayer(
                self.width,
                tuple(names),
                frozenset((*free, names[0])),
                (first, second),
                attention,
                mlp,
                calls[attention],
                in_tuple is not None,
                scales,
                self._types(first.path[0]),
                tuple(around),
            )
            noted = [self.stands[name].calls[0] for name in self.order]
            ours = layer.compute(self.copy, {}, self.x)
            again = [self.stands[name].calls[-1] for name in self.order]
            apart = [difference([_first(*a)], [_first(*b)]) for a, b in zip(again, noted, strict=True)]
            if max(difference([ours], [out]), *apart) > TOLERANCE or calls[mlp] != Call((), ()):
                raise NotOurs("its forward computes something else: another order, or a further term")
            return layer
        finally:
            children_of(self.copy).update(self.own)

    def _call(self, required: list[str], more: dict[str, Any]) -> tuple[Tensor, dict[str, Call]]:
        for part in self.stands.values():
            part.calls.clear()
        order: list[str] = []
        self.called: list[str] = []
        self.given_norms: list[Tensor] = []

        def note_norm(name: str) -> Callable[..., None]:
            def note(_: nn.Module, given: tuple[Any, ...], __: Any) -> None:
                self.called.append(name)
                self.given_norms += given[:1]

            return note

        parts: Any = children_of(self.copy)
        handles = [parts[name].register_forward_hook(note_norm(name)) for name in self.norms]
        for name, part in self.stands.items():
            handles.append(part.register_forward_hook(lambda *_, name=name: order.append(name)))
        given = {**dict.fromkeys(required), **more}
        try:
            out = self.probe.in_both_modes(lambda: own_forward(self.copy)(self.copy, self.x, **given))
        finally:
            for handle in handles:
                handle.remove()
        if difference(out[:1], out[1:]) > 0 or len(order) != 4 or order[:2] != order[2:] or len(set(order)) != 2:
            raise NotOurs("it does not call attention and MLP once each, or another way in training")
        if len(self.called) != 4 or len(set(self.called[:2])) != 2:
            raise NotOurs("it does not call two norms once each")
        self.order, self.called = order[:2], self.called[:2]
        calls = {}
        for name, part in self.stands.items():
            args, kwargs = part.calls[0]
            if not isinstance(_first(args, kwargs), Tensor):
                raise NotOurs(f"{name}: is not given what the norm before it returns")
            named = dict(list(kwargs.items())[0 if args else 1 :])
            calls[name] = call_of(args[1:], named, more, defaults_of(self.parameters), self.x)
        return out[0], calls

    def _scale(self, x: Tensor, branch: Tensor, total: Tensor, name: str) -> Place | None:
        """What a branch is multiplied by before it is added to x."""
        if difference([x + branch], [total]) < TOLERANCE:
            return None
        for path, part in self.copy.named_modules():
            for own, vector in parameters_of(part).items():
                if vector is None or vector.shape != (self.width,):
                    continue
                if difference([x + vector * branch], [total]) < TOLERANCE:
                    return Place(tuple(path.split(".")) if path else (), own)
        raise NotOurs(f"what {name} makes is not added to x as it is, nor with LayerScale")

    def _types(self, first_norm: str) -> tuple[tuple[Path, type], ...]:
        """Of all parts that are not called."""
        paths = [(tuple(name.split(".")), type(part)) for name, part in self.probe.original.named_modules() if name]
        return tuple((path, kind) for path, kind in paths if path[0] not in (*self.own, first_norm))

    def products(self, layer: EncoderLayer, scored: attentions.Attention | None) -> Products:
        """Where the layer's products are.

        Raises:
            NotOurs: if they cannot run as those of `transformer_layers`.
        """
        given, calls = self._called(layer)
        attention, mlp = self.own[layer.attention], self.own[layer.mlp]
        ins, out = self._projections(attention, calls)
        fc1, fc2 = self._mlp(mlp, calls)
        made, taken = _outs(calls, fc1)[0], _givens(calls, fc2)[0]
        apart = {name: difference([act(made)], [taken]) for name, act in ACTIVATIONS.items()}
        activation = min(apart, key=apart.__getitem__)
        if apart[activation] > ROUNDING:
            raise NotOurs(f"its MLP's activation is none of {', '.join(ACTIVATIONS)}")
        first, second = layer.norms
        if first[1:] != second[1:]:
            raise NotOurs("its norms are of two kinds")
        paths = {part: tuple(name.split(".")) for name, part in self.copy.named_modules() if name}
        original: Any = children_of(self.probe.original)
        found = Products(
            type(original[layer.attention]),
            ins,
            out,
            scored,
            paths[fc1],
            paths[fc2],
            LayerForm(first.kind, first.eps, activation),
            frozenset(type(part) for part in self.probe.original.modules()),
            tuple(place for place in self.drops if place not in layer.drops and place.path != (layer.attention,)),
        )
        own = self.probe.in_both_modes(lambda: own_forward(self.copy)(self.copy, self.x, **given))
        tensors = layer.layer(self.copy, given, self.x, found)
        if difference(self.probe.in_both_modes(lambda: plain_layer(self.x, tensors, found.form)), own) > TOLERANCE:
            raise NotOurs("its attention does something else with its input than to make queries, keys and values")
        return found

    def _called(self, layer: EncoderLayer) -> tuple[dict[str, Any], list[Called]]:
        """Arguments with which it runs, and all calls of its parts."""
        first, *names = layer.names
        required = {p.name: None for p in self.parameters[1:] if p.default is p.empty and p.name in names}
        given: list[dict[str, Any]] = [required]
        head = vars(self.own[layer.attention]).get("head_dim")
        if "position_embeddings" in names and isinstance(head, int):  # cosines and sines of all tokens, or all but one
            for length in (LENGTH - 1, LENGTH):
                rotations = self.probe.rows(length, head), self.probe.rows(length, head)
                given.append({**required, "position_embeddings": rotations})
        for tried in given:
            try:
                return tried, calls_of(self.probe, {first: self.x, **tried})
            except Exception as error:  # whatever its code raises on arguments that it is not meant for
                failure = error
        raise NotOurs(f"its attention needs more than was tried: {type(failure).__name__}: {failure}")

    def _projections(self, attention: nn.Module, calls: list[Called]) -> tuple[tuple[str, ...], str]:
        names = {part: name for name, part in attention.named_children()}
        called = [call for call in calls if type(call.module) is nn.Linear and call.module in names]
        linears = [part for part in attention.modules() if is_wide(part) and not children_of(part)]
        if len(called) < 2 or sorted(map(id, linears)) != sorted(id(call.module) for call in called):
            raise NotOurs("the linear layers of its attention are not its own, or not called once each")
        whole = next(call for call in calls if call.module is attention).given[0]
        *ins, last = called
        shapes = [(call.module.out_features, call.module.in_features) for call in called]
        one = (self.width, self.width)
        if shapes not in ([(3 * self.width, self.width), one], [one] * 4):
            raise NotOurs("its attention has other products than queries, keys and values as wide as x and one behind")
        if any(call.given[0] is not whole for call in ins) or last.given[0] is whole:
            raise NotOurs("its attention does more with its input than to make queries, keys and values")
        return tuple(names[call.module] for call in ins), names[last.module]

    def _mlp(self, mlp: nn.Module, calls: list[Called]) -> tuple[nn.Module, nn.Module]:
        inside = [part for part in mlp.modules() if is_wide(part) and not children_of(part)]
        called = [call.module for call in calls if call.module in inside]
        narrow = [part for part in mlp.modules() if part not in inside and any(True for _ in part.parameters(False))]
        if len(called) != 2 or len(inside) != 2 or not all(type(part) is nn.Linear for part in called) or narrow:
            raise NotOurs("its MLP is not two products with an activation between them")
        return called[0], called[1]


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _outs(calls: list[Called], module: nn.Module) -> list[Any]:
    return [call.out for call in calls if call.module is module]


def _givens(calls: list[Called], module: nn.Module) -> list[Any]:
    return [call.given[0] for call in calls if call.module is module]


def _rates(part: nn.Module) -> list[str]:
    """The attributes that say how much a module drops."""
    named = [name for name, value in vars(part).items() if "drop" in name and isinstance(value, float)]
    return [*named, "p"] if drops(part) else named


def _any_drops(module: nn.Module, places: tuple[Place, ...]) -> bool:
    parts = ((at(module, path), name) for path, name in places)
    return any(part.training and getattr(part, name) > 0 for part, name in parts)


def _is_served(x: Tensor) -> bool:
    """Whether anything but the layer's own forward may run, as far as x says."""
    return not is_plain(x.is_cuda) or may_have_kernels(x)


def _tensors(given: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(dict(given)) if isinstance(leaf, Tensor)]


# --- what lies between the products of attention ---


class _Made:
    """Stands for a linear layer, with its attributes, and gives what was made in its place."""

    def __init__(self, layer: nn.Module, made: Tensor) -> None:
        self._layer, self._made = layer, made

    def __call__(self, x: Tensor) -> Tensor:
        return self._made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _Takes:
    """Stands for the last linear layer, with its attributes, and takes what that would be given."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self.taken: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        self.taken = x
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _between(attention: Any, ins: tuple[str, ...], out: str, qkv: Tensor, run: Callable[[Any], Any]) -> Tensor:
    """What attention's own code makes of queries, keys and values, [B, S, 3W] -> [B, S, W]; `run` calls it."""
    parts = children_of(attention)
    made = {name: _Made(parts[name], part) for name, part in zip(ins, qkv.chunk(len(ins), -1), strict=True)}  # type: ignore[arg-type]
    last = _Takes(parts[out])  # type: ignore[arg-type]
    kind: Any = type(attention)
    stand_in: Any = object.__new__(_class_of(kind, ins, out))
    object.__setattr__(stand_in, "__dict__", attention.__dict__)
    object.__setattr__(stand_in, "_put", {**made, out: last})
    run(functools.partial(own_forward(attention), stand_in))
    return last.taken


@functools.cache
def _class_of(kind: type, ins: tuple[str, ...], out: str) -> type:
    """The class of stand-ins: derived, sharing all attributes, but for the linear layers."""

    def put(name: str) -> property:
        return property(lambda self: self._put[name])

    own = {"__slots__": ("_put",), "__module__": kind.__module__}
    return type(kind)(kind.__name__, (kind,), {**own, **{name: put(name) for name in (*ins, out)}})
