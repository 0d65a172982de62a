"""How a head's own forward can be called, and what it then calls: its blocks one after the other, and a last layer.

Nothing is known of the forward beforehand. Arguments are tried until one call runs; names of arguments and submodules
say what is tried first.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from uniflow_kernels.dropin.probe import ROWS, NotOurs, Probe, own_forward
from uniflow_kernels.torch_private import children_of

# what projects call the same thing
INPUTS = ("input_proj", "noisy_images_proj")
CONDITIONS = ("cond_embed", "cond_proj")
ARGUMENTS = {
    **dict.fromkeys(("x", "noisy_images", "latents"), "x"),
    **dict.fromkeys(("t", "s", "timesteps", "timestep"), "t"),
    **dict.fromkeys(("c", "condition", "cond", "z"), "c"),
}
TIMES: tuple[Callable[[Probe], Any], ...] = (
    lambda probe: probe.times(ROWS),
    lambda probe: probe.times(ROWS, 1),
    lambda probe: [probe.times(ROWS, 1), probe.times(ROWS, 1)],
    lambda probe: [probe.times(ROWS), probe.times(ROWS)],
)
OTHERS = (None, 0, "", True)  # what an argument may be that is neither x nor time nor condition
MOST_CALLS, MOST_CHAINS = 200, 4  # that are tried, and of these that run


class Lists(NamedTuple):
    """Names of a list that may be a head's blocks, and of layers that may make the modulation of several of them."""

    blocks: str
    groups: str | None


class Called(NamedTuple):
    """One call of a submodule."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def given(self) -> list[Any]:
        """All that it was given."""
        return [*self.args, *self.kwargs.values()]

    def again(self, *given: Any) -> Any:
        """What it returns if it is given this, in this order."""
        named = dict(zip(self.kwargs, given[len(self.args) :], strict=True))
        return self.module(*given[: len(self.args)], **named)


class Chain(NamedTuple):
    """One call of a head.

    Attributes:
        given: name -> value of its arguments.
        roles: name -> "x", "t", "c" or "other".
        calls: of all submodules, inner ones first.
        blocks: the calls of its blocks.
        last: the call of its last layer.
        condition: what all of them are given.
    """

    given: dict[str, Any]
    roles: dict[str, str]
    calls: list[Called]
    blocks: list[Called]
    last: Called
    condition: Tensor


def call(probe: Probe, lists: list[Lists]) -> tuple[Lists, Chain]:
    """A call of the probed module in which it hands x through one of its lists.

    Args:
        probe: of the module.
        lists: those that may be its blocks.

    Raises:
        NotOurs: if no call was found, or none that does so.
    """
    reasons: list[NotOurs] = []
    failure: Exception | None = None
    for roles, given in itertools.islice(_arguments(probe, lists), MOST_CALLS):
        try:
            calls = calls_of(probe, given)
        except NotOurs as error:
            reasons.append(error)
            continue
        except Exception as error:  # whatever its code raises on arguments that it is not meant for
            failure = failure or error
            continue
        for names in lists:
            try:
                return names, _chain(probe.module, names, roles, given, calls)
            except NotOurs as error:
                reasons.append(error)
        if len(reasons) >= MOST_CHAINS * len(lists):
            break
    if reasons:
        raise reasons[0]
    arguments = ", ".join(_parameters(probe.module))
    why = f" ({type(failure).__name__}: {failure})" if failure else ""
    raise NotOurs(f"no way was found to call its forward({arguments}){why}")


def linears(part: nn.Module) -> list[nn.Linear]:
    """The linear layers in it."""
    return [layer for layer in part.modules() if isinstance(layer, nn.Linear)]


def parts_in(module: nn.Module, name: str) -> list[nn.Module]:
    """The submodules of the list that is called so."""
    found: Any = children_of(module)[name]
    return list(found)


def own(probe: Probe, given: dict[str, Any]) -> Any:
    """What the probed module's own forward returns."""
    return own_forward(probe.module)(probe.module, **given)


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(own_forward(module)).parameters.items())[1:])


