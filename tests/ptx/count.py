"""What a profiler would count of every kernel, written to benchmarks/results: python -m tests.ptx.count [80 90].

Of small sizes that fill tiles, bfloat16, forward and backward. `python -m benchmarks report` makes docs/kernels.md of
them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from .counters import Counters, short
from .cuda import built, emulated_cuda, nvcc
from .launch import _LAUNCHERS, Emulation, emulated
from .session import cuda_for_triton, prepare_triton, pretend

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results"
SIZES = {"rows": 256, "width": 512, "images": 2, "side": 224, "patch": 14, "layers": 2}
# bytes a second, FLOPs a second in bfloat16 and in float32, special functions and passes over the banks of shared
# memory a second. Of an H100 the first two are measured: a copy, a large product
RATES = {
    80: {"memory": 2.039e12, "tensor cores": 312e12, "float32": 19.5e12},
    90: {"memory": 3.0e12, "tensor cores": 790e12, "float32": 66.9e12},
}
CLOCKS = {80: 108 * 1.41e9, 90: 132 * 1.98e9}  # multiprocessors times their highest clock
SPECIAL = 16  # special functions a multiprocessor and clock (CUDA programming guide, 8.0 and 9.0)
SOURCES = {
    80: "an A100 as NVIDIA publishes it (data sheet of the 80 GB SXM: 2039 GB/s, 312 TFLOP/s, 19.5 TFLOP/s in float32;"
    " 108 multiprocessors at 1.41 GHz)",
    90: "an H100 SXM: measured are 3.0 TB/s of a copy and 790 TFLOP/s of a large product; as NVIDIA publishes it"
    " 66.9 TFLOP/s in float32, 132 multiprocessors at 1.98 GHz",
}


OF_LATER_GPUS = {"quantize_kernel"}  # sm_80 has no 8-bit floats


def kernels_of(csrc: bool, arch: int) -> set[str]:
    """The names of all kernels of a part that an architecture runs."""
    folder, form = (ROOT / "csrc", "*.cu") if csrc else (ROOT / "uniflow_kernels" / "triton_kernels", "*.py")
    definition = r"__global__[^;{]*?(\w+_kernel)\(" if csrc else r"(?m)^def (\w+_kernel)\("
    found = {name for path in folder.glob(form) for name in re.findall(definition, path.read_text(encoding="utf-8"))}
    return found if arch > 80 else found - OF_LATER_GPUS


def flow() -> None:
    """Launch every kernel of the flow head."""
    from tests.uniflow_kernels.test_flow_blocks import OPTIONS, inputs, keywords, make_head, run, tensors_of
    from uniflow_kernels import backend
    from uniflow_kernels.ops.flow_head import fused_flow_blocks

    half, rows, width = torch.bfloat16, SIZES["rows"], SIZES["width"]
    with backend("triton"):
        for path in ("products", "rows"):
            head = make_head(width, 1, **{**OPTIONS["hidden"], "hidden": width}).to(half)
            weights, every = tensors_of(head)
            x, y = (t.detach().to(half).requires_grad_() for t in inputs((rows,), (rows,), width, half))
            run(fused_flow_blocks, x, y, weights, every, **keywords(head), path=path)
        x, y, dx, dt = (torch.randn(rows, size).to(half) for size in (24, 40, 24, 1))
        sum(part.sum() for part in head.jvp(x, dt[:, 0].float(), y, dx, 1.0)).backward()


def layers() -> None:
    """Launch the products of transformer layers."""
    from tests.uniflow_kernels.test_transformer_layers import make, run, tokens
    from tests.uniflow_kernels.test_transformer_mlp import make as of_mlp
    from tests.uniflow_kernels.test_transformer_mlp import results
    from uniflow_kernels import backend
    from uniflow_kernels.ops.transformer_layers import LayerForm
    from uniflow_kernels.ops.transformer_mlp import transformer_mlp

    rows, width, half = SIZES["rows"], SIZES["width"], torch.bfloat16
    with backend("triton"):
        run(tokens((2, rows // 2, width), half), make(width, 4 * width, half, layers=1), LayerForm(), "products")
        results(transformer_mlp, *of_mlp(half, shape=(rows, width), hidden=4 * width), "gelu", "products")


def distillation() -> None:
    """Launch what ends a layer beside a teacher's."""
    from uniflow_kernels import backend, compared_residual_norm

    rows, width, half = SIZES["rows"], SIZES["width"], torch.bfloat16
    x, q, teacher = (torch.randn(2, rows // 2, width).to(half) for _ in range(3))
    gate, weight, bias = (torch.randn(width).to(half).requires_grad_() for _ in range(3))
    with backend("triton"):
        *made, distance = compared_residual_norm(
            x.requires_grad_(), q.requires_grad_(), gate, teacher=teacher, skip_tokens=1, weight=weight, bias=bias
        )
        (sum(each.float().square().sum() for each in made) + distance).backward()


def in_fp8() -> None:
    """Launch what quantizes rows, where the architecture has it."""
    from uniflow_kernels import backend
    from uniflow_kernels.ops.fp8_linear import quantized

    with backend("triton"):
        quantized(torch.randn(SIZES["rows"], SIZES["width"]).bfloat16())


def losses(csrc: bool) -> None:
    """Launch every other kernel, or those of the CUDA part."""
    from uniflow_kernels import (
        backend,
        interpolate,
        layerwise_distillation,
        patchify,
        seeded_noise,
        to_images,
        unpatchify,
        velocity_loss,
    )

    half, side, patch = torch.bfloat16, SIZES["side"], SIZES["patch"]
    images = torch.randn(SIZES["images"], 3, side, side)
    tokens = (side // patch) ** 2
    velocity = torch.randn(SIZES["images"], tokens, 3 * patch**2).to(half).requires_grad_()
    with backend("triton"):
        interpolate(images, torch.rand(SIZES["images"]), patch, seed=1, dtype=half)
        (0.3 * velocity_loss(velocity, images, patch, seed=1)).backward()
        student, teacher = torch.randn(2, SIZES["layers"], SIZES["images"], 128, SIZES["width"]).to(half)
        (0.3 * layerwise_distillation(list(student.requires_grad_()), list(teacher))[0]).backward()
        unpatchify(patchify(images.to(half), patch), patch, (side, side))
        if not csrc:
            seeded_noise(tokens, 3 * patch**2, 3)
            with torch.no_grad():
                to_images(velocity, patch, (side, side), velocity=velocity, dt=0.1, dtype=torch.uint8)


def texts(csrc: bool, arch: int, names: Iterable[str]) -> Iterator[tuple[list[str], str]]:
    """PTX of kernels that were launched, and which of them it holds."""
    if csrc:
        for path in built().glob(f"*compute_{arch}.ptx"):
            text = path.read_text()
            if here := [name for name in names if f".entry {name}(" in text]:
                yield here, text
    for launcher in () if csrc else list(_LAUNCHERS.values()):
        if launcher.metadata.target.arch == arch:
            yield [launcher.program.kernel.name], launcher.ptx


def registers(csrc: bool, arch: int, names: Iterable[str]) -> dict[str, int]:
    """Registers a thread of each kernel that was launched, by ptxas: the largest of its forms."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = shutil.which("ptxas") if csrc else get_ptxas(arch).path
    target = f"sm_{arch}a" if arch == 90 and not csrc else f"sm_{arch}"
    found: dict[str, int] = {}
    for here, text in texts(csrc, arch, names):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(text)
            command = [str(ptxas), "-v", f"--gpu-name={target}", f"--entry={','.join(here)}", str(source)]
            done = subprocess.run([*command, "-o", f"{source}.o"], capture_output=True, text=True, check=False)
        said = re.findall(r"entry function '(\w+)'(?s:.*?)Used (\d+) registers", done.stdout + done.stderr)
        if len(said) != len(here):
            raise RuntimeError(done.stdout + done.stderr)
        for name, number in said:
            found[short(name)] = max(found.get(short(name), 0), int(number))
    return found


def entry(seen: Counters, used: int, arch: int) -> dict[str, Any]:
    """One kernel, all its launches together."""
    moved = sum(read + written for read, written, _ in seen.footprint.values())
    passes = sum(access.sectors for kind, access in seen.access.items() if kind.startswith("shared"))
    rates = RATES[arch]
    bounds = {
        "memory": moved / rates["memory"],
        "tensor cores": seen.tensor_flops / rates["tensor cores"],
        "float32": 32 * seen.instructions["fp32"] / rates["float32"],  # each one operation at least
        "special functions": 32 * seen.instructions["mufu"] / SPECIAL / CLOCKS[arch],
        "shared memory": passes / CLOCKS[arch],
    }
    by = max(bounds, key=lambda name: bounds[name])
    return {
        "kernel": seen.kernel, "blocks": seen.blocks, "warps": seen.warps, "registers": used,
        "shared_bytes": seen.shared, "instructions": dict(seen.instructions), "tensor_flops": seen.tensor_flops,
        "bytes_touched": moved,
        "access": {
            kind: {"requests": a.requests, "bytes": a.bytes, "passes": a.sectors, "least": a.least}
            for kind, a in sorted(seen.access.items())
        },
        "of_a_block": {
            kind: {"passes": sectors, "least": -(-size // 32)}
            for kind, (sectors, size) in sorted(seen.of_a_block.items())
        },
        "bound_by": by, "bound_us": 1e6 * bounds[by],
    }  # fmt: skip


def counted(csrc: bool, emulation: Emulation) -> list[dict[str, Any]]:
    """All kernels of a part; an error if one was not launched."""
    every: dict[str, Counters] = {}
    for seen in emulation.counters.values():
        every.setdefault(short(seen.kernel), Counters(short(seen.kernel))).merge(seen)
    if missing := kernels_of(csrc, emulation.arch) - every.keys():
        raise RuntimeError(f"not launched: {', '.join(sorted(missing))}")
    used = registers(csrc, emulation.arch, emulation.counters)
    print(f"sm_{emulation.arch}: {emulation.launches} launches in {emulation.seconds:.0f} s", flush=True)
    return [entry(seen, used[name], emulation.arch) for name, seen in sorted(every.items())]


def main(archs: list[int]) -> None:
    """Write a file for each architecture."""
    prepare_triton()
    for arch in archs:
        pretend(arch)
        torch.manual_seed(0)
        with emulated(arch) as triton:
            flow()
            layers()
            distillation()
            in_fp8()
            losses(csrc=False)
        parts, findings = {"Triton": counted(False, triton)}, len(triton.findings)
        if nvcc():
            with emulated_cuda(arch) as cuda, cuda_for_triton():
                losses(csrc=True)
            parts["CUDA"], findings = counted(True, cuda), findings + len(cuda.findings)
        file = {"emulated": arch, "sizes": SIZES, "findings": findings, "rates": SOURCES[arch], "parts": parts}
        path = FOLDER / f"emulated-sm{arch}.json"
        path.write_text(json.dumps(file, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]] or [80, 90])
