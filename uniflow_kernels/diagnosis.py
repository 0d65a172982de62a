"""What is installed here, what each op would run on, and why not something faster."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from dataclasses import dataclass

import torch

from uniflow_kernels import cpu_kernels, cuda_kernels, triton_kernels
from uniflow_kernels.ops.attention import explain_attention
from uniflow_kernels.ops.flow_choice import RUNS, UNMEASURED, Call, explain
from uniflow_kernels.ops.fp8_linear import explain_fp8
from uniflow_kernels.ops.transformer_layers import OP, explain_layers
from uniflow_kernels.ops.transformer_mlp import OP as MLP
from uniflow_kernels.ops.transformer_mlp import explain_mlp


@dataclass(frozen=True)
class OpReport:
    """What one op would run on here: `runs` names the implementation, `why` says why not something faster."""

    op: str
    runs: str
    why: str


@dataclass(frozen=True)
class DoctorReport:
    """The machine and its software, and one line an op; `str()` prints both."""

    environment: dict[str, str]
    ops: list[OpReport]

    def __str__(self) -> str:
        lines = [f"{name:16} {value}" for name, value in self.environment.items()]
        lines += [f"{op.op:24} {op.runs:40} {op.why}" for op in self.ops]
        return "\n".join(lines)


_OF_BLOCKS = (
    "modulated_norm",
    "residual_norm",
    "compared_residual_norm",
    "flow_tangents",
)  # which the CPU part does not have
_TRITON_ONLY = ("seeded_noise", "to_images", *_OF_BLOCKS)


def doctor() -> DoctorReport:
    """Look at this machine. Needs neither a GPU nor Triton, and starts no work on a GPU.

    Returns:
        The report; `print(doctor())` shows it.
    """
    cuda = torch.cuda.is_available()
    environment = {
        "uniflow-kernels": _installed("uniflow-kernels"),
        "CUDA part": (cuda_kernels.why_not_built() or "built").removeprefix("the CUDA part was "),
        "CPU part": _cpu_part(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "Triton": _installed("triton"),
        "CUDA": torch.version.cuda or "torch is built without CUDA",
        "nvcc": _nvcc(),
        "GPU": _gpus() if cuda else "none",
        "flash-attn": _installed("flash-attn"),
    }
    names = ("interpolate", "velocity_loss", "layerwise_distillation", "patchify", "unpatchify")
    losses = [_loss(name, cuda) for name in names]
    triton_only = [_triton_only(name, cuda) for name in _TRITON_ONLY]
    return DoctorReport(
        environment, [_flow_head(cuda), _fp8(cuda), _layers(cuda), _mlp(cuda), *losses, *triton_only, _attention(cuda)]
    )


def _cpu_part() -> str:
    if (reason := cpu_kernels.why_not_built()) is not None:
        return reason.removeprefix("the CPU part was ")
    threads = "torch's threads" if cpu_kernels.shares_threads() else "one thread: torch's were not found"
    return f"built; {cpu_kernels.instructions()}, {threads}"


def _flow_head(cuda: bool) -> OpReport:
    call = Call(torch.device("cuda" if cuda else "cpu"), torch.bfloat16, width=1024, hidden=1024, rows=1)
    return OpReport("flow_head", *explain(call))


def _layers(cuda: bool) -> OpReport:
    device = torch.device("cuda" if cuda else "cpu")
    return OpReport(OP, *explain_layers(device, torch.bfloat16, 1024))


def _mlp(cuda: bool) -> OpReport:
    device = torch.device("cuda" if cuda else "cpu")
    return OpReport(MLP, *explain_mlp(device, torch.bfloat16, 1024))


def _fp8(cuda: bool) -> OpReport:
    runs, why = explain_fp8(torch.device("cuda" if cuda else "cpu"), 1024)
    return OpReport('precision="fp8"', runs, f"on request; {why}")


def _loss(name: str, cuda: bool) -> OpReport:
    if not cuda:
        return _on_cpu(name)
    some = torch.empty(0, dtype=torch.float32, device="cuda")
    triton, compiled = triton_kernels.why_not(some), cuda_kernels.why_not(some)
    if triton is None:
        return OpReport(name, "Triton", f"{UNMEASURED}; CUDA: {compiled or 'built, on request'}")
    if compiled is None:
        return OpReport(name, "CUDA", f"{UNMEASURED}; Triton: {triton}")
    why = f"Triton and CUDA: {triton}" if triton == compiled else f"Triton: {triton}; CUDA: {compiled}"
    return OpReport(name, RUNS["eager"], why)


def _on_cpu(name: str) -> OpReport:
    reason = cpu_kernels.why_not_built()
    if reason is None:
        return OpReport(name, "the CPU part", "Triton and CUDA: they run on CUDA, not on cpu")
    return OpReport(name, RUNS["eager"], reason)


def _triton_only(name: str, cuda: bool) -> OpReport:
    if not cuda and name not in _OF_BLOCKS:
        return _on_cpu(name)
    reason = triton_kernels.why_not_on(torch.device("cuda" if cuda else "cpu"), torch.bfloat16)
    if reason is None:
        return OpReport(name, "Triton", UNMEASURED)
    return OpReport(name, RUNS["eager"], f"Triton: {reason}")


def _attention(cuda: bool) -> OpReport:
    return OpReport("attention", *explain_attention(torch.device("cuda" if cuda else "cpu"), torch.bfloat16, 64))


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "not on the PATH"
    lines = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")
    return next((line.split("release ")[1].split(",")[0] for line in lines if "release " in line), "unknown version")


def _gpus() -> str:
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)" for gpu in found)
