"""What several tests share: the golden checkpoint, tiny models, and the rule by which precision is judged."""

from __future__ import annotations

import gc
import importlib.util
import io
import os
import signal
import sys
import tarfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from uniflow import UniFlow, UniFlowConfig

GOLDEN = Path(__file__).parent / "golden"

if not torch.cuda.is_available():
    # before any kernel is defined: Triton then runs them on the CPU. tests/compile compiles in a process of its own
    os.environ.setdefault("TRITON_INTERPRET", "1")

if importlib.util.find_spec("hypothesis") is not None:  # `make gpu` takes what a machine has
    from hypothesis import settings

    # no deadlines: the first example imports and compiles, and the machine may be shared
    settings.register_profile("default", max_examples=25, derandomize=True, database=None, deadline=None)
    settings.register_profile("fuzz", max_examples=1000, derandomize=False, deadline=None, print_blob=True)
    settings.load_profile("default")

# a shell that starts the tests in the background leaves interrupts ignored, in all that they start too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# processes of pytest-xdist share the cores; what they start has as many threads, on which the last bit may depend
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate",
        choices=["80", "90", "csrc80", "csrc90"],
        help="in the place of Triton's interpreter: run what the compilers make of the kernels (csrc: of the CUDA"
        " part's) for a GPU of compute capability 8.0 or 9.0, in tests/ptx",
    )


def pytest_configure(config: pytest.Config) -> None:
    if target := config.getoption("--emulate"):
        from tests.ptx.session import Session

        config.pluginmanager.register(Session(target), "emulated")
    elif os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        round_to_nearest()
        multiply_bfloat16()
    # the golden model is narrower than its patch, on purpose small
    config.addinivalue_line("filterwarnings", "ignore:flow_width. a flow head of width 64:UserWarning")


def pytest_collection() -> None:
    gc.disable()  # nothing that is imported is garbage, and looking through it again and again takes a second


def pytest_collection_finish() -> None:
    gc.enable()


def round_to_nearest() -> None:
    """Make Triton's interpreter (3.7 to 3.9) round float32 to the nearest bfloat16, or float8_e4m3fn, as a GPU does.

    By itself it cuts bits off.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter._convert_float

    def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
        if (source, target) == (tl.float32, tl.float8e4nv):
            within = torch.from_numpy(np.ascontiguousarray(data, np.float32)).clamp(-448, 448)  # keeps NaN
            return within.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if (source, target) != (tl.float32, tl.bfloat16):
            return plain(data, source, target, rounding)
        bits = np.asarray(data, np.float32).view(np.uint32)
        nearest_even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, nearest_even).astype(np.uint16)

    interpreter._convert_float = convert


def multiply_bfloat16() -> None:
    """Make Triton's interpreter (3.7 to 3.9) multiply bfloat16 operands: it takes their bits for integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def in_float32(operand: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: interpreter.InterpreterBuilder, a: object, b: object, *rest: object) -> object:
        return plain(self, in_float32(a), in_float32(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture
def golden_model() -> UniFlow:
    return UniFlow.from_pretrained(GOLDEN)


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values, so that no zero-initialised branch hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.5)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * values if is_norm else values / max(1, parameter.shape[-1] ** 0.5 / 4))
    return module


def check_reset(make: Callable[[], nn.Module]) -> None:
    """`reset_parameters` sets every parameter and buffer as a new module has it, as after `to_empty`."""
    modules = make(), make(), make()
    new, other, reset = ({**dict(module.named_parameters()), **dict(module.named_buffers())} for module in modules)
    with torch.no_grad():
        for tensor in reset.values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 9999)
    modules[2].reset_parameters()
    for name, tensor in reset.items():
        if torch.equal(new[name], other[name]):
            assert torch.equal(tensor, new[name]), name
        else:
            assert torch.isfinite(tensor).all(), name
            assert tensor.numel() < 32 or 0.5 < tensor.std() / new[name].std() < 2, name


