"""What threads of a warp exchange, and loads and stores."""

from __future__ import annotations

from typing import Any

import numpy as np

from .memory import MemoryFaultError
from .operands import BOOL, TYPES, UNSIGNED, Step, address_of, builds, count_access, reader, unit_type, writer
from .parse import Imm, Instruction, Mem, Pair, PtxError, Sym, Vec


@builds("shfl")
def _shfl(instruction: Instruction, program: Any) -> Step:
    how = instruction.parts[2]
    to, source, by, bound, members = instruction.operands
    first, second = (to.first, to.second) if isinstance(to, Pair) else (to, None)
    put, valid = writer(first, TYPES["b32"]), writer(second, BOOL)
    gets = [reader(operand, TYPES["u32"], program) for operand in (source, by, bound)]
    whole = isinstance(members, Imm) and members.value in (-1, 0xFFFFFFFF)

    def step(m: Any) -> None:
        if whole or m.mask is not None:
            m.active_warps()
        value, b, c = (get(m) for get in gets)
        lane = m.lane
        segment, clamp = (c >> np.uint32(8)) & np.uint32(31), c & np.uint32(31)
        most = (lane & segment) | (clamp & ~segment)
        if how == "bfly":
            lanes = lane ^ b
            good = lanes <= most
        elif how == "idx":
            lanes = (lane & segment) | (b & ~segment)
            good = lanes <= most
        elif how == "down":
            lanes = lane + b
            good = lanes <= most
        else:
            lanes = lane - b
            good = lanes.view(np.int32) >= most.view(np.int32)
        lanes = np.where(good, lanes, lane)
        put(m, value[(m.warp * 32 + lanes).astype(np.int64)])
        if second is not None:
            valid(m, good)

    return step


@builds("elect")
def _elect(instruction: Instruction, program: Any) -> Step:
    to, _ = instruction.operands
    leader, chosen = writer(to.first, TYPES["b32"]), writer(to.second, BOOL)

    def step(m: Any) -> None:
        m.active_warps()
        leader(m, np.zeros(m.n, np.uint32))
        chosen(m, m.lane == 0)

    return step


@builds("vote")
def _vote(instruction: Instruction, program: Any) -> Step:
    how = instruction.parts[2]
    to, source, _ = instruction.operands
    get = reader(source, BOOL, program)
    put = writer(to, TYPES["b32"] if how == "ballot" else BOOL)

    def step(m: Any) -> None:
        m.active_warps()
        each = np.broadcast_to(get(m), m.n).reshape(-1, 32)
        if how == "ballot":
            bits = (each.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
            put(m, np.repeat(bits, 32))
        else:
            put(m, np.repeat({"all": each.all, "any": each.any}[how](1), 32))

    return step


# --- memory


_HINTS = {
    *("nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "relaxed", "weak", "volatile", "gpu"),
    *("L1::evict_last", "L1::evict_first", "L1::no_allocate"),
    *("L2::64B", "L2::128B", "L2::256B", "L2::evict_last", "L2::evict_first"),
}


def _form(instruction: Instruction) -> tuple[str, int, np.dtype]:
    """Space, elements of the vector, and type of a load or store."""
    space, count = "", 1
    for part in instruction.parts[1:-1]:
        if part in ("global", "shared", "param", "const", "local") or part == "shared::cta":
            space = part.removesuffix("::cta")
        elif part in ("v2", "v4", "v8"):
            count = int(part[1:])
        elif part not in _HINTS:
            raise PtxError(part)
    kind = TYPES[instruction.parts[-1]]
    if count * kind.itemsize > 16:
        raise PtxError("more than 16 bytes")
    return space, count, kind


@builds("ld")
def _load(instruction: Instruction, program: Any) -> Step:
    space, count, kind = _form(instruction)
    to, mem = instruction.operands
    puts = [writer(item, kind) for item in (to.items if isinstance(to, Vec) else (to,))]
    width = count * kind.itemsize
    if len(puts) != count:
        raise PtxError("vector")
    if space == "param":
        return _load_param(mem, puts, kind, width, program)
    if space not in ("global", "shared"):
        raise PtxError(space)
    addresses = address_of(mem, program, TYPES["u64" if space == "global" else "u32"])

    def step(m: Any) -> None:
        threads = m.active()
        address = addresses(m, threads)
        if space == "global":
            count_access(m, "global load", address, threads, width)
            values = m.read_global(threads, address, width)
        else:
            count_access(m, "shared load", address, threads, width, True)
            values = m.read_shared(threads, address, width)
        values = values.view(kind).reshape(-1, count)
        for place, put in enumerate(puts):
            put(m, _spread(m, threads, values[:, place]))

    return step


def _spread(m: Any, threads: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values of some threads as an array over all."""
    if len(threads) == m.n:
        return np.ascontiguousarray(values)
    every = np.zeros(m.n, values.dtype)
    every[threads] = values
    return every


def _load_param(mem: Mem, puts: list, kind: np.dtype, width: int, program: Any) -> Step:
    if isinstance(mem.base, Sym):
        at = program.kernel.params[mem.base.name].offset + mem.offset

        def fixed(m: Any) -> None:
            for place, put in enumerate(puts):
                start = at + place * kind.itemsize
                put(m, np.full(m.n, m.params[start : start + kind.itemsize].view(kind)[0]))

        return fixed
    addresses = address_of(mem, program, TYPES["u64"])

    def step(m: Any) -> None:
        at = (addresses(m, np.arange(m.n)).astype(np.int64)) & 0xFFFFFF
        if m.mask is not None:
            at = np.where(m.mask, at, 0)
        if int(at.max()) + width > len(m.params):
            raise MemoryFaultError("beyond the parameters")
        for place, put in enumerate(puts):
            bytes_of = at[:, None] + np.arange(kind.itemsize) + place * kind.itemsize
            put(m, m.params[bytes_of].view(kind)[:, 0])

    return step


@builds("st")
def _store(instruction: Instruction, program: Any) -> Step:
    space, count, kind = _form(instruction)
    mem, source = instruction.operands
    unit = UNSIGNED[kind.itemsize]
    gets = [reader(item, unit, program) for item in (source.items if isinstance(source, Vec) else (source,))]
    width = count * kind.itemsize
    if space not in ("global", "shared") or len(gets) != count:
        raise PtxError(space)
    addresses = address_of(mem, program, TYPES["u64" if space == "global" else "u32"])

    def step(m: Any) -> None:
        threads = m.active()
        address = addresses(m, threads)
        values = np.empty((len(threads), count), unit)
        for place, get in enumerate(gets):
            value = get(m)
            values[:, place] = value if np.ndim(value) == 0 or len(threads) == m.n else value[threads]
        values = values.view(unit_type(width))[:, 0]
        if space == "global":
            count_access(m, "global store", address, threads, width)
            m.write_global(threads, address, values, width)
        else:
            count_access(m, "shared store", address, threads, width, True)
            m.write_shared(threads, address, values, width)

    return step
