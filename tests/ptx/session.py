"""`pytest --emulate 80`: what would run in Triton's interpreter runs as what the compiler made of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

# by what --emulate is given: whether it is the CUDA part that runs, and the architecture
TARGETS = {"80": (False, 80), "90": (False, 90), "csrc80": (True, 80), "csrc90": (True, 90)}
_NO_SUCH_PRODUCT = "it takes torch.bfloat16 and torch.float16, not torch.float32"


def prepare_triton() -> None:
    """Have Triton define kernels for a GPU, while the project still believes in the interpreter that runs on CPUs."""
    os.environ["TRITON_INTERPRET"] = "0"
    import triton  # noqa: F401

    from .launch import uninterpreted

    uninterpreted()
    os.environ["TRITON_INTERPRET"] = "1"


def pretend(arch: int) -> None:
    """Make the project believe that CPU tensors are on a GPU of an architecture, wherever it imported the question."""
    import uniflow_kernels.ops.flow_head
    import uniflow_kernels.triton_kernels.flow_products  # noqa: F401
    from uniflow_kernels import triton_kernels

    def architecture(device: torch.device) -> int:
        return arch

    old = triton_kernels.architecture  # or an earlier pretence
    for name, module in list(sys.modules.items()):
        if name.startswith("uniflow") and getattr(module, "architecture", None) is old:
            module.architecture = architecture


@contextmanager
def cuda_for_triton() -> Iterator[None]:
    """The CUDA part, for whoever asks for Triton; noise has no kernel there."""
    from uniflow_kernels import choice
    from uniflow_kernels.ops import registration, scaling

    choose, checked, requested = registration.choose, choice._checked, scaling.requested
    registration.choose = lambda op, why_not: "eager" if op == "seeded_noise" else choose(op, why_not)
    choice._checked = lambda name, source: checked("cuda" if name == "triton" else name, source)
    scaling.requested = lambda: "triton"  # on a CPU only whoever asks for Triton has a gradient scaled by a kernel
    try:
        yield
    finally:
        registration.choose, choice._checked, scaling.requested = choose, checked, requested


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Memory that nobody wrote is NaN inside the block."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Session:
    """The plugin of a session that emulates. What is found fails the test in which it was found."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.csrc, self.arch = TARGETS[target]
        self.contexts: list[AbstractContextManager] = []
        if not self.csrc:
            prepare_triton()

    def pytest_sessionstart(self) -> None:
        from .cuda import emulated_cuda
        from .launch import emulated
        from .machine import Options

        options = Options(both=True, races=True, counters=False, inexact=True)
        if self.csrc:
            self.contexts = [emulated_cuda(self.arch, options), cuda_for_triton()]
        else:
            pretend(self.arch)
            self.contexts = [emulated(self.arch, options)]
        self.emulation, *_ = [context.__enter__() for context in self.contexts]

    def pytest_sessionfinish(self) -> None:
        for context in reversed(self.contexts):
            context.__exit__(None, None, None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> object:
        before = set(self.emulation.findings)
        try:
            result = yield
        except Exception as error:  # a ValueError, or what opcheck makes of it
            if not isinstance(error, AssertionError):
                if _NO_SUCH_PRODUCT in str(error):
                    pytest.skip("no float32 products on a GPU")
                if self.csrc and "has no such kernel" in str(error):
                    pytest.skip("the CUDA part has no such kernel")
            raise
        new = [str(finding) for key, finding in self.emulation.findings.items() if key not in before]
        if new:
            pytest.fail("\n".join(new), pytrace=False)
        return result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        seen = self.emulation
        terminalreporter.write_line(f"{self.target}: {seen.launches} launches emulated in {seen.seconds:.0f} s")
