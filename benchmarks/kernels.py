"""docs/kernels.md: what `make emulate` counted of the compiled kernels. No time stands there: nothing was timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

INTRODUCTION = """# The kernels, counted

Written by `python -m benchmarks report` from what `make emulate` counts: the Triton kernels as they are compiled,
executed by [tests/ptx](../tests/ptx/README.md) on a CPU, in bfloat16, forward and backward. No GPU ran them, and
nothing here is a time. Sectors are of 32 bytes, as the L1 cache sees them, over what as many bytes need without gaps;
wavefronts are passes over the banks of shared memory, over the least. "Bound" is the larger of the bytes touched once
over the measured copy rate of an H100 (3.0 TB/s) and the tensor FLOPs over its rate on a large product (790 TFLOP/s):
no launch of these sizes can be shorter, and most will be longer.

Sectors above 1.2 are in kernels that turn pixels into rows of patches or back: one access of a warp covers several
short runs (14 pixels of 1 to 4 bytes, a row of a patch), and the rest of their sectors is wanted by the accesses
after it, which find it in L1 if it stays there; memory moves what is touched once. moments_kernel stores four floats
a program, half of a sector, of which a row has one or two.
"""
COLUMNS = ["kernel", "registers", "shared, KB", "warp instructions", "load sectors", "store sectors", "wavefronts"]
COLUMNS += ["tensor MFLOP", "MB touched", "bound, us"]


def page(folder: Path) -> str | None:
    """The page of all counts in a folder; None if there are none."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("emulated-*.json"))]
    return "\n".join([INTRODUCTION, *(_section(file) for file in files)]) if files else None


def _section(file: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {value}" for name, value in file["sizes"].items())
    lines = [f"## sm_{file['emulated']}", "", f"{sizes}; {file['findings']} findings.", ""]
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(_row(kernel) for kernel in file["kernels"])]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def _row(kernel: dict[str, Any]) -> list[str]:
    bound = f"{kernel['bound_us']:.3g} ({kernel['bound_by']})" if "bound_us" in kernel else ""
    return [
        kernel["kernel"],
        str(kernel["registers"]),
        f"{kernel['shared_bytes'] / 1024:.3g}",
        str(sum(kernel["instructions"].values())),
        *(_ratio(kernel, *kinds) for kinds in (("global", "load"), ("global", "store"), ("shared", ""))),
        f"{kernel['tensor_flops'] / 1e6:.4g}",
        f"{kernel['bytes_touched'] / 1e6:.3g}",
        bound,
    ]


def _ratio(kernel: dict[str, Any], space: str, way: str) -> str:
    some = [a for kind, a in kernel["access"].items() if kind.startswith(space) and way in kind]
    least = sum(a["least"] for a in some)
    return f"{sum(a['passes'] for a in some) / least:.2f}" if least else ""
