"""The losses' kernels, compiled for sm_80, sm_90 and sm_100: registers, spills, and how wide they read and write."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.compile.compiling import ARCHES, Request, arches, compile_all

CSRC = Path(__file__).parents[2] / "csrc"
FILES = ("velocity", "distillation", "patches")
KERNELS = "uniflow_kernels.triton_kernels"


def flow_request(arch, kernel, seeded, held=False, first_row="i32"):
    """bf16 rows, float32 images, patches of 14: rows of 588 in units of 4.

    The seed may be held by the device; a first row beyond 2^31 is a 64-bit number.
    """
    pointers = {
        **{"images": "*fp32", "t": "*fp32", "noise": "constexpr" if seeded else "*fp32", "x_t": "*bf16"},
        **{"velocity": "*bf16", "gradient": "*bf16", "coefficients": "*fp32", "losses": "*fp32"},
        **{"scale_and_shift": "constexpr", "seed": "*i64" if held else "constexpr", "coefficient": "fp32"},
        "first_row": first_row,
    }
    constants = {
        **{"PATCH": 14, "NORMALIZED": False, "SEEDED": seeded, "UNIT": 4, "TOKENS": 16, "QUADS": 32},
        **({"T_PER_TOKEN": True} if kernel == "interpolate_kernel" else {"PER_TOKEN": False, "GRADIENT": True}),
    }
    sizes = ["tokens_in_all", "batch", "down", "across", "length", "columns"]
    strides = [f"stride_{name}" for name in ("image", "channel", "row", "column")]
    strides += [f"{rows}_{name}" for rows in ("noise", "velocity") for name in ("row", "token")]
    names = ["key0", "key1", "offset0", "offset1", *sizes, *strides]
    signature = {**dict.fromkeys(names, "i32"), **pointers, **dict.fromkeys(constants, "constexpr")}
    missing = {"scale_and_shift": None, **({"noise": None} if seeded else {}), **({} if held else {"seed": None})}
    return Request(f"{KERNELS}.velocity:{kernel}", signature, {**constants, **missing}, arch)


def noise_request(arch):
    """Rows of 588 in units of 4."""
    numbers = ["rows", "in_group", "first", "columns", "offset0", "offset1"]
    constants = {"UNIT": 4, "ROWS": 16, "QUADS": 32}
    signature = {
        **dict.fromkeys(numbers, "i32"),
        **{"seeds": "*i64", "noise": "*fp32", **dict.fromkeys(constants, "constexpr")},
    }
    return Request(f"{KERNELS}.noise:seeded_noise_kernel", signature, constants, arch)


def cosine_request(arch, dtype="bf16"):
    """24 layers of width 1024."""
    layers = [f"*{dtype}"] * 24
    constants = {
        **{
            "LARGEST": 65504.0 if dtype == "fp16" else 3.3895313892515355e38,
            "LAYERS": 24,
            "GRADIENT": True,
            "POWERS": dtype == "fp16",
        },
        **{"UNIT": 8, "TOKENS": 4, "COLUMNS": 1024},
    }
    strides = [f"{side}_{name}" for side in ("student", "teacher") for name in ("batch", "token")]
    numbers = ["tokens_in_all", "length", "width", "skip", *strides]
    signature = {
        **dict.fromkeys(numbers, "i32"),
        **dict.fromkeys(("students", "teachers", "gradients"), layers),
        "distances": "*fp32",
        "powers": "*fp32" if dtype == "fp16" else "constexpr",
        **dict.fromkeys(constants, "constexpr"),
    }
    missing = {} if dtype == "fp16" else {"powers": None}
    return Request(f"{KERNELS}.distillation:cosine_kernel", signature, {**constants, **missing}, arch)


def patches_request(arch, cut):
    """Elements of 2 bytes, patches of 14: images to rows, or back."""
    numbers = ["tokens_in_all", "batch", "down", "across", "length", "stride_image", "stride_channel", "stride_row"]
    signature = {
        **dict.fromkeys((*numbers, "rows_image", "rows_token"), "i32"),
        **dict.fromkeys(("images", "rows"), "*i16"),
        **dict.fromkeys(("stride_column", "rows_column", "PATCH", "CUT", "UNIT", "TOKENS", "COLUMNS"), "constexpr"),
    }
    constants = {"stride_column": 1, "rows_column": 1, "PATCH": 14, "UNIT": 4, "TOKENS": 16, "COLUMNS": 128}
    return Request(f"{KERNELS}.patches:patches_kernel", signature, {**constants, "CUT": cut}, arch)


def test_triton_kernels(oldest):
    requests = []
    for arch in arches(oldest):
        requests.append(flow_request(arch, "interpolate_kernel", True))
        requests.append(flow_request(arch, "velocity_loss_kernel", True))
        requests.append(noise_request(arch))
        requests.append(cosine_request(arch))
        requests.append(patches_request(arch, True))
    # other forms, in which nothing depends on the architecture
    requests.append(flow_request(90, "interpolate_kernel", True, held=True, first_row="i64"))
    requests.append(flow_request(90, "velocity_loss_kernel", False))
    requests.append(cosine_request(90, "fp16"))
    requests.append(patches_request(90, False))
    for request, compiled in zip(requests, compile_all(requests, oldest), strict=True):
        what = f"{request.kernel} sm_{request.arch} {compiled}"
        assert compiled.spills == 0, what
        assert compiled.stack == 0, what
        assert compiled.registers <= 128, what
        assert compiled.shared <= 16 << 10, what
        if "patches" in request.kernel:
            # rows in wide accesses, pixels one by one
            access = "STG.E.128" if request.constexprs["CUT"] else "LDG.E.128"
            assert any(access in kind for kind in compiled.wide), what
            continue
        assert any("STG.E.128" in access for access in compiled.wide), what
        if not re.search("interpolate|noise", request.kernel):  # which read pixels one by one, and next to nothing
            assert any("LDG.E.128" in access for access in compiled.wide), what


def tool(name):
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """The CUDA part's kernels as they were installed: {(file, arch): cubin}."""
    spec = importlib.util.find_spec("uniflow_kernels._cuda")
    if spec is None:
        pytest.skip("the CUDA part is not built: `make setup` does it where nvcc is")
    module = Path(spec.origin)
    newest = max(CSRC.iterdir(), key=lambda source: source.stat().st_mtime)
    assert module.stat().st_mtime >= newest.stat().st_mtime, f"built before {newest.name}: make setup"
    folder = tmp_path_factory.mktemp("cubins")
    subprocess.run([tool("cuobjdump"), "-xelf", "all", module], cwd=folder, check=True, capture_output=True)
    found = {}
    for cubin in folder.iterdir():
        names = set(re.findall(r"_(\w+?)_cu_", output(tool("cuobjdump"), "--dump-resource-usage", cubin)))
        for name in FILES:
            if any(known.endswith(f"_{name}") for known in names):
                found[name, int(re.search(r"sm_(\d+)\.cubin$", cubin.name)[1])] = cubin
    assert found.keys() == {(name, arch) for name in FILES for arch in ARCHES}
    return found


