"""Arithmetic, logic and comparisons: each instruction as a function of a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .conversions import from_bf16, to_bf16
from .operands import BOOL, SIGNED, TYPES, UNSIGNED, Step, builds, elementwise, reader, uniform, writer
from .parse import Imm, Instruction, PtxError

_SIMPLE = {"add": np.add, "sub": np.subtract, "min": np.fmin, "max": np.fmax, "neg": np.negative, "abs": np.abs}
_ALLOWED = {"rn", "lo", "f32", "f64", "ftz", "full", "approx", "NaN"}


def _check(instruction: Instruction, allowed: set[str]) -> None:
    for part in instruction.parts[1:-1]:
        if part not in allowed:
            raise PtxError(part)


@builds("add", "sub", "min", "max", "neg", "abs")
def _simple(instruction: Instruction, program: Any) -> Step:
    _check(instruction, {"rn", "NaN", "ftz"})
    kind = TYPES[instruction.parts[-1]]
    function = _SIMPLE[instruction.parts[0]]
    if instruction.parts[-1] == "bf16" and instruction.parts[0] not in ("add", "sub"):
        exact = lambda *values: to_bf16(function(*map(from_bf16, values)))  # noqa: E731
        return elementwise(instruction, program, exact, *uniform(kind, len(instruction.operands) - 1))
    if instruction.parts[-1] in ("bf16", "bf16x2", "f16x2"):
        raise PtxError(instruction.op)
    if "NaN" in instruction.parts:
        function = {"min": np.minimum, "max": np.maximum}[instruction.parts[0]]
    return elementwise(instruction, program, function, *uniform(kind, len(instruction.operands) - 1))


def _double(function: Callable) -> Callable:
    """In float64, rounded once more."""
    return lambda *values: function(*[value.astype(np.float64) for value in values]).astype(np.float32)


def _fma_of_bf16(*bits: np.ndarray) -> np.ndarray:
    """In float64, which holds the product and mostly the sum, rounded once, to eight bits."""
    a, b, c = (from_bf16(each).astype(np.float64) for each in bits)
    exact = a * b + c
    quantum = np.ldexp(1.0, np.maximum(np.frexp(exact)[1], -125) - 8)
    return to_bf16((np.rint(exact / quantum) * quantum).astype(np.float32))


def _wide(kind: np.dtype) -> np.dtype:
    return (SIGNED if kind.kind == "i" else UNSIGNED)[2 * kind.itemsize]


def _high(kind: np.dtype) -> Callable:
    wide, bits = _wide(kind), 8 * kind.itemsize
    return lambda a, b: ((np.asarray(a).astype(wide) * np.asarray(b).astype(wide)) >> wide.type(bits)).astype(kind)


def _product_wide(kind: np.dtype) -> Callable:
    wide = _wide(kind)
    return lambda a, b: np.asarray(a).astype(wide) * np.asarray(b).astype(wide)


@builds("mul")
def _mul(instruction: Instruction, program: Any) -> Step:
    kind, how = TYPES[instruction.parts[-1]], instruction.parts[1]
    if how == "wide":
        return elementwise(instruction, program, _product_wide(kind), [kind] * 2, _wide(kind))
    if how == "hi":
        if kind.itemsize == 8:
            raise PtxError("mul.hi of 64 bits")
        return elementwise(instruction, program, _high(kind), [kind] * 2, kind)
    _check(instruction, {"lo", "rn", "ftz"})
    if instruction.parts[-1] in ("bf16x2", "f16x2"):
        raise PtxError(instruction.op)
    if instruction.parts[-1] == "bf16":  # whose products float32 holds
        exact = lambda a, b: to_bf16(from_bf16(a) * from_bf16(b))  # noqa: E731
        return elementwise(instruction, program, exact, *uniform(kind, 2))
    return elementwise(instruction, program, np.multiply, *uniform(kind, 2))


@builds("mad")
def _mad(instruction: Instruction, program: Any) -> Step:
    kind, how = TYPES[instruction.parts[-1]], instruction.parts[1]
    if how == "wide":
        product = _product_wide(kind)
        return elementwise(
            instruction, program, lambda a, b, c: product(a, b) + c, [kind, kind, _wide(kind)], _wide(kind)
        )
    if how != "lo":
        raise PtxError(how)
    return elementwise(instruction, program, lambda a, b, c: a * b + c, *uniform(kind, 3))


@builds("fma")
def _fma(instruction: Instruction, program: Any) -> Step:
    if instruction.op == "fma.rn.bf16":
        return elementwise(instruction, program, _fma_of_bf16, *uniform(TYPES["bf16"], 3))
    if instruction.op not in ("fma.rn.f32", "fma.rn.ftz.f32"):
        raise PtxError(instruction.op)
    return elementwise(instruction, program, _double(lambda a, b, c: a * b + c), *uniform(TYPES["f32"], 3))


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; what a division by zero gives is not defined."""
    b = np.where(b == 0, b.dtype.type(1), b)
    if b.dtype.kind == "u":
        return a // b
    return (a - np.fmod(a, b)) // b


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmod(a, np.where(b == 0, b.dtype.type(1), b))