def calls_of(probe: Probe, given: dict[str, Any]) -> list[Called]:
    """All calls of submodules of the probed module in eval mode, inner ones first."""
    calls: list[Called] = []
    handles = [
        part.register_forward_hook(lambda *called: calls.append(Called(*called)), with_kwargs=True)
        for part in probe.module.modules()
    ]
    try:
        probe.in_mode(False, lambda: own(probe, given))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _chain(module: nn.Module, lists: Lists, roles: dict[str, str], given: dict[str, Any], calls: list[Called]) -> Chain:
    blocks = parts_in(module, lists.blocks)
    groups = [] if lists.groups is None else parts_in(module, lists.groups)
    called = [call for call in calls if call.module in blocks]
    if [call.module for call in called] != blocks:
        raise NotOurs("its forward does not call its blocks once each, in order")
    if not all(after.given and after.given[0] is before.out for before, after in itertools.pairwise(called)):
        raise NotOurs("its forward does something more between its blocks")
    parts = list(module.children())
    lasts = [call for call in calls if call.module in parts and call.given and call.given[0] is called[-1].out]
    if len(lasts) != 1:
        raise NotOurs("its forward does not give what its blocks return to a last layer")
    takers = [call.given for call in calls if call.module in groups] if groups else [call.given[1:] for call in called]
    if not takers or not all(given and isinstance(given[0], Tensor) for given in takers):
        raise NotOurs("its blocks take no condition")
    condition = takers[0][0]
    if any(other is not condition for other in (*(given[0] for given in takers), *lasts[0].given[1:])):
        raise NotOurs("its blocks and its last layer take several conditions")
    return Chain(given, roles, calls, called, lasts[0], condition)


def _arguments(probe: Probe, lists: list[Lists]) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Ways to give the forward what it requires, the likeliest first: the roles of its arguments, and their values."""
    sizes = [layer.in_features for names in lists for layer in linears(parts_in(probe.module, names.blocks)[0])]
    width = max(sizes, key=sizes.count)
    direct = [part for part in probe.module.children() if isinstance(part, nn.Linear)]
    several = sorted({part.out_features // width for part in direct} - {0, 1})  # pixel DeCo: rows of x for each of c
    inputs, conditions = (_widths(probe.module, hints) for hints in (INPUTS, CONDITIONS))
    rows = [(ROWS, size) for size in inputs] + [(ROWS, more, size) for more in several for size in inputs]
    parameters = _parameters(probe.module).values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for roles in _roles([p.name for p in parameters if p.default is p.empty and p.kind in kinds]):
        times = TIMES if "t" in roles.values() else TIMES[:1]
        others = OTHERS if "other" in roles.values() else OTHERS[:1]
        for time, other, x, c in itertools.product(times, others, rows, conditions):
            make = {
                "x": lambda x=x: probe.rows(*x),
                "c": lambda c=c: probe.rows(ROWS, c),
                "t": lambda time=time: time(probe),
                "other": lambda other=other: other,
            }
            yield roles, {name: make[role]() for name, role in roles.items()}


def _widths(module: nn.Module, hints: tuple[str, ...]) -> list[int]:
    """How wide what its own layers take is; first that of a layer with a hinted name."""
    parts = sorted(module.named_children(), key=lambda named: named[0] not in hints)
    firsts = [linears(part)[:1] for _, part in parts if not isinstance(part, nn.ModuleList)]
    return list(dict.fromkeys(layer.in_features for first in firsts for layer in first))


def _roles(names: list[str]) -> Iterator[dict[str, str]]:
    """What each argument may be; first what the names say, as far as they do."""
    said = {name: ARGUMENTS[name] for name in names if name in ARGUMENTS}
    for known in (said, {}) if said else ({},):
        rest = [name for name in names if name not in known]
        wanted = [role for role in ("x", "c") if role not in known.values()]
        for picked in itertools.permutations(rest, len(wanted)):
            left = [name for name in rest if name not in picked]
            for kinds in itertools.product(("t", "other") if wanted else ("other",), repeat=len(left)):
                found = {**known, **dict(zip(picked, wanted, strict=True)), **dict(zip(left, kinds, strict=True))}
                yield {name: found[name] for name in names}
