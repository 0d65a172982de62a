"""Kernels of rows, of the flow head and of transformer layers, compiled for GPUs that are not there."""

import pytest

from tests.compile.compiling import Request, arches, compile_all

# of a kernel; of all others flow_head
MODULES = {
    "activation": "activation",
    "activation_backward": "activation",
    "fold_norm": "layer_products",
    "compared_norm": "compared_norm",
    "compared_norm_backward": "compared_norm",
}
# per thread; no more than these were needed when the kernels were written
REGISTERS = {
    "norm_modulate": 64,
    "norm_modulate_backward": 170,
    "activation": 32,
    "activation_backward": 126,
    "fold_norm": 48,
    "compared_norm": 64,
    "compared_norm_backward": 136,
}

# where every row has a condition of its own; with divisions of 64 bits 856 and 1080, with a sigmoid by exp 360 and 776
INSTRUCTIONS = {
    "norm_modulate": 584,
    "norm_modulate_backward": 768,
    "activation": 216,
    "activation_backward": 632,
    "fold_norm": 272,
    "compared_norm": 480,
    "compared_norm_backward": 600,
}
# loads that wait for no reduction: all of the forward pass; of the backward pass all of a row but x's, on sixteen warps
# dh and the scale, since 128 registers a thread have no room for more
TOGETHER = {
    ("norm_modulate", 1024): 12,
    ("norm_modulate_backward", 1024): 5,
    ("norm_modulate_backward", 3072): 3,
    ("compared_norm_backward", 1024): 4,  # 6 by the newest
}


def norm_modulate(width, arch, dtype, *, residual=True, rms=False, shared=False, modulated=True, gated=True):
    pointers = dict.fromkeys(("x_p", "gate_p", "q_p", "shift_p", "scale_p", "sum_p", "h_p"), f"*{dtype}")
    strides = dict.fromkeys(("x_s", "gate_s", "q_s", "modulation_s", "sum_s", "h_s"), "i32")
    sizes = dict.fromkeys(("rows", "conditions", "repeat"), "i32")
    constants = {"W": width, "RESIDUAL": residual, "WEIGHT": True, "BIAS": not rms, "MODULATED": modulated, "RMS": rms}
    constants |= {"SHARED": shared} | ({} if gated else {"gate_p": None})
    return request("norm_modulate", arch, pointers | norm(dtype) | strides | sizes | {"eps": "fp32"}, constants, 2048)


def norm_modulate_backward(width, arch, dtype, *, residual=True, rms=False, shared=False, modulated=True):
    names = ("dh_p", "dsum_p", "x_p", "gate_p", "q_p", "scale_p", "dx_p", "dq_p", "dgate_p", "dshift_p", "dscale_p")
    pointers = dict.fromkeys(names, f"*{dtype}") | {"partial_p": "*fp32"}
    strides = ("dh_s", "dsum_s", "x_s", "gate_s", "q_s", "modulation_s", "dx_s", "dq_s", "dgate_s", "dmodulation_s")
    sizes = ("rows", "conditions", "repeat", "segment", "per_program")
    constants = {
        "W": width,
        "RESIDUAL": residual,
        "WEIGHT": True,
        "BIAS": not rms,
        "MODULATED": modulated,
        "DSUM": True,
        "PER_ROW": not shared,
        "WRITE_SHIFT": False,
        "RMS": rms,
        "SHARED": shared,
    }
    signature = pointers | norm(dtype) | dict.fromkeys(strides + sizes, "i32") | {"eps": "fp32"}
    return request("norm_modulate_backward", arch, signature, constants, 1024)


def compared_norm(width, arch, dtype, teacher, *, rms=False):
    pointers = dict.fromkeys(("x_p", "gate_p", "q_p", "sum_p", "h_p"), f"*{dtype}") | {"teacher_p": f"*{teacher}"}
    pointers |= dict.fromkeys(("distance_p", "coefficients_p"), "*fp32")
    sizes = dict.fromkeys(("x_s", "q_s", "teacher_s", "rows", "length", "skip"), "i32")
    constants = {"W": width, "RMS": rms} | ({"bias_p": None} if rms else {})
    return request("compared_norm", arch, pointers | norm(dtype) | sizes | {"eps": "fp32"}, constants, 1024)


def compared_norm_backward(width, arch, dtype, teacher, *, rms=False):
    names = ("dh_p", "dsum_p", "x_p", "gate_p", "q_p", "weight_p", "dx_p", "dq_p")
    pointers = dict.fromkeys(names, f"*{dtype}") | {"teacher_p": f"*{teacher}"}
    pointers |= dict.fromkeys(("ddistance_p", "coefficients_p", "partial_p"), "*fp32")
    sizes = dict.fromkeys(("dh_s", "dsum_s", "q_s", "teacher_s", "rows", "per_program"), "i32")
    constants = {"W": width, "BIAS": not rms, "RMS": rms, "LARGEST": 3.3895313892515355e38}
    signature = pointers | sizes | dict.fromkeys(("share", "eps"), "fp32")
    return request("compared_norm_backward", arch, signature, constants, 1024)


def fold_norm(width, arch, dtype):
    pointers = dict.fromkeys(("w_p", "norm_p", "norm_bias_p", "bias_p", "folded_p"), f"*{dtype}")
    pointers |= dict.fromkeys(("sums_p", "made_p"), "*fp32")
    return request("fold_norm", arch, pointers | dict.fromkeys(("w_s", "N"), "i32"), {"W": width}, 2048)


