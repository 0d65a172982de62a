"""What a profiler would count of every Triton kernel, written to benchmarks/results: python -m tests.ptx.count [80 90].

Of small sizes that fill tiles, bfloat16, forward and backward. `python -m benchmarks report` makes docs/kernels.md of
them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .counters import Counters
from .launch import _LAUNCHERS, emulated
from .machine import Options
from .session import prepare_triton, pretend

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"
# measured rates of an H100: bytes a second of a copy, FLOPs a second of a large product in bfloat16
RATES = {90: {"copy": 3.0e12, "product": 790e12}}
SIZES = {"rows": 256, "width": 512, "images": 2, "side": 224, "patch": 14, "layers": 2}


def work() -> None:
    """Launch every kernel."""
    from tests.uniflow_kernels.test_flow_blocks import OPTIONS, inputs, keywords, make_head, run, tensors_of
    from uniflow_kernels import (
        backend,
        interpolate,
        layerwise_distillation,
        patchify,
        seeded_noise,
        to_images,
        velocity_loss,
    )
    from uniflow_kernels.ops.flow_head import fused_flow_blocks

    half, rows, width = torch.bfloat16, SIZES["rows"], SIZES["width"]
    with backend("triton"):
        for path in ("products", "rows"):
            head = make_head(width, 1, **{**OPTIONS["hidden"], "hidden": width}).to(half)
            weights, every = tensors_of(head)
            x, y = (t.detach().to(half).requires_grad_() for t in inputs((rows,), (rows,), width, half))
            run(fused_flow_blocks, x, y, weights, every, **keywords(head), path=path)
        side, patch = SIZES["side"], SIZES["patch"]
        images = torch.randn(SIZES["images"], 3, side, side)
        tokens = (side // patch) ** 2
        velocity = torch.randn(SIZES["images"], tokens, 3 * patch**2).to(half).requires_grad_()
        interpolate(images, torch.rand(SIZES["images"]), patch, seed=1, dtype=half)
        (0.3 * velocity_loss(velocity, images, patch, seed=1)).backward()
        student, teacher = torch.randn(2, SIZES["layers"], SIZES["images"], 128, width).to(half)
        layerwise_distillation(list(student.requires_grad_()), list(teacher))[0].backward()
        patchify(images.to(half), patch)
        seeded_noise(256, 3 * patch**2, 3)
        with torch.no_grad():
            to_images(velocity, patch, (side, side), velocity=velocity, dt=0.1, dtype=torch.uint8)


def assembled(arch: int) -> dict[str, tuple[int, int]]:
    """Registers a thread and bytes of shared memory of each kernel that was launched, by ptxas: the largest."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = get_ptxas(arch).path
    found: dict[str, tuple[int, int]] = {}
    for launcher in list(_LAUNCHERS.values()):
        if launcher.metadata.target.arch != arch:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(launcher.ptx)
            command = [
                ptxas,
                "-v",
                f"--gpu-name=sm_{arch}{'a' if arch == 90 else ''}",
                source,
                "-o",
                source.with_suffix(".o"),
            ]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            said = done.stdout + done.stderr
        registers = re.search(r"Used (\d+) registers", said)
        assert registers is not None, said
        name = launcher.program.kernel.name
        old = found.get(name, (0, 0))
        found[name] = max(old[0], int(registers[1])), max(old[1], launcher.metadata.shared)
    return found


def entry(seen: Counters, resources: tuple[int, int], arch: int) -> dict[str, Any]:
    """One kernel, all its launches together."""
    moved = sum(read + written for read, written, _ in seen.footprint.values())
    result: dict[str, Any] = {
        "kernel": seen.kernel, "blocks": seen.blocks, "warps": seen.warps, "registers": resources[0],
        "shared_bytes": resources[1], "instructions": dict(seen.instructions), "tensor_flops": seen.tensor_flops,
        "bytes_touched": moved,
        "access": {
            kind: {"requests": a.requests, "bytes": a.bytes, "passes": a.sectors, "least": a.least}
            for kind, a in sorted(seen.access.items())
        },
    }  # fmt: skip
    if rates := RATES.get(arch):
        bounds = {"memory": moved / rates["copy"], "tensor cores": seen.tensor_flops / rates["product"]}
        result["bound_by"] = max(bounds, key=lambda name: bounds[name])
        result["bound_us"] = 1e6 * max(bounds.values())
    return result


def main(archs: list[int]) -> None:
    """Write a file for each architecture."""
    prepare_triton()
    for arch in archs:
        pretend(arch)
        torch.manual_seed(0)
        with emulated(arch, Options()) as emulation:
            work()
        resources = assembled(arch)
        entries = [entry(seen, resources[name], arch) for name, seen in sorted(emulation.counters.items())]
        file = {"emulated": arch, "sizes": SIZES, "findings": len(emulation.findings), "kernels": entries}
        path = FOLDER / f"emulated-sm{arch}.json"
        path.write_text(json.dumps(file, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path.name}: {emulation.launches} launches in {emulation.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]] or [80, 90])
