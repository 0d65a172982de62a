"""The CUDA part: its host code runs as it is, on a runtime whose launches come here and run as PTX.

with emulated_cuda(arch=80) as emulation: ...   # backend("cuda") then takes CPU tensors
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .launch import Emulation, register
from .machine import Launch, Options, Program
from .memory import GlobalMemory
from .parse import Kernel, parse

ROOT = Path(__file__).parents[2]
_CSRC, _SHIM = ROOT / "csrc", Path(__file__).parent / "shim.cpp"
_ARCHES = (80, 90)
_MOST_SHARED = 48 << 10  # what a block may have without cudaFuncSetAttribute
_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
# the launches of uniflow_kernels.cuda_kernels
_CALLS = ("interpolate", "velocity_loss", "patchify", "unpatchify", "cosine_distances", "scale")


def nvcc() -> str | None:
    """The compiler, where there is one."""
    return shutil.which("nvcc")


def built() -> Path:
    """A folder with the module `_cuda.so` and the PTX of its kernels, made once of what csrc/ holds now."""
    sources = [*sorted(_CSRC.glob("*.cu")), _CSRC / "module.cpp", _SHIM]
    known = hashlib.sha256(str(nvcc()).encode() + sysconfig.get_config_var("EXT_SUFFIX").encode())
    for path in [*sources, Path(__file__), *sorted(_CSRC.glob("*.h")), *sorted(_CSRC.glob("*.cuh"))]:
        known.update(path.read_bytes())
    folder = ROOT / "build" / f"ptx-{known.hexdigest()[:16]}"
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            _build(sources, made)
            try:
                made.rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    return folder


def _build(sources: list[Path], folder: Path) -> None:
    """One compilation gives the host's code and the PTX; optimised is only what runs on the GPU."""
    headers = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
    archs = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in _ARCHES]
    with tempfile.TemporaryDirectory() as kept:
        for source in sources:
            out = Path(kept) / f"{source.name}.o"
            if source.suffix == ".cu":
                command = ["nvcc", "-std=c++17", "-O0", "-Xcompiler", "-fPIC", *archs, "-keep", "-keep-dir", kept]
            else:
                command = ["g++", "-std=c++17", "-O0", "-fPIC", *headers]
            _run(*command, "-c", str(source), "-o", str(out))
        # its own runtime, whatever CUDA's own one a torch with CUDA has loaded before
        _run("g++", "-shared", "-Wl,-Bsymbolic", *map(str, Path(kept).glob("*.o")), "-o", str(folder / "_cuda.so"))
        for text in Path(kept).glob("*.ptx"):
            shutil.copy(text, folder)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


class Runtime:
    """Takes launches from the host's code."""

    def __init__(self, kernels: dict[str, Kernel], emulation: Emulation) -> None:
        self.kernels, self.emulation = kernels, emulation
        self.seen: list[torch.Tensor] = []
        self.programs: dict[tuple[str, int], Program] = {}
        self.error: BaseException | None = None
        self.callback = _CALLBACK(self._launched)

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of the project's that launches; the tensors whose addresses it asks for are what it may touch."""
        plain = torch.Tensor.data_ptr

        def data_ptr(tensor: torch.Tensor) -> int:
            self.seen.append(tensor.detach())
            return plain(tensor)

        self.seen, self.error = [], None
        torch.Tensor.data_ptr = data_ptr
        try:
            result = function(*args, **kwargs)
        finally:
            torch.Tensor.data_ptr = plain
        if self.error is not None:
            raise self.error
        return result

    def _launched(self, name: bytes, grid: Any, block: Any, shared: int, arguments: Any) -> None:
        try:
            self._launch(name.decode(), tuple(grid[:3]), tuple(block[:3]), shared, arguments)
        except BaseException as error:  # it cannot pass through C
            self.error = error

    def _launch(self, name: str, grid: tuple[int, ...], block: tuple[int, ...], shared: int, arguments: Any) -> None:
        kernel = self.kernels[name]
        if (name, shared) not in self.programs:
            self.programs[name, shared] = Program(kernel, shared)
        if shared > _MOST_SHARED:
            raise ValueError(f"{name}: {shared} bytes of shared memory without cudaFuncSetAttribute")
        if block[1:] != (1, 1):
            raise NotImplementedError("blocks of several dimensions")
        params = np.zeros(max(16, kernel.param_bytes), np.uint8)
        for place, address in zip(kernel.params.values(), arguments[: len(kernel.params)], strict=True):
            given = ctypes.string_at(address, place.size)
            params[place.offset : place.offset + place.size] = np.frombuffer(given, np.uint8)
        memory = GlobalMemory(self.emulation.options.races)
        for number, tensor in enumerate(self.seen):
            register(memory, tensor, f"tensor {number} {tuple(tensor.shape)}")
        self.emulation.launch(Launch(self.programs[name, shared], grid, block[0], params, memory))


@contextmanager
def emulated_cuda(arch: int = 80, options: Options | None = None) -> Iterator[Emulation]:
    """Make the project's backend "cuda" serve CPU tensors."""
    from uniflow_kernels import cuda_kernels

    folder = built()
    kernels: dict[str, Kernel] = {}
    for text in folder.glob(f"*compute_{arch}.ptx"):
        kernels.update(parse(text.read_text()))
    module = _module(str(folder / "_cuda.so"))
    emulation = Emulation(arch, options or Options())
    runtime = Runtime(kernels, emulation)
    ctypes.CDLL(str(folder / "_cuda.so")).ptx_on_launch(runtime.callback)
    plain_device = torch.cuda.device

    def emulating(function: Any) -> Any:
        return lambda *args, **kwargs: runtime.call(function, *args, **kwargs)

    changes = {name: emulating(getattr(cuda_kernels, name)) for name in _CALLS}
    changes |= {
        "why_not_on": lambda device: None,
        "_is_built": lambda: True,
        "_module": lambda: module,
        "_stream": lambda: 0,
    }
    before = {name: getattr(cuda_kernels, name) for name in changes}
    torch.cuda.device = lambda device: nullcontext() if torch.device(device).type == "cpu" else plain_device(device)
    vars(cuda_kernels).update(changes)
    try:
        yield emulation
    finally:
        vars(cuda_kernels).update(before)
        torch.cuda.device = plain_device


_MODULES: dict[str, Any] = {}  # pybind11 registers the types of a module once


def _module(path: str) -> Any:
    if path not in _MODULES:
        spec = importlib.util.spec_from_file_location("uniflow_kernels._cuda", path)
        _MODULES[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_MODULES[path])
    return _MODULES[path]
