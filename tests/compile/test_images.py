"""The kernel that writes images, compiled for sm_80, sm_90 and sm_100."""

import pytest

pytest.importorskip("triton")

from tests.compile.compiling import Request, arches, compile_all
from uniflow_kernels.triton_kernels.images import _BLOCK, OPTIONS

WRITTEN = {"u8": "STG.E.U8", "bf16": "STG.E.U16"}  # one pixel a thread


def request(arch, written):
    constants = {
        **{"PATCH": 14, "MOVES": True, "AFFINE": True, "CLAMP": True, "BYTES": written == "u8"},
        **{"NEAREST": 12582912.0, "BLOCK": _BLOCK},
    }
    signature = {"rows": "*fp32", "velocity": "*bf16", "images": f"*{written}", "mean_and_std": "*fp32", "dt": "fp32"}
    sizes = ("channels", "down", "width", "rows_image", "rows_token", "velocity_image", "velocity_token")
    signature |= {**dict.fromkeys(sizes, "i32"), **dict.fromkeys(constants, "constexpr")}
    return Request("uniflow_kernels.triton_kernels.images:to_images_kernel", signature, constants, arch, **OPTIONS)


def test_no_spills_few_registers_one_pixel_a_thread_and_rounding_by_parts(oldest):
    requests = {(arch, written): request(arch, written) for arch in arches(oldest) for written in WRITTEN}
    for (arch, written), compiled in zip(requests, compile_all(list(requests.values()), oldest), strict=True):
        what = f"sm_{arch} {written} {compiled}"
        assert compiled.spills == 0, what
        assert compiled.stack == 0, what
        assert compiled.registers <= 64, what
        assert compiled.fused == 0, what  # else the byte at a tie is not the definition's
        stores = {access for access in compiled.wide if access.startswith("STG")}
        assert stores == {WRITTEN[written]}, what