@pytest.fixture
def tiny() -> Callable[..., UniFlow]:
    """Make a random model of two layers and 16 tokens (patch 4, 16 px); keyword arguments change its config."""

    def make(**changes: object) -> UniFlow:
        fields = {
            "image_size": 16,
            "patch_size": 4,
            "hidden_size": 64,
            "vit_hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "latent_ch": 8,
            "global_blocks_depth": 1,
            "num_decoder_layers": 2,
            **changes,
        }
        model = UniFlow(UniFlowConfig.preset("base", **fields))
        randomize(model)
        return model.eval()

    return make


def derivative_error(function: Callable[[], Tensor], leaves: list[Tensor]) -> float:
    """How far the gradient of a scalar is from its finite difference, relative, in a random direction of all leaves."""
    leaves = [leaf for leaf in leaves if leaf.is_floating_point()]
    gradients = torch.autograd.grad(function(), leaves, allow_unused=True)
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves]
    step, values = 1e-6, []
    for sign in (1, -2):
        with torch.no_grad():
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(direction, alpha=sign * step)
        values.append(function().item())
    found = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    exact = (values[0] - values[1]) / (2 * step)
    return abs(float(found) - exact) / abs(exact)


@pytest.fixture
def within_twice() -> Callable[..., None]:
    """The 2x rule: the error against float64 is at most twice that of plain PyTorch in the same dtype, plus a floor."""

    def check(ours: Tensor, plain: Tensor, exact: Tensor, floor: float = 1e-6) -> None:
        assert exact.dtype == torch.float64
        assert ours.shape == exact.shape
        scale = exact.abs().max().clamp(min=1e-30)
        error = (ours.double() - exact).abs().max() / scale
        allowed = 2 * (plain.double() - exact).abs().max() / scale + floor
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"

    return check


@pytest.fixture(params=[torch.float64, torch.bfloat16, "meta"], ids=str)
def same_bits(request: pytest.FixtureRequest) -> Iterator[Callable[[Callable[[], list[object]]], None]]:
    """Check that a call gives the same values under PyTorch's own and another default dtype or device.

    "meta" stands for any other device, since what is made there holds nothing.
    """

    def made_anew(call: Callable[[], list[object]]) -> list[object]:
        for name, module in list(sys.modules.items()):
            for value in list(vars(module).values()) if name.startswith("uniflow") else ():
                getattr(value, "cache_clear", int)()  # what is made once is made under the default that holds now
        torch.manual_seed(0)
        return call()

    def check(call: Callable[[], list[object]]) -> None:
        expected = made_anew(call)
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(request.param)
        for ours, theirs in zip(made_anew(call), expected, strict=True):
            if isinstance(theirs, Tensor):
                assert isinstance(ours, Tensor)
                assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
                assert torch.equal(ours, theirs)
            else:
                assert ours == theirs

    yield check
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def fork(act: Callable[[], int | None], said: Path) -> int:
    """Start a process that acts and exits with what comes back; its stderr goes to a file. Returns its number.

    What takes seconds to import is there; threads and GPUs do not outlive a fork.
    """
    if process := os.fork():
        return process
    status: object = 1
    try:
        signal.alarm(300)  # the end, should it hang
        gc.freeze()  # to end what is left of the parent would be to wait for threads that only the parent has
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        torch.set_num_threads(1)
        torch.cuda.is_available = lambda: False
        status = act() or 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status if isinstance(status, int) else 1)


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, str]]]:
    """Run `uniflow` as a process, after `prepare`; gives its status and what it said on stderr.

    This process meanwhile computes as that one does.
    """

    from uniflow.cli import main

    def start(prepare: Callable[[], object], *arguments: object) -> tuple[int, str]:
        def act() -> None:
            prepare()
            main([str(argument) for argument in arguments])

        process = fork(act, tmp_path / "stderr")
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return status, (tmp_path / "stderr").read_text()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield start
    torch.set_num_threads(threads)


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Three smooth pictures of different sizes and kinds."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, size, seed in (("a.png", (40, 30), 0), ("b.jpg", (33, 50), 1), ("more/c.webp", (36, 36), 2)):
        smooth_picture(size, seed).save(folder / name)
    return folder


def smooth_picture(size: tuple[int, int], seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    """A tar file of members by name."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path
