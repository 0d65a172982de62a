"""Global memory (the host's, by registered allocations) and shared memory (with a shadow byte for every byte)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np

# of how many bytes: a type that numpy copies in one piece
PIECES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
SHARED_BASE = 1024  # what the hardware keeps to itself at the start of the shared window
VALID, IN_FLIGHT, UNFENCED = 1, 2, 4  # bits of a shadow byte
POISON = 0xFF  # NaN in every float format


class MemoryFaultError(Exception):
    """An access that a GPU would refuse, or that no argument of the kernel covers."""


def pieces(data: np.ndarray, width: int) -> np.ndarray:
    """Bytes as an array of units of `width` bytes; what is left at the end is cut off."""
    return data[: len(data) // width * width].view(PIECES[width])


def every_byte(value: int, width: int) -> np.integer | np.ndarray:
    """`value` in each byte of an unsigned number of `width` bytes."""
    kind = PIECES[min(width, 8)]
    return kind(int.from_bytes(bytes([value]) * min(width, 8), "little"))


@dataclass
class Allocation:
    """Memory at a host address; `covered` marks the bytes that belong to some argument (None: all do)."""

    base: int
    size: int
    name: str
    covered: np.ndarray | None = None
    data: np.ndarray = field(init=False)
    read: np.ndarray = field(init=False)
    written: np.ndarray = field(init=False)
    races: Races | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        buffer = (ctypes.c_uint8 * self.size).from_address(self.base) if self.size else b""
        self.data = np.frombuffer(buffer, np.uint8)
        sectors = self.size // 32 + 2
        self.read, self.written = np.zeros(sectors, bool), np.zeros(sectors, bool)

    @property
    def end(self) -> int:
        return self.base + self.size


class GlobalMemory:
    """The allocations that a launch may touch."""

    def __init__(self, track_races: bool = False) -> None:
        self.allocations: list[Allocation] = []
        self.track_races = track_races
        self.bases = np.zeros(0, np.int64)
        self.last: Allocation | None = None

    def register(self, base: int, size: int, name: str) -> Allocation:
        """Add an allocation, or return the one that covers these bytes."""
        for known in self.allocations:
            if known.base <= base and base + size <= known.end:
                return known
        new = Allocation(base, size, name)
        if self.track_races:
            new.races = Races(size)
        self.allocations.append(new)
        self.allocations.sort(key=lambda allocation: allocation.base)
        self.bases = np.array([allocation.base for allocation in self.allocations], np.int64)
        return new

    def split(self, addresses: np.ndarray, width: int) -> list[tuple[Allocation, np.ndarray | None]]:
        """Addresses by allocation: the allocation and a mask of the addresses (None: all of them)."""
        low, high = int(addresses.min()), int(addresses.max())
        if self.last is None or not (self.last.base <= low and high + width <= self.last.end):
            self.last = next((a for a in self.allocations if a.base <= low and high + width <= a.end), None)
        if self.last is not None:
            return [(self.last, None)]
        which = np.searchsorted(self.bases, addresses, "right") - 1
        parts = []
        for number in np.unique(which):
            mask = which == number
            inside = addresses[mask]
            found = self.allocations[number] if number >= 0 else None
            if found is None or int(inside.max()) + width > found.end:
                bad = inside if found is None else inside[inside + width > found.end]
                raise OutOfBoundsError(int(bad[0]), width, len(bad), self.nearest(int(bad[0])))
            parts.append((found, mask))
        return parts

    def nearest(self, address: int) -> str:
        """In words, where an address lies."""
        if not self.allocations:
            return "nothing is allocated"
        near = min(self.allocations, key=lambda a: max(a.base - address, address - a.end, 0))
        return (
            f"{near.name} [{near.base:#x}, {near.end:#x}), {address - near.base:+d} bytes from its start of {near.size}"
        )


class OutOfBoundsError(MemoryFaultError):
    """Outside every allocation."""

    def __init__(self, address: int, width: int, count: int, where: str) -> None:
        super().__init__(f"{width} bytes at {address:#x} in no allocation ({count} threads); nearest: {where}")
        self.address = address


class Races:
    """Who last wrote and read each byte: a warp and its barrier epoch. Conflicts are what no barrier separates."""

    def __init__(self, size: int) -> None:
        self.writer = np.full(size, -1, np.int32)
        self.write_epoch = np.zeros(size, np.int32)
        self.reader = np.full(size, -1, np.int32)  # -2: several warps
        self.read_epoch = np.zeros(size, np.int32)
        self.block_reader = np.full(size, -1, np.int32)  # the block that read it, ever; -2: several

    def read(self, at: np.ndarray, warp: np.ndarray, epoch: np.ndarray, warps: int) -> np.ndarray:
        """Note reads of bytes `at` [n, k] by warps [n]; True [n] where another's write is not separated from it."""
        warp, epoch = warp[:, None], epoch[:, None]
        writer = self.writer[at]
        foreign = writer // warps != warp // warps
        bad = (writer >= 0) & (writer != warp) & (foreign | (self.write_epoch[at] == epoch))
        many = (self.read_epoch[at] == epoch) & (self.reader[at] != warp) & (self.reader[at] != -1)
        self.reader[at] = np.where(many, -2, warp)
        self.read_epoch[at] = epoch
        lost = (self.reader[at] != warp) & ~many
        if lost.any():
            self.reader[at[lost]] = -2
        block = np.broadcast_to(warp // warps, at.shape)
        known = self.block_reader[at]
        self.block_reader[at] = np.where((known == -1) | (known == block), block, -2)
        return bad.any(1)

    def write(self, at: np.ndarray, warp: np.ndarray, epoch: np.ndarray, warps: int) -> tuple[np.ndarray, ...]:
        """Note writes [n]; where they conflict with an earlier write, with one of the same instruction, with a read."""
        warp, epoch = warp[:, None], epoch[:, None]
        writer, reader = self.writer[at], self.reader[at]
        foreign = writer // warps != warp // warps
        earlier = (writer >= 0) & (writer != warp) & (foreign | (self.write_epoch[at] == epoch))
        over_read = (reader != -1) & (reader != warp) & (self.read_epoch[at] == epoch)
        block = self.block_reader[at]
        over_read |= (block != -1) & (block != warp // warps)
        self.writer[at] = warp
        self.write_epoch[at] = epoch
        at_once = self.writer[at] != warp
        return earlier.any(1), at_once.any(1), over_read.any(1)


def same(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where two arrays of units have the same bits."""
    if one.dtype.itemsize < 16:
        return one == other
    words = [np.ascontiguousarray(part).view(np.uint64).reshape(-1, 2) for part in (one, other)]
    return (words[0] == words[1]).all(1)


class SharedMemory:
    """The shared memory of a batch of blocks, one after the other. Addresses are those of the shared window."""

    def __init__(self, blocks: int, size: int, track_races: bool) -> None:
        self.size = size
        self.stride = -(-(SHARED_BASE + max(size, 1)) // 1024) * 1024
        self.data = np.full(blocks * self.stride, POISON, np.uint8)
        self.shadow = np.zeros(blocks * self.stride, np.uint8)
        self.races = Races(blocks * self.stride) if track_races else None

    def flat(self, block: np.ndarray | int, address: np.ndarray, width: int) -> np.ndarray:
        """Places in `data` of addresses in each thread's window; checks bounds and alignment."""
        low, high = int(address.min()), int(address.max())
        if low < SHARED_BASE or high + width > SHARED_BASE + self.size:
            raise MemoryFaultError(
                f"{width} bytes of shared memory at offset {(low if low < SHARED_BASE else high) - SHARED_BASE}"
                f" of {self.size}"
            )
        if width > 1 and (address & (width - 1)).any():
            raise MemoryFaultError(f"{width} bytes of shared memory at an unaligned address")
        return block * self.stride + address

    def get(self, flat: np.ndarray, width: int) -> np.ndarray:
        return pieces(self.data, width)[flat // width]

    def put(self, flat: np.ndarray, values: np.ndarray, width: int, state: int = VALID) -> None:
        pieces(self.data, width)[flat // width] = values
        self.mark(flat, width, state)

    def mark(self, flat: np.ndarray, width: int, state: int) -> None:
        unit = min(width, 8)
        shadow, at = pieces(self.shadow, unit), flat // unit
        for part in range(width // unit):
            shadow[at + part] = every_byte(state, unit)

    def states(self, flat: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """All and any of the shadow's bits over the bytes of each access."""
        unit = min(width, 8)
        shadow, at = pieces(self.shadow, unit), flat // unit
        found = shadow[at]
        every = some = found
        if width > unit:
            more = shadow[at + 1]
            every, some = found & more, found | more
        return every, some
