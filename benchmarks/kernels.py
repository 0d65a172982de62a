"""docs/kernels.md: what `make emulate` counted of the compiled kernels. No time stands there: nothing was timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

INTRODUCTION = """# The kernels, counted

Written by `python -m benchmarks report` from what `make emulate` counts: the kernels of `triton_kernels` and of `csrc`
as they are compiled, executed by [tests/ptx](../tests/ptx/README.md) on a CPU, in bfloat16, forward and backward. No
GPU ran them, and nothing here is a time.

- registers: of a thread, by ptxas; shared: of a block. A kernel's launches are counted together.
- loads, stores: sectors of 32 bytes of global memory that the accesses of a warp ask L1 for, over what as many bytes
  need without gaps. "Once a block": each sector counted once for a block, over the different bytes that the block
  wants: what L1 asks of L2 if it keeps what a block has read.
- wavefronts: passes over the banks of shared memory, over the least.
- MB touched: each sector once for a launch, which memory must move.
- bound: the largest of what is touched, tensor FLOPs, float32 operations, special functions and wavefronts, each over
  its rate. No launch can be shorter whose data come from memory (so little may lie in L2 already); most are longer.

What stands above 1.2 once a block costs memory, what does only as loads, stores or wavefronts costs passes in L1:

- Triton's interpolate_kernel and velocity_loss_kernel, loads: a counter of the noise gives four columns, which are a
  thread's; so four instructions take every fourth of 128 pixels each, from the same sectors. Loaded in another shape,
  with neighbours in neighbouring threads, they were 1.35 and 1.43, for 13 and 9 % more instructions; and these kernels
  have so many that issuing them takes longer than the passes. So it stays.
- Triton's patches_kernel and to_images_kernel: neighbouring threads have neighbouring pixels, but a row of a patch is
  14 of them, 28 or 56 bytes that begin and end inside sectors. Before they were loaded so, in a shape of their own and
  one a thread, loads were 7.7 and 7.5.
- moments_kernel, stores: four floats a program, half of a sector, of which a row has one or two.
- seeded_noise_kernel, once a block: all that a block reads is a seed of 8 bytes.
- CUDA's interpolate_kernel, velocity_loss_kernel and patches_kernel, wavefronts: pixels come 16 bytes a thread and go
  into rows of shared memory one by one, since rows of 14 begin anywhere: four threads meet in a bank. The passes are a
  fifth of the cycles in which the instructions can be issued.
"""
COLUMNS = ["kernel", "registers", "shared, KB", "warp instructions", "loads", "once a block", "stores", "once a block"]
COLUMNS += ["wavefronts", "tensor MFLOP", "MB touched", "bound, us"]


def page(folder: Path) -> str | None:
    """The page of all counts in a folder; None if there are none."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("emulated-*.json"))]
    return "\n".join([INTRODUCTION, *(_section(file) for file in files)]) if files else None


def _section(file: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {value}" for name, value in file["sizes"].items())
    lines = [f"## sm_{file['emulated']}", "", f"{sizes}; {file['findings']} findings. Rates of {file['rates']}.", ""]
    for part, kernels in file["parts"].items():
        rows = [COLUMNS, ["---"] * len(COLUMNS), *(_row(kernel) for kernel in kernels)]
        lines += [f"### {part}", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    return "\n".join(lines)


def _row(kernel: dict[str, Any]) -> list[str]:
    access, once = kernel["access"], kernel["of_a_block"]
    both = [(kind, a) for kind, a in access.items() if kind.startswith("global")]
    stores = [a for kind, a in both if "store" in kind]
    loads = [a for kind, a in both if "store" not in kind]
    return [
        kernel["kernel"],
        str(kernel["registers"]),
        f"{kernel['shared_bytes'] / 1024:.3g}",
        str(sum(kernel["instructions"].values())),
        _ratio(loads),
        _ratio([once["load"]] if "load" in once else []),
        _ratio(stores),
        _ratio([once["store"]] if "store" in once else []),
        _ratio([a for kind, a in access.items() if kind.startswith("shared")]),
        f"{kernel['tensor_flops'] / 1e6:.4g}",
        f"{kernel['bytes_touched'] / 1e6:.3g}",
        f"{kernel['bound_us']:.3g} ({kernel['bound_by']})",
    ]


def _ratio(some: list[dict[str, int]]) -> str:
    least = sum(a["least"] for a in some)
    return f"{sum(a['passes'] for a in some) / least:.2f}" if least else ""
