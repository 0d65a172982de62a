"""The row kernels of values with their tangents, compiled for GPUs that are not there."""

import pytest

from tests.compile.compiling import Request, arches, compile_all

# per thread; no more than these were needed when the kernels were written
REGISTERS = {"dual_norm": 80, "dual_norm_backward": 160, "dual_activation": 48, "dual_activation_backward": 80}
# loads with no reduction between them
TOGETHER = {"dual_norm": 8, "dual_norm_backward": 6}
PAIRS = ("x", "gate", "q", "shift", "scale", "sum", "h")
GRADIENTS = ("dh", "dsum", "x", "gate", "q", "scale", "dx", "dgate", "dq", "dscale")


def pairs(names, dtype):
    return dict.fromkeys([f"{name}{tangent}_p" for name in names for tangent in ("", "t")], f"*{dtype}")


def norm(width, arch, dtype, *, backward=False, plain=False):
    """`plain`: of RMS form, without residual, modulation and biases."""
    vectors = ["weight", "bias", "gate_bias", "q_bias", "scale_bias", *([] if backward else ["shift_bias"])]
    signature = pairs(GRADIENTS if backward else PAIRS, dtype)
    signature |= dict.fromkeys(("x_s", "gate_s", "q_s", "modulation_s", "rows"), "i32") | {"eps": "fp32"}
    constants = {"W": width, "RESIDUAL": not plain, "MODULATED": not plain, "RMS": plain}
    for name in vectors:
        if plain:
            constants[f"{name}_p"] = None
        else:
            signature[f"{name}_p"] = f"*{dtype}"
    if backward:
        signature |= {"partial_p": "*fp32", "per_program": "i32"}
        constants |= {"DSUM": not plain, "BIASES": not plain}
    elements, columns = 512 if backward else 1024, 1 << (width - 1).bit_length()
    constants |= {"BM": max(1, elements // columns), "BW": columns}
    name = f"dual_norm{'_backward' if backward else ''}"
    return request("dual_norm", name, arch, signature, constants, max(4, 4 * columns // elements))


def activation(hidden, arch, dtype, *, backward=False, swiglu=True):
    signature = pairs(("du", "p", "dp") if backward else ("p", "u"), dtype) | {"bias_p": f"*{dtype}"}
    signature |= dict.fromkeys(("p_s", "rows"), "i32") | ({"partial_p": "*fp32"} if backward else {})
    constants = {"H": hidden, "SWIGLU": swiglu, "BM": 2 if backward else 4, "BN": 256} | (
        {"STEPS": 8} if backward else {}
    )
    name = f"dual_activation{'_backward' if backward else ''}"
    return request("dual_activation", name, arch, signature, constants, 4)


def request(module, name, arch, signature, constants, warps):
    signature |= dict.fromkeys(constants, "constexpr")
    return Request(f"uniflow_kernels.triton_kernels.{module}:{name}_kernel", signature, constants, arch, warps)


@pytest.fixture(scope="module")
def compiled(oldest):
    asked = {}
    for arch in arches(oldest):
        for backward in (False, True):
            end = "_backward" if backward else ""
            asked[f"dual_norm{end}", arch, 1024] = norm(1024, arch, "bf16", backward=backward)
            asked[f"dual_activation{end}", arch, 1024] = activation(1024, arch, "bf16", backward=backward)
    # other widths and forms, in which nothing depends on the architecture
    for backward in (False, True):
        end = "_backward" if backward else ""
        asked[f"dual_norm{end}", 90, 2048] = norm(2048, 90, "bf16", backward=backward)
        asked[f"dual_norm{end}", 90, 768, "fp32"] = norm(768, 90, "fp32", backward=backward)
        asked[f"dual_norm{end}", 90, 512, "plain"] = norm(512, 90, "fp32", backward=backward, plain=True)
        asked[f"dual_activation{end}", 90, 512, "fp32"] = activation(512, 90, "fp32", backward=backward, swiglu=False)
    return dict(zip(asked, compile_all(list(asked.values()), oldest), strict=True))


def test_no_spills_and_few_registers(compiled):
    for (kernel, *at), result in compiled.items():
        assert result.spills == 0, (kernel, at)
        assert result.registers <= REGISTERS[kernel], (kernel, at, result.registers)
        assert result.shared <= 16384, (kernel, at, result.shared)


def test_loads_that_do_not_wait(compiled):
    for (kernel, *at), result in compiled.items():
        if at[1:] == [1024]:
            assert result.together >= TOGETHER.get(kernel, 0), (kernel, at, result.together)


def test_accesses_are_wide(compiled):
    """Four elements a thread in the backward passes, eight in the others; of sums there are few."""
    for (kernel, *at), result in compiled.items():
        narrow = [
            kind for kind in result.wide if "128" not in kind and not (kind.endswith("64") and "backward" in kernel)
        ]
        assert not narrow, (kernel, at, result.wide)
