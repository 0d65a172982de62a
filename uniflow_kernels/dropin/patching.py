"""`patch`: modules of other projects run on this package's operations, by replacing `forward` on their instances."""

from __future__ import annotations

import fnmatch
import inspect
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from uniflow_kernels.dropin import attentions, blocks, encoder_layers, heads
from uniflow_kernels.dropin.probe import NotOurs
from uniflow_kernels.modules.flow_head import FlowHead

_lock = threading.RLock()  # one thread at a time puts forwards in place, or takes them away
RECOGNISERS = (heads.recognise, attentions.recognise, blocks.recognise, encoder_layers.recognise)


class Recognised(Protocol):
    """How a recognised module is run. It holds no part of the module, so that it can be copied and pickled with it."""

    is_whole: ClassVar[bool]  # whether nothing inside is looked at any more

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """What `module(*args, **kwargs)` computes."""
        ...

    def prepare(self, module: nn.Module) -> None:
        """What must be done before `forward` can be compiled."""
        ...


class Forward:
    """What stands in place of a patched module's forward.

    It refers to its module weakly, so that a deleted model is freed at once; a copied or unpickled module gets a
    `Forward` of its own.
    """

    __slots__ = ("__weakref__", "_module", "recognised")

    def __init__(self, module: nn.Module, recognised: Recognised) -> None:
        self._module = weakref.ref(module)
        self.recognised = recognised
        recognised.prepare(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module computes."""
        module = self._module()
        if module is None:
            raise ReferenceError("the module that this forward belongs to was deleted")
        return self.recognised.forward(module, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Forward, (self._module(), self.recognised)

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(type(self._module()).forward)  # type: ignore[union-attr]
        return own.replace(parameters=list(own.parameters.values())[1:])


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did.

    `str()` is one line for each kind of thing: first what was patched, then what was left alone.

    Attributes:
        patched: name of a module -> what it is and what it runs on now. The model itself is called "".
        left_alone: name of a module that looks as if it could be served -> why it is not.
    """

    patched: dict[str, str]
    left_alone: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{_listed(names)}: {what}" for what, names in _by_value(self.patched).items()]
        lines += [f"{_listed(names)}: left alone: {why}" for why, names in _by_value(self.left_alone).items()]
        return "\n".join(lines) or "nothing here looks like a module that could be served"


def _by_value(found: Mapping[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, value in found.items():
        names.setdefault(value, []).append(name or "(the model)")
    return names


def _listed(names: list[str]) -> str:
    if len(names) < 3:
        return ", ".join(names)
    return f"{names[0]} ... {names[-1]} ({len(names)} modules)"


def patch(model: nn.Module, only: str | Sequence[str] | None = None, strict: bool = False) -> PatchReport:
    """Find the modules in a model that this package can run faster, and let it.

    Recognised are, by what they compute, the per-token heads of MAR's family, attention that writes its scores, blocks
    of diffusion transformers, and layers of vision transformers. Only `forward` is replaced, on the instances.
    Parameters, submodules, state_dict, hooks, modes, copies and pickles stay as they are. Patch after loading and
    before wrapping, sharding or compiling the model. Patching twice is patching once. Other threads may use or patch
    the model meanwhile.

    Args:
        model: any module, itself perhaps such a head.
        only: names of modules to look at, as in `model.named_modules()`; `*` stands for anything. By default all.
        strict: raise if there is nothing to patch.

    Returns:
        The report; `print(patch(model))` shows it.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if a name in `only` fits no module, or nothing was patched although `strict`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    with _lock:
        report = _patch(_chosen(model, only))
    if strict and not report.patched:
        raise ValueError(f"model: nothing to patch. {report}")
    return report


def _patch(chosen: list[tuple[str, nn.Module]]) -> PatchReport:
    patched: dict[str, str] = {}
    left_alone: dict[str, str] = {}
    inside: list[str] = []
    for name, module in chosen:
        if any(name.startswith(outer) for outer in inside):
            continue  # a part of a head
        if not is_patched(module):
            try:
                recognised = _recognised(module)
            except NotOurs as reason:
                left_alone[name] = str(reason)
                continue
            if recognised is None:
                continue
            module.forward = Forward(module, recognised)
        recognised = vars(module)["forward"].recognised
        patched[name] = str(recognised)
        if recognised.is_whole:
            inside.append(f"{name}." if name else "")
    return PatchReport(patched, left_alone)


def unpatch(model: nn.Module) -> None:
    """Give every patched module in `model` its own forward back."""
    _unpatch(model, ())


def _unpatch(model: nn.Module, but: Collection[nn.Module]) -> None:
    with _lock:
        for module in model.modules():
            if module not in but and is_patched(module):
                del module.forward


@contextmanager
def patched(model: nn.Module, only: str | Sequence[str] | None = None, strict: bool = False) -> Iterator[PatchReport]:
    """`patch` inside the block; afterwards what it patched is as before. What was patched before stays so."""
    with _lock:
        before = {module for module in model.modules() if is_patched(module)}
        report = patch(model, only, strict)
    try:
        yield report
    finally:
        _unpatch(model, before)


def _chosen(model: nn.Module, only: str | Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    modules = list(model.named_modules())
    if only is None:
        return modules
    patterns = [only] if isinstance(only, str) else list(only)
    for pattern in patterns:
        if not fnmatch.filter([name for name, _ in modules], pattern):
            raise ValueError(f"only: no module of the model is called {pattern!r}")
    return [(name, m) for name, m in modules if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def is_patched(module: nn.Module) -> bool:
    """Whether its forward is one of ours."""
    return isinstance(vars(module).get("forward"), Forward)


def recognised_as(module: nn.Module) -> Recognised | None:
    """What it was patched as; None if it was not."""
    return vars(module)["forward"].recognised if is_patched(module) else None


def _recognised(module: nn.Module) -> Recognised | None:
    if isinstance(module, FlowHead):
        raise NotOurs("it is this package's own already")
    return next((found for found in (recognise(module) for recognise in RECOGNISERS) if found is not None), None)
