"""Each instruction as a function of a machine. What is not there is refused by name."""

from __future__ import annotations

from typing import Any

from . import accesses, arithmetic, asynchronous, conversions, matrix, mbarriers, products  # noqa: F401
from .operands import BUILDERS, Step
from .parse import Instruction, PtxError


def build(instruction: Instruction, program: Any) -> Step | None:
    """The function of an instruction, under its guard."""
    head = instruction.parts[0]
    if head in ("bra", "ret", "exit"):
        return None
    if head in ("bar", "barrier"):
        if len(instruction.operands) != 1 or instruction.op not in ("bar.sync", "barrier.sync"):
            raise PtxError(f"barrier of some threads: {instruction}")
        return None
    if head not in BUILDERS:
        raise PtxError(f"unknown instruction: {instruction}")
    try:
        step = BUILDERS[head](instruction, program)
    except (PtxError, KeyError) as error:
        raise PtxError(f"unknown form: {instruction} ({error})") from error
    return step if instruction.guard is None else _guarded(step, instruction.guard.index, instruction.negated)


def _guarded(step: Step, guard: int, negated: bool) -> Step:
    def guarded(m: Any) -> None:
        value = m.regs[guard]
        wanted = ~value if negated else value
        outer = m.mask
        wanted = wanted if outer is None else wanted & outer
        if not wanted.any():
            return
        m.mask = None if outer is None and wanted.all() else wanted
        step(m)
        m.mask = outer

    return guarded
