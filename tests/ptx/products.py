"""wgmma: products of a warpgroup that land later, at the wait; registers hold NaN until then."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .matrix import floats, left_fragment, warp_registers
from .memory import SHARED_BASE, MemoryFaultError
from .operands import BOOL, TYPES, Step, builds, reader
from .parse import Instruction, PtxError, Vec

SWIZZLES = {0: 0, 1: 3, 2: 2, 3: 1}  # a descriptor's mode to how many address bits are exchanged


@lru_cache(maxsize=4096)
def operand_chunks(descriptor: int, rows: int, turned: bool) -> np.ndarray:
    """Addresses of 16-byte units of an operand [rows, K = 16]: [rows, 2]; [rows / 8, 16] where rows follow each other.

    The swizzle exchanges bits of the address itself, not of an offset.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    mode = descriptor >> 62
    if descriptor >> 49 & 7:
        raise PtxError("a base offset in a matrix descriptor")
    if start < SHARED_BASE:
        raise MemoryFaultError("a matrix descriptor points below shared memory")
    bits = SWIZZLES[mode]
    span = 16 << bits  # bytes of a swizzled row
    if turned:
        if not mode:
            raise PtxError("a turned operand without swizzle")
        unit, k = np.arange(rows // 8)[:, None] * 16, np.arange(16)[None, :]
        address = start + unit % span + unit // span * leading + k % 8 * span + k // 8 * stride
    else:
        row, half = np.arange(rows)[:, None], np.arange(2)[None, :]
        pitch, step = (span, 16) if mode else (16, leading)
        address = start + row % 8 * pitch + row // 8 * stride + half * step
    return address ^ ((address >> 7 & ((1 << bits) - 1)) << 4)


def operand_values(units: np.ndarray, rows: int, turned: bool, kind: str) -> np.ndarray:
    """The units of `operand_chunks` [groups, ...] -> float32 [groups, rows, 16]."""
    bits = np.ascontiguousarray(units).view(np.uint16)
    if turned:
        bits = bits.reshape(-1, rows // 8, 16, 8).transpose(0, 1, 3, 2)
    return floats(np.ascontiguousarray(bits).reshape(-1, rows, 16), kind)


@builds("wgmma")
def _wgmma(instruction: Instruction, program: Any) -> Step:
    what = instruction.parts[1]
    if what == "fence":
        return lambda m: m.products.fence()
    if what == "commit_group":
        return lambda m: m.products.commit()
    if what == "wait_group":
        pending = instruction.operands[0].value
        return lambda m: m.products.wait(pending)
    match = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2", instruction.op)
    if not match:
        raise PtxError(instruction.op)
    columns, kind = int(match[1]), match[2]
    to, left, right, keep, sign_a, sign_b, *turned = instruction.operands
    if (sign_a.value, sign_b.value) != (1, 1):
        raise PtxError("a sign")
    in_registers = isinstance(left, Vec)
    turned = [bool(flag.value) for flag in turned]
    turned_a, turned_b = (False, turned[0]) if in_registers else turned
    registers = [item.index for item in to.items]
    if in_registers:
        get_left = [reader(item, TYPES["u32"], program) for item in left.items]
    else:
        get_left = reader(left, TYPES["u64"], program)
    get_right, get_keep = reader(right, TYPES["u64"], program), reader(keep, BOOL, program)

    def step(m: Any) -> None:
        warps = m.active_warps()
        if len(warps) % 4 or (warps[::4] % 4).any():
            raise MemoryFaultError("only some warps of a warpgroup multiply")
        first = warps[::4] * 32  # a thread of each group

        def chunks(get: Any, rows: int, turn: bool) -> np.ndarray:
            descriptors = np.broadcast_to(get(m), m.n)[first]
            return np.stack([operand_chunks(int(descriptor), rows, turn) for descriptor in descriptors])

        keeps = np.broadcast_to(get_keep(m), m.n)[first]
        b = Operand(columns, turned_b, kind, chunks=chunks(get_right, columns, turned_b))
        if in_registers:
            a = Operand(
                64, False, kind, values=left_fragment(warp_registers(m, get_left, warps), kind).reshape(-1, 64, 16)
            )
        else:
            a = Operand(64, turned_a, kind, chunks=chunks(get_left, 64, turned_a))
        m.counters.tensor_flops += len(first) * 2 * 64 * columns * 16
        m.products.issue(registers, first, a, b, keeps, columns)

    return step


@dataclass
class Operand:
    """Of a wgmma: values, or the addresses [groups, ...] of its units in shared memory."""

    rows: int
    turned: bool
    kind: str
    values: np.ndarray | None = None
    chunks: np.ndarray | None = None


@dataclass
class Product:
    """A wgmma by some warpgroups."""

    key: tuple[int, ...]
    left: Any
    right: Any
    keeps: np.ndarray
    pc: int
    operands: tuple[np.ndarray, np.ndarray] | None = None


@dataclass
class Accumulator:
    """The registers of a chain of products, as matrices [groups, 64, N], while they are on their way."""

    first: np.ndarray
    values: np.ndarray
    count: int = 0


class Products:
    """wgmma: registers hold NaN from the issue to the wait."""

    def __init__(self, m: Any) -> None:
        self.m = m
        self.open: list[Product] = []
        self.groups: list[list[Product]] = []
        self.accumulators: dict[tuple[int, ...], Accumulator] = {}

    @property
    def busy(self) -> bool:
        return bool(self.open or self.groups)

    def fence(self) -> None:
        """Orders registers, which are only taken at the issue."""

    def issue(
        self, registers: list[int], first: np.ndarray, left: Any, right: Any, keeps: np.ndarray, columns: int
    ) -> None:
        m, key = self.m, tuple(registers)
        chain = self.accumulators.get(key)
        if chain is None:
            chain = self.accumulators[key] = Accumulator(first, self._take(registers, first, columns))
            poison = np.full(m.n, np.nan, np.float32)
            for register in registers:
                m.write(register, poison)
        elif len(chain.first) != len(first) or (chain.first != first).any():
            raise PtxError("products of other warpgroups in the same registers")
        chain.count += 1
        product = Product(key, left, right, keeps, m.pc)
        for operand in (left, right):
            if operand.chunks is not None:
                m.copies.reading[self._flat(first, operand) // 16] += 1
        if m.options.early:
            product.operands = self._operands(first, product)
        self.open.append(product)

    def _flat(self, first: np.ndarray, operand: Any) -> np.ndarray:
        m = self.m
        chunks = operand.chunks.reshape(len(first), -1)
        blocks = m.block[first][:, None]
        return m.shared.flat(blocks, chunks, 16)

    def _operands(self, first: np.ndarray, product: Product) -> tuple[np.ndarray, np.ndarray]:
        m, found = self.m, []
        outer, m.pc = m.pc, product.pc
        for operand in (product.left, product.right):
            if operand.values is not None:
                found.append(operand.values)
                continue
            flat = self._flat(first, operand)
            threads = np.repeat(first, flat.shape[1])
            m.check_shared_read(threads, flat.ravel(), 16, asynchronous=True)
            found.append(operand_values(m.shared.get(flat, 16), operand.rows, operand.turned, operand.kind))
        m.pc = outer
        return found[0], found[1]

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int) -> None:
        while len(self.groups) > pending:
            for product in self.groups.pop(0):
                self._complete(product)

    def _complete(self, product: Product) -> None:
        m, chain = self.m, self.accumulators[product.key]
        left, right = product.operands or self._operands(chain.first, product)
        for operand in (product.left, product.right):
            if operand.chunks is not None:
                m.copies.reading[self._flat(chain.first, operand) // 16] -= 1
        result = left @ right.transpose(0, 2, 1)
        chain.values = np.where(product.keeps[:, None, None], chain.values, np.float32(0)) + result
        chain.count -= 1
        if not chain.count:
            self._give(product.key, self.accumulators.pop(product.key))

    def _take(self, registers: list[int], first: np.ndarray, columns: int) -> np.ndarray:
        m = self.m
        threads = first[:, None] + np.arange(128)
        unwritten = np.full(m.n, np.nan, np.float32)
        held = [unwritten if m.regs[register] is None else m.regs[register] for register in registers]
        flat = np.stack([values.view(np.float32)[threads] for values in held])
        # register 4 j + 2 h + e of lane 4 g + t in warp w: row 16 w + 8 h + g, column 8 j + 2 t + e
        parts = flat.reshape(columns // 8, 2, 2, len(first), 4, 8, 4)  # j, h, e, group, w, g, t
        return np.ascontiguousarray(parts.transpose(3, 4, 1, 5, 0, 6, 2)).reshape(len(first), 64, columns)

    def _give(self, registers: tuple[int, ...], chain: Accumulator) -> None:
        m = self.m
        columns = chain.values.shape[2]
        parts = chain.values.reshape(-1, 4, 2, 8, columns // 8, 4, 2)  # group, w, h, g, j, t, e
        flat = np.ascontiguousarray(parts.transpose(4, 2, 6, 0, 1, 3, 5)).reshape(len(registers), -1, 128)
        threads = chain.first[:, None] + np.arange(128)
        for number, register in enumerate(registers):
            values = m.regs[register].view(np.float32).copy()
            values[threads] = flat[number]
            m.regs[register] = values