def norm(dtype):
    return dict.fromkeys(("weight_p", "bias_p"), f"*{dtype}")


def activation(hidden, arch, dtype, *, swiglu):
    signature = dict.fromkeys(("p_p", "u_p"), f"*{dtype}") | dict.fromkeys(("p_s", "u_s", "rows"), "i32")
    return elementwise("activation", arch, signature, {"H": hidden, "SWIGLU": swiglu})


def activation_backward(hidden, arch, dtype, *, swiglu):
    signature = dict.fromkeys(("du_p", "p_p", "dp_p", "u_p"), f"*{dtype}") | {"partial_p": "*fp32"}
    signature |= dict.fromkeys(("du_s", "p_s", "dp_s", "u_s", "rows"), "i32")
    return elementwise("activation_backward", arch, signature, {"H": hidden, "SWIGLU": swiglu, "STEPS": 8})


def kernel(name):
    return f"uniflow_kernels.triton_kernels.{MODULES.get(name, 'flow_head')}:{name}_kernel"


def elementwise(name, arch, signature, constants):
    constants |= {"BM": 8, "BN": 256}
    signature |= dict.fromkeys(constants, "constexpr")
    return Request(kernel(name), signature, constants, arch)


def request(name, arch, signature, constants, elements):
    columns = 1 << (constants["W"] - 1).bit_length()
    constants |= {"BM": max(1, elements // columns), "BW": columns}
    signature |= dict.fromkeys(constants, "constexpr")
    return Request(kernel(name), signature, constants, arch, max(4, 4 * columns // elements))


@pytest.fixture(scope="module")
def compiled(oldest):
    asked = {}
    for arch in arches(oldest):
        asked["norm_modulate", arch, 1024] = norm_modulate(1024, arch, "bf16")
        asked["norm_modulate_backward", arch, 1024] = norm_modulate_backward(1024, arch, "bf16")
        asked["fold_norm", arch, 1024] = fold_norm(1024, arch, "bf16")
        asked["activation", arch, 1024] = activation(1024, arch, "bf16", swiglu=True)
        asked["activation_backward", arch, 1024] = activation_backward(1024, arch, "bf16", swiglu=True)
        # LayerScale, which all rows share
        asked["norm_modulate", arch, 1024, "shared"] = norm_modulate(1024, arch, "bf16", shared=True, modulated=False)
        asked["norm_modulate_backward", arch, 1024, "shared"] = norm_modulate_backward(
            1024, arch, "bf16", shared=True, modulated=False
        )
        asked["compared_norm", arch, 1024] = compared_norm(1024, arch, "bf16", "bf16")
        asked["compared_norm_backward", arch, 1024] = compared_norm_backward(1024, arch, "bf16", "bf16")
    # other widths and forms, in which nothing depends on the architecture
    asked["norm_modulate", 90, 1536] = norm_modulate(1536, 90, "fp32", residual=False, rms=True)
    asked["norm_modulate", 90, 1024, "shared", "modulated"] = norm_modulate(1024, 90, "bf16", shared=True)
    asked["norm_modulate", 90, 768, "no gate"] = norm_modulate(768, 90, "fp32", rms=True, modulated=False, gated=False)
    asked["norm_modulate_backward", 90, 1536] = norm_modulate_backward(1536, 90, "bf16")
    asked["norm_modulate_backward", 90, 3072] = norm_modulate_backward(3072, 90, "bf16")
    asked["norm_modulate_backward", 90, 768] = norm_modulate_backward(768, 90, "fp32", residual=False, rms=True)
    asked["compared_norm", 90, 1280] = compared_norm(1280, 90, "fp32", "bf16", rms=True)
    asked["compared_norm_backward", 90, 1280] = compared_norm_backward(1280, 90, "fp32", "bf16", rms=True)
    asked["compared_norm", 90, 3072] = compared_norm(3072, 90, "bf16", "bf16")
    asked["compared_norm_backward", 90, 3072] = compared_norm_backward(3072, 90, "bf16", "bf16")
    return dict(zip(asked, compile_all(list(asked.values()), oldest), strict=True))


def test_no_spills_and_few_registers(compiled):
    for (kernel, *at), result in compiled.items():
        assert result.spills == 0, (kernel, at)
        assert result.registers <= REGISTERS[kernel], (kernel, at, result.registers)
        assert result.shared <= 16384, (kernel, at, result.shared)


def test_few_instructions_and_loads_that_do_not_wait(compiled):
    for (kernel, *at), result in compiled.items():
        if "shared" in at:  # divisions of 32 bits, and no subroutine
            assert result.instructions <= 624, (kernel, at, result.instructions)
            continue
        assert result.instructions <= INSTRUCTIONS[kernel], (kernel, at, result.instructions)
        assert result.together >= TOGETHER.get((kernel, at[1]), 0), (kernel, at, result.together)


def test_every_access_is_of_16_bytes(compiled):
    """But for partial sums and what a row has one of, of which there are few."""
    for (kernel, *at), result in compiled.items():
        narrow = [kind for kind in result.wide if "128" not in kind]
        few = {
            "activation_backward": {"STG.E.64"},
            "fold_norm": {"LDG.E.U16", "STG.E"},
            "compared_norm": {"STG.E"},
            "compared_norm_backward": {"LDG.E"},
        }
        assert set(narrow) <= few.get(kernel, set()), (kernel, at, result.wide)
