"""The table by which ops choose their path, uniflow_kernels/measured.json, made from what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import ROOT, Entry, ResultsError
from uniflow.atomic import replacing
from uniflow_kernels.ops.attention import BACKENDS, OWN, PACKAGES
from uniflow_kernels.ops.flow_choice import FILE

TABLE = ROOT / "uniflow_kernels" / FILE


class Paths(NamedTuple):
    """The case that measures an op's paths, and which path each of its forms takes."""

    case: str
    of_forms: dict[str, str]


_KERNELS = {"ours": "rows", "products": "products", "small products": "small products"}
OPS = {
    "flow_head": Paths("flow_head_paths", {**_KERNELS, "plain": "eager"}),
    "transformer_layers": Paths("layer_paths", {**_KERNELS, "own": "eager"}),
    "transformer_mlp": Paths("mlp_paths", {"ours": "products", "small products": "small products", "plain": "eager"}),
    "attention": Paths("attention_paths", {"ours": OWN, **{path: path for path in (*BACKENDS, *PACKAGES)}}),
}

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
    tables: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {op: {} for op in OPS}
    for results in sorted(files, key=lambda results: results["date"]):
        for op, row in ((op, row) for op, paths in OPS.items() for row in _rows(results, paths)):
            tables[op][row["gpu"], row["dtype"], row["width"], row["rows"]] = row
    length = sum(map(len, tables.values()))
    if not length:
        cases = ",".join(paths.case for paths in OPS.values())
        raise ResultsError(f"no GPU's paths were measured; `python -m benchmarks run --cases {cases}` does it on one")
    text = ",\n".join(_written(op, [table[key] for key in sorted(table)]) for op, table in tables.items())
    with replacing(path) as temporary:
        temporary.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    return length


def _written(op: str, rows: list[dict[str, Any]]) -> str:
    """One size a line."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return f' "{op}": [\n{lines}\n ]' if rows else f' "{op}": []'


def _rows(results: Mapping[str, Any], paths: Paths) -> Iterator[dict[str, Any]]:
    arch = re.search(r"\(sm_(\d+)", results["environment"].get("GPU", ""))
    for entry in results["entries"]:
        if arch and entry["case"] == paths.case and entry["status"] == "measured":
            size = entry["size"]
            yield {
                **{"arch": int(arch[1]), "dtype": size["dtype"], "width": size["width"], "rows": size["tokens"]},
                **{order: _fastest_first(entry, paths, *by) for order, by in ORDERS.items()},
                **{"gpu": results["machine"], "date": results["date"], "commit": results["commit"]},
            }


def _fastest_first(entry: Entry, paths: Paths, name: str, clock: str) -> list[str]:
    times = {
        path: entry["forms"][form][name][clock]["median"]
        for form, path in paths.of_forms.items()
        if name in entry["forms"].get(form, {})
    }
    return sorted(times, key=lambda path: times[path])
