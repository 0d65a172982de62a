"""Compiles Triton kernels for GPUs that are not there, and reads out of ptxas and the SASS what became of them.

Runs as a process of its own, since the tests' process defines all kernels for the interpreter, and to use the oldest
Triton that is supported, installed beside the newest:

    python -m tests.compile.compiling REQUESTS.json RESULTS.json

A request is a kernel ("package.module:name"), the Triton types of its arguments ("*bf16", "i32", "constexpr",
"tensordesc<bf16[128, 64]>", ..., a list of them for a tuple), the values of the constexpr ones, num_warps, num_stages
and the architecture (80, 90, 100). Pointers and i32 arguments are taken as multiples of 16.
"""

from __future__ import annotations

import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

# `make test` installs it there; UNIFLOW_OLDEST_TRITON names another folder
OLDEST = Path(os.environ.get("UNIFLOW_OLDEST_TRITON", Path(sys.prefix) / "triton-3.6.0"))

ARCHES = (80, 90, 100)


def is_oldest(oldest: bool) -> bool:
    """Whether the oldest Triton compiles: the one beside the installed one or, in `make oldest`, the installed one."""
    return oldest or version("triton").startswith("3.6.")


def arches(oldest: bool) -> tuple[int, ...]:
    """What to compile for; by the oldest Triton for sm_90 alone: more is not asked of it."""
    return (90,) if is_oldest(oldest) else ARCHES


@dataclass(frozen=True)
class Request:
    """A kernel to compile for one architecture."""

    kernel: str
    signature: dict[str, str | list[str]]
    constexprs: dict[str, Any]
    arch: int
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True


@dataclass(frozen=True)
class Compiled:
    """What came out.

    `serialised` holds ptxas's C75xx warnings: the wgmma pipeline ran one product at a time; nothing else shows it.
    `spills` counts local stores and loads in the SASS; `wide` counts global accesses by width, `fused`
    multiplications and additions in one. `together` is the most global loads that are issued with no store, shuffle or
    barrier between them.
    """

    registers: int
    stack: int
    shared: int
    serialised: list[str]
    spills: int
    wgmma: dict[str, int] = field(default_factory=dict)
    mma: int = 0
    tcgen05: int = 0
    tma: int = 0
    wide: dict[str, int] = field(default_factory=dict)
    fused: int = 0
    instructions: int = 0
    together: int = 0


def compile_all(requests: list[Request], oldest: bool = False) -> list[Compiled]:
    """Compile in a fresh process without the interpreter; an error in it is raised here with its output.

    Args:
        requests: what to compile.
        oldest: by the oldest Triton that is supported, not by the installed one.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "requests.json", Path(folder) / "results.json"
        asked.write_text(json.dumps([asdict(request) for request in requests]))
        command = [sys.executable, "-m", "tests.compile.compiling", str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment(oldest))
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return [Compiled(**result) for result in json.loads(answered.read_text())]


def _environment(oldest: bool) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}  # a cached kernel has no log
    return kept | ({"PYTHONPATH": f"{OLDEST}{os.pathsep}{kept.get('PYTHONPATH', '')}"} if oldest else {})


def _kernel(request: Request) -> Any:
    module, name = request.kernel.split(":")
    return getattr(importlib.import_module(module), name)


def compile_one(request: Request) -> Compiled:
    """Compile in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _kernel(request)
    signature = {argument: request.signature[argument] for argument in kernel.arg_names}
    signature = {name: tuple(kind) if isinstance(kind, list) else kind for name, kind in signature.items()}
    places = [
        (place, kind)
        for index, kinds in enumerate(signature.values())
        for place, kind in (
            [((index,), kinds)] if isinstance(kinds, str) else [((index, i), kind) for i, kind in enumerate(kinds)]
        )
    ]
    never = [place for place, name in enumerate(kernel.arg_names) if name in (kernel.do_not_specialize or ())]
    aligned = {
        place: [["tt.divisibility", 16]]
        for place, kind in places
        if (kind == "i32" and place[0] not in never) or kind.startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=request.constexprs, attrs=aligned)
    options = {name: getattr(request, name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    with redirect_stdout(io.StringIO()) as said:  # what ptxas warns of; see `_environment`
        compiled = triton.compile(source, target=GPUTarget("cuda", request.arch, 32), options=options)
    registers = re.search(r"Used (\d+) registers", said.getvalue())
    stack = re.search(r"(\d+) bytes stack frame", said.getvalue())
    assert registers is not None, said.getvalue()
    assert stack is not None, said.getvalue()
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        sass = _output(tools / "nvdisasm", "-c", "-ndf", cubin)  # cuobjdump takes half as long again to say the same
    return Compiled(
        registers=int(registers[1]),
        stack=int(stack[1]),
        shared=compiled.metadata.shared,
        serialised=sorted(set(re.findall(r"C75\d\d", said.getvalue()))),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        wgmma=dict(Counter(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", compiled.asm["ptx"]))),
        mma=len(re.findall(r"\bHMMA\b", sass)),
        tcgen05=len(re.findall(r"\btcgen05\.mma\.", compiled.asm["ptx"])),
        tma=len(re.findall(r"\bUTMA(?:LDG|STG)\b", sass)),
        wide=dict(Counter(re.findall(r"\b((?:LDG|STG)\.E[.\w]*)", sass))),
        fused=len(re.findall(r"\bFFMA\b", sass)),
        together=max(map(len, re.findall(r"L+", "".join(_order(sass)))), default=0),
        instructions=len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
    )


def _order(sass: str) -> list[str]:
    """L for each global load in the program's order, and a dot for what such a load cannot, or shall not, wait for."""
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/.*?\b(LDG|STG|SHFL|BAR)\b", sass, re.MULTILINE)
    return ["L" if name == "LDG" else "." for name in found]


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def main(asked: str, answered: str) -> None:
    """Compile all requests of a file, two at a time in processes forked of this one, which has imported the kernels."""
    requests = [Request(**request) for request in json.loads(Path(asked).read_text())]
    for request in requests:
        _kernel(request)
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        results = list(pool.map(compile_one, requests))
    Path(answered).write_text(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main(*sys.argv[1:])
