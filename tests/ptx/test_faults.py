"""Faults planted in copies of the project's compiled kernels, one at every place of a kind: each must be found.

Two kinds of copies are not wrong. A mask that ends elsewhere may be the same for every thread. And of barriers with
nothing between them one is enough: one that nobody misses stays out when the next is taken out, until one is missed.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.ptx import launch, operands
from tests.ptx.launch import emulated
from tests.ptx.machine import Options, Program
from tests.ptx.parse import Imm, Mem, Reg
from uniflow_kernels.triton_kernels import flow_head, flow_products, patches

operands.BUILDERS["nop"] = lambda instruction, program: lambda m: None
WIDTH, HIDDEN, ROWS = 144, 272, 70
DEEP = 400  # more tiles than a pipeline has stages


def norm(dtype=torch.bfloat16):
    x, shift, scale, weight, bias = torch.randn(5, ROWS, WIDTH).to(dtype)
    h = torch.full_like(x, torch.nan)
    which = flow_head.Rows(ROWS, ROWS, 1)
    flow_head.norm_modulate(x, None, (weight[0], bias[0]), (shift, scale), None, h, which, False, 1e-6)
    return h


def up():
    h, weight = torch.randn(ROWS, DEEP).bfloat16(), torch.randn(HIDDEN, DEEP).bfloat16() / 20
    u = torch.full((ROWS, HIDDEN), torch.nan).bfloat16()
    flow_products.up(h, (weight, None), u, None)
    return u


def cut():
    """Rows of 125 values, which are stored one by one."""
    images, rows = torch.randn(1, 5, 20, 20).bfloat16(), torch.full((1, 16, 125), torch.nan).bfloat16()
    patches.patchify(images, rows, 5)
    return rows


def without(instruction):
    instruction.op, instruction.parts, instruction.operands, instruction.guard = "nop", ("nop",), (), None


def with_number(place, change):
    def apply(instruction):
        given = list(instruction.operands)
        given[place] = Imm(change(given[place].value), given[place].width)
        instruction.operands = tuple(given)

    return apply


def moved(instruction):
    place = next(i for i, operand in enumerate(instruction.operands) if isinstance(operand, Mem))
    given = list(instruction.operands)
    given[place] = replace(given[place], offset=given[place].offset + 2)
    instruction.operands = tuple(given)


def compares(*numbers):
    return lambda i: i.op.startswith("setp.") and isinstance(i.operands[2], Imm) and i.operands[2].value in numbers


def starts(*heads):
    return lambda i: i.op.startswith(heads)


def exchanges(i):
    return i.op == "xor.b32" and isinstance(i.operands[2], Imm) and i.operands[2].value in (16, 32, 64)


def describes(i):
    """The constant part of a matrix descriptor, whose upper two bits are the swizzle."""
    return (
        i.op in ("or.b64", "add.s64")
        and isinstance(i.operands[2], Imm)
        and (i.operands[2].value & 2**64 - 1) >> 62 in (1, 2)
    )


# name: the call, which instructions, what becomes of each, and for which architectures
FAULTS = {
    "barrier out of a row's sum": (norm, starts("bar.sync"), without, (80, 90)),
    "barrier out of a product": (up, starts("bar.sync"), without, (90,)),
    "mask of columns": (norm, compares(WIDTH), with_number(2, lambda n: n + 1), (80, 90)),
    "mask of a product's columns": (up, compares(HIDDEN), with_number(2, lambda n: n + 8), (80,)),
    "load two bytes on": (norm, starts("ld.global"), moved, (80, 90)),
    "store two bytes on": (cut, starts("st.global"), moved, (80, 90)),
    "one group short": (up, starts("cp.async.wait_group"), with_number(0, lambda n: n + 1), (80,)),
    "one product short": (up, starts("wgmma.wait_group"), with_number(0, lambda n: n + 1), (90,)),
    "another swizzle": (up, exchanges, with_number(2, lambda n: 2 * n), (80,)),
    "another swizzle in a descriptor": (up, describes, with_number(2, lambda n: n ^ 3 << 62), (90,)),
}


def outcome(call, arch):
    """What a call gives, and what was found."""
    torch.manual_seed(0)
    with emulated(arch, Options(races=True, counters=False)) as seen:
        try:
            result = call()
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"
    return result.float(), "; ".join(finding.kind for finding in seen.findings.values())


def watched(program, place, masks):
    """A program that keeps what a comparison gives."""
    instruction, step = program.kernel.instructions[place], program.steps[place]
    if instruction.op.startswith("setp."):
        to = instruction.operands[0]
        assert isinstance(to, Reg)

        def kept(m):
            step(m)
            masks.append(m.regs[to.index])

        program.steps[place] = kept
    return program


@pytest.mark.parametrize(("name", "arch"), [(name, arch) for name, fault in FAULTS.items() for arch in fault[3]])
def test_is_found(request, name, arch):
    if arch != int(request.config.getoption("--emulate")):
        pytest.skip("another session's architecture")
    call, chosen, change, _ = FAULTS[name]
    used = []
    plain = launch.KernelLauncher.__call__

    def noted(self, *args):
        used.append(self)
        return plain(self, *args)

    launch.KernelLauncher.__call__ = noted
    try:
        expected, found = outcome(call, arch)
    finally:
        launch.KernelLauncher.__call__ = plain
    assert not found
    launcher = used[-1]
    whole = launcher.program
    places = [place for place, instruction in enumerate(whole.kernel.instructions) if chosen(instruction)]
    assert places, "no such instruction"
    missed, out = [], []
    try:
        for place in places:
            kernel = copy.copy(whole.kernel)
            kernel.instructions = [copy.copy(instruction) for instruction in kernel.instructions]
            for changed in [*out, place]:
                change(kernel.instructions[changed])
            masks = []
            launcher.program = watched(Program(kernel, launcher.metadata.shared), place, masks)
            result, found = outcome(call, arch)
            if found or not torch.allclose(result, expected, rtol=2**-6, atol=2**-6):
                continue
            if change is without:
                out.append(place)
                continue
            launcher.program = watched(Program(whole.kernel, launcher.metadata.shared), place, right := [])
            outcome(call, arch)
            if not masks or any(not np.array_equal(*pair) for pair in zip(masks, right, strict=True)):
                missed.append(str(whole.kernel.instructions[place]))
    finally:
        launcher.program = whole
    assert not missed
    assert len(out) < len(places)
