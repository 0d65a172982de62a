"""How instructions read and write their operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .memory import PIECES, Allocation
from .parse import Imm, Instruction, Mem, Not, PtxError, Reg, Sym

Step = Callable[[Any], None]
TYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
TYPES = {name: np.dtype(kind) for name, kind in TYPES.items()}
BOOL = np.dtype(bool)
SIGNED = {1: np.dtype(np.int8), 2: np.dtype(np.int16), 4: np.dtype(np.int32), 8: np.dtype(np.int64)}
UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
PARAM_WINDOW = 0x7F00_0000_0000_0000  # generic addresses of parameters


def dtype_of(reg: Reg) -> np.dtype:
    return BOOL if reg.type == "pred" else UNSIGNED[TYPES[reg.type].itemsize]


def unit_type(width: int) -> np.dtype:
    return np.dtype(PIECES[width])


def unit_view(allocation: Allocation, width: int) -> np.ndarray:
    """An allocation as units of some bytes."""
    return allocation.data[: allocation.size // width * width].view(PIECES[width])


def constant(imm: Imm, dtype: np.dtype) -> np.generic:
    """A number as a scalar of a type."""
    if imm.width:
        bits = np.array([imm.value], UNSIGNED[imm.width]).view(np.float32 if imm.width == 4 else np.float64)
        if dtype.kind == "f":
            return bits.astype(dtype)[0]
        return bits.view(UNSIGNED[imm.width]).view(dtype)[0]
    if dtype.kind == "f":
        return np.array([imm.value], dtype)[0]
    if dtype == BOOL:
        return np.bool_(imm.value != 0)
    return np.array([imm.value & ((1 << 8 * dtype.itemsize) - 1)], UNSIGNED[dtype.itemsize]).view(dtype)[0]


def undefined(m: Any, dtype: np.dtype) -> np.ndarray:
    """What a register holds that was never written (LLVM leaves halves of a pair undefined): NaN, or -1."""
    return np.ones(m.n, bool) if dtype == BOOL else np.full(m.n, -1, SIGNED[dtype.itemsize]).view(dtype)


def reader(operand: object, dtype: np.dtype, program: Any) -> Callable[[Any], Any]:
    """A function that gives an operand's value in a type; a wider register gives its lower part."""
    if isinstance(operand, Imm):
        value = constant(operand, dtype)
        return lambda m: value
    if isinstance(operand, Not):
        inner = reader(operand.reg, dtype, program)
        return lambda m: ~inner(m)
    if isinstance(operand, Sym):
        return _symbol(operand.name, dtype, program)
    if not isinstance(operand, Reg):
        raise PtxError(f"operand {operand}")
    index, own = operand.index, dtype_of(operand)

    if own.itemsize == dtype.itemsize:

        def same(m: Any) -> np.ndarray:
            value = m.regs[index]
            if value is None:
                value = undefined(m, own)
            return value if value.dtype is dtype else value.view(dtype)

        return same
    if own.itemsize < dtype.itemsize:
        raise PtxError(f"{operand.name} is narrower than {dtype}")

    def lower(m: Any) -> np.ndarray:
        value = undefined(m, own) if m.regs[index] is None else m.regs[index]
        return value.view(own).astype(UNSIGNED[dtype.itemsize]).view(dtype)

    return lower


def _symbol(name: str, dtype: np.dtype, program: Any) -> Callable[[Any], Any]:
    if name.startswith("%"):

        def special(m: Any) -> Any:
            if name not in m.special:
                raise PtxError(f"special register {name}")
            return np.asarray(m.special[name]).astype(dtype)

        return special
    if name in program.shared_at:
        value = dtype.type(program.shared_at[name])
    elif name in program.kernel.params:
        value = dtype.type(program.kernel.params[name].offset)
    else:
        raise PtxError(f"symbol {name}")
    return lambda m: value


def writer(operand: object, dtype: np.dtype) -> Callable[[Any, Any], None]:
    """A function that sets a register from values of a type, extended by their sign where it is wider."""
    if operand is None:
        return lambda m, value: None
    if not isinstance(operand, Reg):
        raise PtxError(f"destination {operand}")
    index, own = operand.index, dtype_of(operand)
    if own.itemsize == dtype.itemsize or own == BOOL:
        return lambda m, value: m.write(index, value)
    if own.itemsize < dtype.itemsize:
        raise PtxError(f"{operand.name} is narrower than {dtype}")
    wide = (SIGNED if dtype.kind == "i" else UNSIGNED)[own.itemsize]
    return lambda m, value: m.write(index, value.astype(wide))


BUILDERS: dict[str, Callable[[Instruction, Any], Step]] = {}


def builds(*heads: str) -> Callable:
    def keep(function: Callable) -> Callable:
        BUILDERS.update(dict.fromkeys(heads, function))
        return function

    return keep


def address_of(mem: Mem, program: Any, dtype: np.dtype) -> Callable[[Any, np.ndarray], np.ndarray]:
    """The addresses of some threads."""
    base = mem.base
    if isinstance(base, Reg) and dtype_of(base).itemsize < dtype.itemsize:
        narrow = reader(base, dtype_of(base), program)
        get = lambda m: narrow(m).astype(dtype)  # noqa: E731
    else:
        get = reader(base, dtype, program)
    offset = constant(Imm(mem.offset), dtype)

    def addresses(m: Any, threads: np.ndarray) -> np.ndarray:
        value = get(m)
        value = (
            np.full(len(threads), value) if np.ndim(value) == 0 else value if len(threads) == m.n else value[threads]
        )
        return value + offset if mem.offset else value

    return addresses


def count_access(m: Any, kind: str, address: np.ndarray, threads: np.ndarray, width: int, shared: bool = False) -> None:
    if not m.options.counters:
        return
    if len(threads) == m.n:
        every, active = address, np.ones(m.n, bool)
    else:
        every, active = np.zeros(m.n, address.dtype), np.zeros(m.n, bool)
        every[threads], active[threads] = address, True
    (m.counters.add_shared if shared else m.counters.add_global)(kind, every, active, width)


def elementwise(
    instruction: Instruction, program: Any, function: Callable, dtypes: list[np.dtype], result: np.dtype
) -> Step:
    destination, *sources = instruction.operands
    put = writer(destination, result)
    gets = [reader(source, dtype, program) for source, dtype in zip(sources, dtypes, strict=True)]
    if len(gets) == 1:
        (one,) = gets
        return lambda m: put(m, function(one(m)))
    if len(gets) == 2:
        first, second = gets
        return lambda m: put(m, function(first(m), second(m)))
    return lambda m: put(m, function(*[get(m) for get in gets]))


def uniform(kind: np.dtype, count: int) -> tuple[list[np.dtype], np.dtype]:
    return [kind] * count, kind
