"""Launches that do nothing, on a machine without a GPU: a libcuda whose functions only say that they succeeded.

All above it is real: Triton compiles the kernels for an H100, builds its launchers and calls them, with tensors that
lie on the CPU. With a GPU nothing stands in.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import launches
from uniflow_kernels.modules import chunks

ARCHITECTURE = 90
_SOURCE = Path(__file__).with_name("libcuda.c")


class HostError(RuntimeError):
    """Host time cannot be measured here; the message says why."""


def version() -> str:
    """Triton's, as far as launches differ by it."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


@contextmanager
def launching() -> Iterator[torch.device]:
    """Where launches can be made, and the device of their tensors: a GPU, or the CPU with what stands in for one."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise HostError("TRITON_INTERPRET=1 is set: the interpreter launches nothing")
    driver = _driver()
    from triton.runtime import driver as active

    before = active._active
    with ExitStack() as pretended:
        for name, value in {"architecture": lambda device: ARCHITECTURE, "why_not_on": lambda *of: None}.items():
            for module in _importers_of(name):
                pretended.enter_context(patch.object(module, name, value))
        pretended.enter_context(patch.dict(os.environ, {"UNIFLOW_BACKEND": "triton"}))
        # how gradients are added up where an operation costs a launch
        pretended.enter_context(patch.object(chunks, "_launches", lambda tensor: True))
        active.set_active(driver)
        try:
            yield torch.device("cpu")
        finally:
            active._active = before


def count(call: Callable[[], Any]) -> int:
    """How many launches a call makes, once it is warm: on a CPU Triton's, and torch's ops that a GPU would launch."""
    if torch.cuda.is_available():
        return launches(call)
    call()
    before = _triton_launches()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return _triton_launches() - before + sum(map(_is_launch, profiler.events()))


def _is_launch(event: Any) -> bool:
    """Whether what the profiler saw is an op that does its work itself, and is neither a view nor an allocation."""
    if _is_in_one_launch(event.cpu_parent):
        return False
    if event.name in _ONE_LAUNCH:
        return True
    children = event.cpu_children
    return event.name.startswith("aten::") and _computes(event.name[6:]) and not any(map(_is_launch, children))


def _is_in_one_launch(event: Any) -> bool:
    return event is not None and (event.name in _ONE_LAUNCH or _is_in_one_launch(event.cpu_parent))


@lru_cache
def _computes(name: str) -> bool:
    if name.startswith(_NO_LAUNCH):
        return False
    found = getattr(torch.ops.aten, name, None)
    return found is None or not any(getattr(found, overload).is_view for overload in found.overloads())


# what a GPU launches once, whatever a CPU does for it, such as a cast before a product: copies of many tensors too, if
# all are of one dtype and all sources of one, and sums, if all are of the same
_ONE_LAUNCH = {
    *("aten::linear", "aten::addmm", "aten::addmm_", "aten::mm", "aten::sum", "aten::_foreach_copy_"),
    *("aten::_foreach_add_", "aten::add", "aten::add_", "aten::mul", "aten::mul_", "aten::div", "aten::div_"),
}
# they allocate, look or pass on
_NO_LAUNCH = (
    *("empty", "new_empty", "detach", "lift_fresh", "is_", "set_", "resize_", "resolve_", "promote_types"),
    *("result_type", "reshape", "unflatten", "flatten", "narrow", "chunk", "contiguous", "to", "item"),
)


def _importers_of(name: str) -> list[Any]:
    """The modules of the package that know a function of triton_kernels by its name."""
    import uniflow_kernels.ops.flow_head
    import uniflow_kernels.triton_kernels.flow_products  # noqa: F401
    from uniflow_kernels import triton_kernels

    function = getattr(triton_kernels, name)
    modules = [module for path, module in list(sys.modules.items()) if path.startswith("uniflow_kernels")]
    return [module for module in modules if vars(module).get(name) is function]


def _driver() -> Any:
    """Triton's driver for CUDA, on a libcuda that does nothing."""
    with patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": str(Path(_library()._name).parent)}):
        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

        utils = CudaUtils()
    from triton.backends.compiler import GPUTarget

    driver = CudaDriver.__new__(CudaDriver)
    driver.utils, driver.launcher_cls = utils, CudaLauncher
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device=None: 0
    driver.set_current_device = lambda device: None
    driver.get_device_capability = lambda device=None: divmod(ARCHITECTURE, 10)
    driver.get_current_target = lambda: GPUTarget("cuda", ARCHITECTURE, 32)
    return driver


@lru_cache
def _library() -> ctypes.CDLL:
    """The libcuda, loaded before anybody looks for another; it is compiled once, beside Triton's kernels."""
    from triton import knobs

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise HostError("without a GPU host time needs a C compiler: gcc, clang, or CC")
    folder = Path(knobs.cache.dir) / "libcuda-that-does-nothing"
    library = folder / "libcuda.so.1"
    if not library.exists() or library.stat().st_mtime < _SOURCE.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"{os.getpid()}.so"
        command = [compiler, "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(_SOURCE), "-o", str(made)]
        subprocess.run(command, check=True)
        made.replace(library)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _triton_launches() -> int:
    return ctypes.c_ulonglong.in_dll(_library(), "launched").value
