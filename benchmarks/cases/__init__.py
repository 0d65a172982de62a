"""The questions, one file each; in the order they are run: what matters most first, since a GPU's minutes may end."""

from __future__ import annotations

import difflib

from benchmarks.case import Case
from benchmarks.cases import (
    attention,
    decode,
    distillation,
    drawing,
    dropin,
    few_tokens,
    flow_head,
    flow_matching,
    flow_tangents,
    images,
    layers,
    modulated_norm,
    noise,
    patches,
    tokenizer,
    velocity,
)

_FILES = (
    flow_head,
    flow_matching,
    velocity,
    distillation,
    patches,
    noise,
    images,
    attention,
    layers,
    modulated_norm,
    flow_tangents,
    few_tokens,
    drawing,
    dropin,
    decode,
    tokenizer,
)
_FIRST = ("flow_head_paths", "layer_paths", "flow_head", "encode", "train_step")
_ALL = {case.name: case for file in _FILES for case in file.CASES}
CASES: dict[str, Case] = {name: _ALL[name] for name in dict.fromkeys((*_FIRST, *_ALL))}


class UnknownCaseError(ValueError):
    """A name that is no case."""


def select(names: str) -> list[Case]:
    """The cases of a comma-separated list of names; all for an empty one.

    Raises:
        UnknownCaseError: for a name that is none, with those there are.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in CASES:
            close = difflib.get_close_matches(name, CASES, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UnknownCaseError(f"no case is called {name!r}; {hint}there are {', '.join(CASES)}")
    return [CASES[name] for name in wanted] if wanted else list(CASES.values())
