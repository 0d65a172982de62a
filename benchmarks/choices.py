"""The table by which ops choose their path, uniflow_kernels/measured.json, made from what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, Entry, ResultsError
from uniflow.atomic import replacing
from uniflow_kernels.ops.flow_choice import FILE

TABLE = ROOT / "uniflow_kernels" / FILE
CASE = "flow_head_paths"
PATHS = {
    "ours": "rows",
    "products": "products",
    "small products": "small products",
    "plain": "eager",
}  # the case's forms: the op's paths

# launches cost what calls of few rows take, which is the wall clock's to tell; a CUDA graph has none to wait for
ORDERS = {
    "inference": ("forward", "wall_ms"),
    "training": ("both", "wall_ms"),
    "graph_inference": ("forward", "gpu_ms"),
    "graph_training": ("both", "gpu_ms"),
}


def write(files: list[dict[str, Any]], path: Path) -> int:
    """Write the table of all that `files` measured, the later of two that measured the same; returns its length.

    Raises:
        ResultsError: if none of them measured paths on a GPU.
    """
    table: dict[tuple[Any, ...], dict[str, Any]] = {}
    for results in sorted(files, key=lambda results: results["date"]):
        for row in _rows(results):
            table[row["gpu"], row["dtype"], row["width"], row["rows"]] = row
    if not table:
        raise ResultsError(f"no GPU's paths were measured; `python -m benchmarks run --cases {CASE}` does it on one")
    lines = ",\n".join(f"  {json.dumps(table[key])}" for key in sorted(table))
    with replacing(path) as temporary:
        temporary.write_text(f'{{\n "flow_head": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    return len(table)


def _rows(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    arch = re.search(r"\(sm_(\d+)", results["environment"].get("GPU", ""))
    for entry in results["entries"]:
        if arch and entry["case"] == CASE and entry["status"] == "measured":
            size = entry["size"]
            yield {
                **{"arch": int(arch[1]), "dtype": size["dtype"], "width": size["width"], "rows": size["tokens"]},
                **{order: _fastest_first(entry, *by) for order, by in ORDERS.items()},
                **{"gpu": results["machine"], "date": results["date"], "commit": results["commit"]},
            }


def _fastest_first(entry: Entry, name: str, clock: str) -> list[str]:
    times = {
        path: entry["forms"][form][name][clock]["median"]
        for form, path in PATHS.items()
        if name in entry["forms"].get(form, {})
    }
    return sorted(times, key=lambda path: times[path])