@builds("div", "rem")
def _div(instruction: Instruction, program: Any) -> Step:
    kind = TYPES[instruction.parts[-1]]
    if instruction.parts[0] == "rem":
        return elementwise(instruction, program, _remainder, *uniform(kind, 2))
    _check(instruction, {"full", "approx", "rn", "ftz"})
    if kind != TYPES["f32"] or "rn" in instruction.parts:
        return elementwise(instruction, program, np.divide if kind.kind == "f" else _quotient, *uniform(kind, 2))
    to, *sources = instruction.operands
    put, gets = writer(to, kind), [reader(source, kind, program) for source in sources]

    def step(m: Any) -> None:
        above, below = (np.broadcast_to(get(m), m.n).astype(np.float64) for get in gets)
        put(m, approximated(above / below, "div", m.options.inexact))

    return step


_FUNCTIONS = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip
# how far off the approximate forms may be, by the PTX manual: relative; lg2, sin and cos absolute
_RELATIVE = {"ex2": 2**-22, "rcp": 2**-23, "sqrt": 2**-23, "rsqrt": 2**-22.9, "tanh": 2**-11, "div": 2**-22}
_ABSOLUTE = {"lg2": 2**-22, "sin": 2**-20.5, "cos": 2**-20.5}


def approximated(exact: np.ndarray, head: str, inexact: bool) -> np.ndarray:
    """float64 to float32: correctly rounded, or as far off as `head` may be, upwards or downwards by its bits."""
    if not inexact:
        return exact.astype(np.float32)
    bits = exact.astype(np.float32).view(np.uint32)
    sign = 1.0 - 2.0 * ((bits * np.uint32(0x9E3779B1)) >> np.uint32(31))
    return (exact * (1 + sign * _RELATIVE.get(head, 0)) + sign * _ABSOLUTE.get(head, 0)).astype(np.float32)


@builds(*_FUNCTIONS)
def _function(instruction: Instruction, program: Any) -> Step:
    _check(instruction, {"approx", "ftz", "rn"})
    if instruction.parts[-1] != "f32":
        raise PtxError(instruction.op)
    head, approximate = instruction.parts[0], "approx" in instruction.parts
    get, put = reader(instruction.operands[1], TYPES["f32"], program), writer(instruction.operands[0], TYPES["f32"])

    def step(m: Any) -> None:
        exact = _FUNCTIONS[head](np.broadcast_to(get(m), m.n).astype(np.float64))
        put(m, approximated(exact, head, approximate and m.options.inexact))

    return step


@builds("and", "or", "xor", "not", "cnot")
def _logic(instruction: Instruction, program: Any) -> Step:
    kind = BOOL if instruction.parts[1] == "pred" else TYPES[instruction.parts[1]]
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not}[
        instruction.parts[0]
    ]
    return elementwise(instruction, program, function, *uniform(kind, len(instruction.operands) - 1))


@builds("lop3")
def _lop3(instruction: Instruction, program: Any) -> Step:
    *operands, table = instruction.operands
    kind = TYPES[instruction.parts[1]]

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.zeros_like(a | b | c)
        for case in range(8):
            if table.value >> case & 1:
                result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
        return result

    trimmed = Instruction(instruction.op, instruction.parts, tuple(operands), None, False, "", "")
    return elementwise(trimmed, program, function, *uniform(kind, 3))


