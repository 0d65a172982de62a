"""The kernel that quantizes rows, compiled for sm_90 and sm_100: sm_80 has no 8-bit floats."""

import pytest

pytest.importorskip("triton")

from tests.compile.compiling import Request, arches, compile_all
from uniflow_kernels.triton_kernels.quantization import tile_of

KINDS = {(1024, "bf16"): 64, (4096, "fp32"): 64, (16384, "bf16"): 96}  # registers


def request(arch, width, dtype):
    rows, columns, warps = tile_of(width)
    constants = {"LARGEST": 448.0, "W": width, "BM": rows, "BW": columns}
    signature = {"x_p": f"*{dtype}", "q_p": "*fp8e4nv", "scale_p": "*fp32", "x_s": "i32", "rows": "i32"}
    signature |= {"smallest": "fp32", **dict.fromkeys(constants, "constexpr")}
    kernel = "uniflow_kernels.triton_kernels.quantization:quantize_kernel"
    return Request(kernel, signature, constants, arch, num_warps=warps)


def test_a_row_stays_in_registers_and_is_read_once_in_wide_accesses(oldest):
    kinds = [(90, *kind) for kind in KINDS] + [(100, 1024, "bf16")] * (100 in arches(oldest))
    requests = {kind: request(*kind) for kind in kinds}
    for (arch, width, dtype), compiled in zip(requests, compile_all(list(requests.values()), oldest), strict=True):
        print(what := f"sm_{arch} {width} {dtype} {compiled}")
        assert compiled.spills == 0, what
        assert compiled.registers <= KINDS[width, dtype], what
        loads = {access for access in compiled.wide if access.startswith("LDG")}
        assert loads == {"LDG.E.128"}, what
