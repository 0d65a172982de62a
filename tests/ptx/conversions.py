"""Conversions of types with their rounding, and moves between registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .operands import BOOL, PARAM_WINDOW, TYPES, UNSIGNED, Step, builds, elementwise, reader, writer
from .parse import Instruction, PtxError, Vec


def to_bf16(value: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16's bits, ties to even; NaN is 0x7FFF."""
    value = np.asarray(value, np.float32)
    bits = value.view(np.uint32)
    return np.where(np.isnan(value), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(value: np.ndarray) -> np.ndarray:
    return np.asarray(value).astype(np.float16).view(np.uint16)


def to_e4m3(value: np.ndarray) -> np.ndarray:
    """float32 to the nearest float8_e4m3fn's bits, ties to even, 448 at most; NaN is 0x7F."""
    value = np.asarray(value, np.float32)
    size = np.minimum(np.abs(np.where(np.isnan(value), 0, value)), np.float32(448))
    exponent = np.maximum(np.frexp(size)[1] - 1, -6)  # of the leading bit; below it numbers are multiples of 2^-9
    eighths = np.rint(np.ldexp(size, 3 - exponent)).astype(np.int64)  # 8 to 16 of a normal number
    # a carry into 16 is the next exponent's 8, and into 8 the least normal number
    bits = np.where(eighths < 8, eighths, ((exponent + 7) << 3) + eighths - 8)
    sign = np.signbit(value).astype(np.int64) << 7
    return np.where(np.isnan(value), 0x7F, bits | sign).astype(np.uint8)


def _to_integer(kind: np.dtype, rounding: Callable) -> Callable:
    low, high = np.iinfo(kind).min, np.iinfo(kind).max

    def function(value: np.ndarray) -> np.ndarray:
        whole = rounding(value.astype(np.float64))
        inside = np.clip(np.where(np.isnan(whole), 0, whole), float(low), float(high))
        result = inside.astype(kind)
        return np.where(inside >= float(high), kind.type(high), result)

    return function


_ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@builds("cvt")
def _cvt(instruction: Instruction, program: Any) -> Step:
    *modes, to, source = instruction.parts[1:]
    modes = [mode for mode in modes if mode not in ("ftz", "sat")]
    if "sat" in instruction.parts:
        raise PtxError("cvt.sat")
    narrow = {"bf16": to_bf16, "f16": to_f16}
    if to in ("bf16x2", "f16x2") and source == "f32" and modes == ["rn"]:
        half = narrow[to[:-2]]
        pack = lambda high, low: (half(high).astype(np.uint32) << np.uint32(16)) | half(low)  # noqa: E731
        return elementwise(instruction, program, pack, [TYPES["f32"]] * 2, TYPES["u32"])
    if to == "e4m3x2" and source == "f32" and modes == ["rn", "satfinite"]:
        pack = lambda high, low: (to_e4m3(high).astype(np.uint16) << np.uint16(8)) | to_e4m3(low)  # noqa: E731
        return elementwise(instruction, program, pack, [TYPES["f32"]] * 2, TYPES["u16"])
    if to in narrow and source == "f32" and modes == ["rn"]:
        return elementwise(instruction, program, narrow[to], [TYPES["f32"]], TYPES["u16"])
    if to == "f32" and source == "bf16":
        return elementwise(instruction, program, from_bf16, [TYPES["u16"]], TYPES["f32"])
    if to == "f32" and source == "f16":
        return elementwise(instruction, program, lambda x: x.astype(np.float32), [TYPES["f16"]], TYPES["f32"])
    kind, origin = TYPES[to], TYPES[source]
    if kind.kind in "iu" and origin.kind in "iu" and not modes:
        return elementwise(instruction, program, lambda x: np.asarray(x).astype(kind), [origin], kind)
    if kind.kind == "f" and origin.kind in "iu" and modes == ["rn"] and to == "f32":
        return elementwise(instruction, program, lambda x: x.astype(np.float32), [origin], kind)
    if kind.kind in "iu" and source == "f32" and len(modes) == 1 and modes[0] in _ROUND:
        return elementwise(instruction, program, _to_integer(kind, _ROUND[modes[0]]), [origin], kind)
    raise PtxError(instruction.op)


@builds("cvta")
def _cvta(instruction: Instruction, program: Any) -> Step:
    kind = TYPES["u64"]
    if instruction.parts[1:3] == ("to", "global") or instruction.parts[1] == "global":
        return elementwise(instruction, program, lambda x: x, [kind], kind)
    if instruction.parts[1] == "param":
        return elementwise(instruction, program, lambda x: x + np.uint64(PARAM_WINDOW), [kind], kind)
    raise PtxError(instruction.op)


# --- moves


@builds("mov")
def _mov(instruction: Instruction, program: Any) -> Step:
    to, source = instruction.operands
    kind = BOOL if instruction.parts[1] == "pred" else UNSIGNED[TYPES[instruction.parts[1]].itemsize]
    if isinstance(to, Vec):
        part = UNSIGNED[kind.itemsize // len(to.items)]
        get = reader(source, kind, program)
        puts = [(place, writer(item, part)) for place, item in enumerate(to.items) if item is not None]

        def unpack(m: Any) -> None:
            value = get(m)
            for place, put in puts:
                put(m, (value >> kind.type(8 * part.itemsize * place)).astype(part))

        return unpack
    put = writer(to, kind)
    if isinstance(source, Vec):
        part = UNSIGNED[kind.itemsize // len(source.items)]
        gets = [reader(item, part, program) for item in source.items]

        def pack(m: Any) -> None:
            value = kind.type(0)
            for place, get in enumerate(gets):
                value = value | (np.asarray(get(m)).astype(kind) << kind.type(8 * part.itemsize * place))
            put(m, value)

        return pack
    get = reader(source, kind, program)
    return lambda m: put(m, get(m))
