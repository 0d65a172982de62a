"""Which path of an op was the fastest where it was measured: measured.json, made by `python -m benchmarks choices`."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

FILE = "measured.json"


class Measured(NamedTuple):
    """An op's paths at a number of rows, the fastest first; empty where they were not measured."""

    rows: int
    inference: tuple[str, ...]
    training: tuple[str, ...]
    gpu: str

    def paths(self, training: bool) -> tuple[str, ...]:
        """Of a forward pass that keeps nothing, or of one with its backward pass."""
        return self.training if training else self.inference


@lru_cache
def measured(op: str, arch: int, dtype: str, width: int) -> tuple[Measured, ...]:
    """All that was measured of an op, by rising number of rows.

    Args:
        op: its name.
        arch: compute capability times ten.
        dtype: of the products, such as "bfloat16".
        width: of a row.
    """
    entries = [entry for entry in _table().get(op, []) if _key(entry) == (arch, dtype, width)]
    found = [Measured(e["rows"], tuple(e["inference"]), tuple(e["training"]), e["gpu"]) for e in entries]
    return tuple(sorted(found))


def fastest_first(op: str, arch: int, dtype: str, width: int, rows: int, training: bool) -> tuple[str, ...]:
    """The paths in their order at the largest number of rows measured that is not above `rows`; empty if none is."""
    known = [entry for entry in measured(op, arch, dtype, width) if entry.rows <= rows]
    return known[-1].paths(training) if known else ()


def _key(entry: dict[str, Any]) -> tuple[int, str, int]:
    return entry["arch"], entry["dtype"], entry["width"]


@lru_cache
def _table() -> dict[str, list[dict[str, Any]]]:
    return json.loads(files("uniflow_kernels").joinpath(FILE).read_text(encoding="utf-8"))
