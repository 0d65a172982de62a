"""ldmatrix, stmatrix, and products of tensor cores: mma.sync at once, wgmma as `asynchronous` completes it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .operands import TYPES, Step, address_of, builds, count_access, reader, writer
from .parse import Instruction, PtxError


def floats(bits: np.ndarray, kind: str) -> np.ndarray:
    """16-bit patterns as float32."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    raise PtxError(f"operands of {kind}")


def _rows(m: Any, warps: np.ndarray, matrices: int) -> np.ndarray:
    """Threads [warps, 8 * matrices] that give the addresses of the rows."""
    return warps[:, None] * 32 + np.arange(8 * matrices)


@builds("ldmatrix")
def _ldmatrix(instruction: Instruction, program: Any) -> Step:
    match = re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(::cta)?\.b16", instruction.op)
    if not match:
        raise PtxError(instruction.op)
    matrices, turned = int(match[1]), bool(match[2])
    to, mem = instruction.operands
    puts = [writer(item, TYPES["u32"]) for item in to.items]
    addresses = address_of(mem, program, TYPES["u32"])

    def step(m: Any) -> None:
        warps = m.active_warps()
        threads = _rows(m, warps, matrices).ravel()
        address = addresses(m, np.arange(m.n))[threads]
        count_access(m, "shared ldmatrix", address, threads, 16, True)
        rows = m.read_shared(threads, address, 16).view(np.uint16).reshape(len(warps), matrices, 8, 8)
        if turned:
            rows = np.ascontiguousarray(rows.transpose(0, 1, 3, 2))
        pairs = rows.view(np.uint32).reshape(len(warps), matrices, 32)
        for number, put in enumerate(puts):
            values = np.zeros((m.warps, 32), np.uint32)
            values[warps] = pairs[:, number]
            put(m, values.ravel())

    return step


@builds("stmatrix")
def _stmatrix(instruction: Instruction, program: Any) -> Step:
    match = re.fullmatch(r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(::cta)?\.b16", instruction.op)
    if not match:
        raise PtxError(instruction.op)
    matrices, turned = int(match[1]), bool(match[2])
    mem, source = instruction.operands
    gets = [reader(item, TYPES["u32"], program) for item in source.items]
    addresses = address_of(mem, program, TYPES["u32"])

    def step(m: Any) -> None:
        warps = m.active_warps()
        threads = _rows(m, warps, matrices).ravel()
        address = addresses(m, np.arange(m.n))[threads]
        count_access(m, "shared stmatrix", address, threads, 16, True)
        pairs = np.stack([np.broadcast_to(get(m), m.n).reshape(-1, 32)[warps] for get in gets], 1)
        rows = np.ascontiguousarray(pairs).view(np.uint16).reshape(len(warps), matrices, 8, 8)
        if turned:
            rows = np.ascontiguousarray(rows.transpose(0, 1, 3, 2))
        m.write_shared(threads, address, rows.reshape(-1, 8).view(np.complex128)[:, 0], 16)

    return step


def warp_registers(m: Any, gets: list, warps: np.ndarray) -> np.ndarray:
    """Registers [R, warps, 32]."""
    return np.stack([np.broadcast_to(get(m), m.n).reshape(-1, 32)[warps] for get in gets])


def left_fragment(registers: np.ndarray, kind: str) -> np.ndarray:
    """A's four registers [4, W, 32] of 16-bit pairs -> [W, 16, 16]."""
    warps = registers.shape[1]
    pairs = (
        np.ascontiguousarray(registers).view(np.uint16).reshape(2, 2, warps, 8, 4, 2)
    )  # k half, row half, W, g, t, e
    return floats(pairs.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 16), kind)


@builds("mma")
def _mma(instruction: Instruction, program: Any) -> Step:
    match = re.fullmatch(
        r"mma\.sync\.aligned\.(m16n8k16|m16n8k8)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32", instruction.op
    )
    if not match or (match[1] == "m16n8k8") != (match[2] == "tf32"):
        raise PtxError(instruction.op)
    kind = match[2]
    to, *sources = instruction.operands
    puts = [writer(item, TYPES["f32"]) for item in to.items]
    left, right = ([reader(item, TYPES["u32"], program) for item in source.items] for source in sources[:2])
    add = [reader(item, TYPES["f32"], program) for item in sources[2].items]

    def step(m: Any) -> None:
        warps = m.active_warps()
        number = len(warps)
        a, b = warp_registers(m, left, warps), warp_registers(m, right, warps)
        if kind == "tf32":
            a, b = (np.ascontiguousarray(x & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b))
            a = a.reshape(2, 2, number, 8, 4).transpose(2, 1, 3, 0, 4).reshape(number, 16, 8)
            b = b.reshape(2, number, 8, 4).transpose(1, 2, 0, 3).reshape(number, 8, 8)
        else:
            a = left_fragment(a, kind)
            pairs = np.ascontiguousarray(b).view(np.uint16).reshape(2, number, 8, 4, 2)
            b = floats(pairs.transpose(1, 2, 0, 3, 4).reshape(number, 8, 16), kind)
        c = warp_registers(m, add, warps).reshape(2, 2, number, 8, 4).transpose(2, 0, 3, 4, 1).reshape(number, 16, 8)
        result = c + a @ b.transpose(0, 2, 1)
        m.counters.tensor_flops += number * 2 * 16 * 8 * a.shape[2]
        out = result.reshape(number, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, number, 32)
        for each, put in enumerate(puts):
            values = np.zeros((m.warps, 32), np.float32)
            values[warps] = out[each]
            put(m, values.ravel())

    return step