@builds("shl", "shr")
def _shift(instruction: Instruction, program: Any) -> Step:
    kind = TYPES[instruction.parts[1]]
    bits, left = 8 * kind.itemsize, instruction.parts[0] == "shl"
    shift = np.left_shift if left else np.right_shift

    def function(a: np.ndarray, by: np.ndarray) -> np.ndarray:
        inside = np.minimum(by, np.uint32(bits - 1)).astype(kind)
        result = shift(a, inside)
        if left or kind.kind == "u":
            return np.where(by >= bits, kind.type(0), result)
        return result

    amount = instruction.operands[2]
    if isinstance(amount, Imm) and amount.value < bits:
        by = kind.type(amount.value)
        one = Instruction(instruction.op, instruction.parts, instruction.operands[:2], None, False, "", "")
        return elementwise(one, program, lambda a: shift(a, by), *uniform(kind, 1))
    return elementwise(instruction, program, function, [kind, TYPES["u32"]], kind)


@builds("shf")
def _funnel(instruction: Instruction, program: Any) -> Step:
    _, way, mode, _ = instruction.parts
    if mode != "wrap":
        raise PtxError(mode)

    def function(low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        by = np.asarray(by & np.uint32(31)).astype(np.uint64)
        return ((both << by) >> np.uint64(32) if way == "l" else both >> by).astype(np.uint32)

    return elementwise(instruction, program, function, *uniform(TYPES["u32"], 3))


@builds("bfe")
def _bfe(instruction: Instruction, program: Any) -> Step:
    kind = TYPES[instruction.parts[1]]
    _, _, start, length = instruction.operands
    if not (isinstance(start, Imm) and isinstance(length, Imm)) or kind.itemsize != 4 or not length.value:
        raise PtxError("bfe")
    up = kind.type(max(0, 32 - start.value - length.value))
    down = kind.type(min(31, 32 - length.value))
    one = Instruction(instruction.op, instruction.parts, instruction.operands[:2], None, False, "", "")
    return elementwise(one, program, lambda a: (a << up) >> down, *uniform(kind, 1))


@builds("prmt")
def _prmt(instruction: Instruction, program: Any) -> Step:
    selector = instruction.operands[3]
    if instruction.op != "prmt.b32" or not isinstance(selector, Imm):
        raise PtxError("prmt")

    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        both = (np.asarray(b).astype(np.uint64) << np.uint64(32)) | np.asarray(a).astype(np.uint64)
        result = np.uint32(0)
        for place in range(4):
            pick = selector.value >> 4 * place & 15
            byte = (both >> np.uint64(8 * (pick & 7))) & np.uint64(0xFF)
            if pick & 8:
                byte = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            result = result | (byte.astype(np.uint32) << np.uint32(8 * place))
        return result

    two = Instruction(instruction.op, instruction.parts, instruction.operands[:3], None, False, "", "")
    return elementwise(two, program, function, *uniform(TYPES["u32"], 2))


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "neu": np.not_equal,
}  # fmt: skip
_UNORDERED = {"equ": "ne", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}  # the opposites of ordered ones


@builds("setp")
def _setp(instruction: Instruction, program: Any) -> Step:
    how, kind = instruction.parts[1], TYPES[instruction.parts[-1]]
    if len(instruction.parts) > 3 and instruction.parts[2] != "ftz":
        raise PtxError("setp with a predicate")
    if kind.kind == "f" and how == "ne":
        function = lambda a, b: (a < b) | (a > b)  # noqa: E731
    elif how in _UNORDERED:
        opposite = _COMPARE[_UNORDERED[how]]
        function = (
            (lambda a, b: (a == b) | np.isnan(a) | np.isnan(b)) if how == "equ" else (lambda a, b: ~opposite(a, b))
        )
    else:
        function = _COMPARE[how]
    return elementwise(instruction, program, function, [kind] * 2, BOOL)


@builds("selp")
def _selp(instruction: Instruction, program: Any) -> Step:
    kind = UNSIGNED[TYPES[instruction.parts[1]].itemsize]
    return elementwise(instruction, program, lambda a, b, p: np.where(p, a, b), [kind, kind, BOOL], kind)