def output(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_sources_give_no_warnings(tmp_path):
    for name in FILES:
        flags = ["-std=c++17", "-Xcicc", "-O0", "-ptx", "-arch=sm_90", "-Werror", "all-warnings"]
        output("nvcc", *flags, CSRC / f"{name}.cu", "-o", tmp_path / "ptx")


def test_cuda_kernels(cubins):
    """No local memory; 16 bytes an access wherever a kernel is meant for it; room for a full multiprocessor."""
    for (name, arch), cubin in cubins.items():
        usage = output(tool("cuobjdump"), "--dump-resource-usage", cubin)
        kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        assert len(kernels) == {"velocity": 12, "distillation": 15, "patches": 32}[name]
        for kernel, registers, stack, _, local in kernels:
            assert int(stack) == int(local) == 0, (kernel, arch)
            # what keeps a row of 2048 float32 elements in registers may take twice as many
            assert int(registers) <= (168 if "cosine" in kernel else 64), (kernel, arch, registers)
        sass = output(tool("nvdisasm"), "-c", "-ndf", cubin)
        assert not re.search(r"\b(STL|LDL)\b", sass)
        functions = dict(part.split(":\n", 1) for part in sass.split("\n.text.")[1:])
        assert len(functions) == len(kernels)
        for kernel, code in functions.items():
            # a mangled name ends its template arguments in Lb1E, or in Li<elements>ELi<kept>E
            wide = "scale_kernel" in kernel or "Lb1E" in kernel or re.search(r"Li[48]ELi\d", kernel)
            if name == "patches":  # which are wide on the side of the images, of the rows, or of both
                images, rows, cut = re.search(r"Lb(\d)ELb(\d)ELb(\d)E", kernel).groups()
                reads, writes = (images, rows) if cut == "1" else (rows, images)
                assert bool(re.search(r"\bLDG\.E\.128", code)) == (reads == "1"), (kernel, arch)
                assert bool(re.search(r"\bSTG\.E\.128", code)) == (writes == "1"), (kernel, arch)
            elif wide:
                assert re.search(r"\bLDG\.E\.128", code), (kernel, arch)
                assert re.search(r"\bSTG\.E\.128", code), (kernel, arch)
