"""Runs a compiled kernel: a batch of blocks at a time, all threads of it in one numpy operation per instruction.

As long as all threads stand at the same instruction there is one program counter. Where a branch parts them, each has
its own, and the group that stands earliest in the program goes on until it meets the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from . import asynchronous, instructions, mbarriers, operands, products
from .counters import Counters, class_of
from .memory import (
    IN_FLIGHT,
    SHARED_BASE,
    UNFENCED,
    VALID,
    Allocation,
    GlobalMemory,
    MemoryFaultError,
    Races,
    SharedMemory,
    every_byte,
    same,
)
from .parse import Instruction, Kernel, PtxError


@dataclass(frozen=True)
class Options:
    """What is looked for beside the results.

    early: asynchronous copies and products land when they are issued, not when they are waited for.
    both: a program's first launch is run in both orders, from the same memory: the bits must be the same.
    races: conflicting accesses to shared and global memory that no barrier separates.
    counters: sectors, bank conflicts, footprints.
    inexact: approximations are as far off as they may be, above or below by their bits; else correctly rounded.
    batch: so many threads at a time, in whole blocks.
    """

    early: bool = False
    both: bool = False
    races: bool = False
    counters: bool = True
    inexact: bool = False
    batch: int = 8192


@dataclass
class Finding:
    """Something that is wrong in a kernel, and how often."""

    kind: str
    kernel: str
    where: str
    detail: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind} in {self.kernel} ({self.count}x): {self.where}: {self.detail}"


class Findings(dict):
    """By kind, kernel and instruction."""

    def add(self, kind: str, kernel: str, where: object, detail: str, count: int = 1) -> None:
        key = (kind, kernel, str(where))
        if key in self:
            self[key].count += count
        else:
            self[key] = Finding(kind, kernel, str(where), detail, count)


class EmulationError(Exception):
    """What a kernel did that it must not."""


class DeadlockError(EmulationError):
    """Nobody can go on."""


RUN, BRANCH, BARRIER, EXIT = range(4)


class Program:
    """A kernel whose instructions are Python functions of a machine."""

    def __init__(self, kernel: Kernel, dynamic_shared: int) -> None:
        self.kernel = kernel
        self.shared_size = self._place_shared(dynamic_shared)
        self.steps = [instructions.build(instruction, self) for instruction in kernel.instructions]
        self.kinds = [
            {"bra": BRANCH, "ret": EXIT, "exit": EXIT, "bar": BARRIER, "barrier": BARRIER}.get(i.parts[0], RUN)
            for i in kernel.instructions
        ]
        if kernel.local:
            raise PtxError(f"{kernel.name}: local memory")
        if not self.kinds or self.kinds[-1] == RUN:
            raise PtxError(f"{kernel.name} does not end")
        self.control = [0] * len(self.kinds)
        after = len(self.kinds)
        for pc in reversed(range(len(self.kinds))):
            after = pc if self.kinds[pc] != RUN else after
            self.control[pc] = after
        self.classes = [class_of(i.op) for i in kernel.instructions]
        self.is_asynchronous = any(i.op.startswith(("cp.async", "wgmma")) for i in kernel.instructions)

    def _place_shared(self, dynamic: int) -> int:
        self.shared_at, at = {}, SHARED_BASE
        for name, (align, size) in self.kernel.shared.items():
            if size:
                at = -(-at // align) * align
                self.shared_at[name] = at
                at += size
        at = -(-at // 16) * 16 if at > SHARED_BASE else at
        for name, (_, size) in self.kernel.shared.items():
            if not size:
                self.shared_at[name] = at
        return at + dynamic - SHARED_BASE


@dataclass
class Launch:
    """A kernel with its grid and arguments."""

    program: Program
    grid: tuple[int, int, int]
    threads: int
    params: np.ndarray
    memory: GlobalMemory
    tensor_maps: list = field(default_factory=list)


def run(launch: Launch, options: Options, findings: Findings) -> Counters:
    """Run all blocks of a launch."""
    counters = Counters(launch.program.kernel.name, shared=launch.program.shared_size)
    blocks = int(np.prod(launch.grid))
    step = max(1, options.batch // launch.threads)
    with np.errstate(all="ignore"):
        for first in range(0, blocks, step):
            numbers = np.arange(first, min(blocks, first + step))
            Machine(launch, numbers, options, findings, counters).run()
    return counters


class Machine:
    """A batch of blocks in the midst of a kernel."""

    def __init__(
        self, launch: Launch, numbers: np.ndarray, options: Options, findings: Findings, counters: Counters
    ) -> None:
        self.launch, self.program, self.options = launch, launch.program, options
        self.findings, self.counters = findings, counters
        self.memory, self.params = launch.memory, launch.params
        blocks, threads = len(numbers), -(-launch.threads // 32) * 32
        self.blocks, self.threads, self.n = blocks, threads, blocks * threads
        self.warps_per_block = threads // 32
        self.warps = blocks * self.warps_per_block
        self.block = np.repeat(np.arange(blocks), threads)
        self.warp = np.arange(self.n) // 32
        self.lane = (np.arange(self.n) % 32).astype(np.uint32)
        self.global_warp = (
            np.repeat(numbers, threads) * self.warps_per_block + np.tile(np.arange(threads) // 32, blocks)
        ).astype(np.int32)
        x, y, _ = launch.grid
        self.special = {
            "%tid.x": np.tile(np.arange(threads, dtype=np.uint32), blocks),
            "%ntid.x": launch.threads,
            "%laneid": self.lane,
            "%warpid": (self.warp % self.warps_per_block).astype(np.uint32),
            "%ctaid.x": np.repeat(numbers % x, threads).astype(np.uint32),
            "%ctaid.y": np.repeat(numbers // x % y, threads).astype(np.uint32),
            "%ctaid.z": np.repeat(numbers // (x * y), threads).astype(np.uint32),
            **{f"%nctaid.{axis}": size for axis, size in zip("xyz", launch.grid, strict=True)},
            **dict.fromkeys(("%tid.y", "%tid.z"), 0),
            **dict.fromkeys(("%ntid.y", "%ntid.z"), 1),
        }
        self.regs: list = [None] * len(self.program.kernel.registers)
        self.shared = SharedMemory(blocks, self.program.shared_size, options.races)
        self.epoch = np.zeros(blocks, np.int32)
        self.copies = asynchronous.Copies(self)
        self.barriers = mbarriers.Barriers(self)
        self.products = products.Products(self)
        self.mask: np.ndarray | None = None
        self.pc = 0
        self.pcs: np.ndarray | None = None
        self.alive = np.ones(self.n, bool)
        self.waiting = np.zeros(self.n, bool)
        self.stalled = np.zeros(self.n, bool)
        self.executed = np.zeros(len(self.program.steps), np.int64)
        self.touched: dict[tuple[int, bool], np.ndarray] = {}  # bytes of an allocation, by block

    # --- running

    def run(self) -> None:
        self.counters.blocks += self.blocks
        self.counters.warps += self.warps
        pc = 0
        try:
            while pc is not None:
                pc = self._together(pc) if self.pcs is None else self._apart()
        except (MemoryFaultError, EmulationError, PtxError) as error:
            at = self.program.kernel.instructions[self.pc]
            raise (
                type(error)
                if isinstance(error, DeadlockError)
                else EmulationError(f"{self.program.kernel.name}: {at}: {error}")
            ) from error
        except Exception as error:
            at = self.program.kernel.instructions[self.pc]
            error.add_note(f"emulating {self.program.kernel.name}: {at}")
            raise
        self.copies.finish()
        for (_, writes), touched in self.touched.items():
            self.counters.add_touched("store" if writes else "load", touched)
        for place, count in enumerate(self.executed):
            if count:
                self.counters.instructions[self.program.classes[place]] += int(count)

    def _steps(self, start: int, stop: int, warps: int) -> None:
        steps = self.program.steps
        for pc in range(start, stop):
            self.pc = pc
            steps[pc](self)
        self.executed[start:stop] += warps

    def _together(self, pc: int) -> int | None:
        """Go on to the next branch, barrier or end, with all threads."""
        end = self.program.control[pc]
        self._steps(pc, end, self.warps)
        self.pc = end
        self.executed[end] += self.warps
        kind = self.program.kinds[end]
        instruction = self.program.kernel.instructions[end]
        taken = self._guard(instruction)
        if taken is None or taken.all():
            if kind == EXIT:
                return None
            if kind == BARRIER:
                self.epoch += 1
                return end + 1
            return instruction.operands[0]
        if not taken.any():
            return end + 1
        self.pcs = np.full(self.n, end, np.int64)
        self._part(end, np.ones(self.n, bool), taken)
        return 0

    def _guard(self, instruction: Instruction) -> np.ndarray | None:
        if instruction.guard is None:
            return None
        value = self.regs[instruction.guard.index]
        return ~value if instruction.negated else value

    def _apart(self) -> int | None:
        """One step of the group of threads that is earliest in the program."""
        ready = self.alive & ~self.waiting & ~self.stalled
        if not ready.any():
            if not self.alive.any():
                return None
            if not self.stalled.any() or not self.barriers.progress():
                raise DeadlockError(f"{self.program.kernel.name}: {int(self.alive.sum())} threads wait for ever")
            self.stalled[:] = False
            return 0
        places = self.pcs[ready]
        pc = int(places.min())
        active = ready & (self.pcs == pc)
        later = places[places > pc]
        end = min(self.program.control[pc], int(later.min()) if len(later) else len(self.program.steps))
        self.mask = None if active.all() else active
        warps = self.warps if self.mask is None else int(active.reshape(-1, 32).any(1).sum())
        self._steps(pc, end, warps)
        self.mask = None
        self.pcs[active] = end
        if end == self.program.control[pc] and not (len(later) and int(later.min()) == end):
            self.pc = end
            self.executed[end] += warps
            taken = self._guard(self.program.kernel.instructions[end])
            self._part(end, active, taken)
        if self.alive.all() and not self.waiting.any() and not self.stalled.any() and (self.pcs == self.pcs[0]).all():
            pc, self.pcs = int(self.pcs[0]), None
            return pc
        return 0

    def _part(self, pc: int, active: np.ndarray, taken: np.ndarray | None) -> None:
        """Branch, barrier or end for some threads."""
        kind, instruction = self.program.kinds[pc], self.program.kernel.instructions[pc]
        go = active if taken is None else active & taken
        self.pcs[active & ~go] = pc + 1
        if kind == BRANCH:
            self.pcs[go] = instruction.operands[0]
        elif kind == EXIT:
            self.alive[go] = False
            self._release()
        else:
            self.waiting[go] = True
            self._release()

    def _release(self) -> None:
        """Let blocks go on whose living threads all wait at a barrier."""
        waiting = np.bincount(self.block[self.waiting], minlength=self.blocks)
        living = np.bincount(self.block[self.alive], minlength=self.blocks)
        free = (waiting == living) & (waiting > 0)
        if free.any():
            go = self.waiting & free[self.block]
            self.pcs[go] += 1
            self.waiting[go] = False
            self.epoch[free] += 1
            self.stalled[:] = False

    # --- registers

    def write(self, index: int, values: np.ndarray) -> None:
        """Set a register of the active threads."""
        if np.ndim(values) == 0:
            values = np.full(self.n, values)
        if self.mask is not None:
            old = self.regs[index]
            if old is None:
                old = operands.undefined(self, values.dtype)
            elif old.dtype is not values.dtype:
                old = old.view(values.dtype)
            values = np.where(self.mask, values, old)
        self.regs[index] = values

    def active(self) -> np.ndarray:
        """Numbers of the active threads."""
        return np.arange(self.n) if self.mask is None else np.flatnonzero(self.mask)

    def active_warps(self) -> np.ndarray:
        """Numbers of the active warps, which must be whole."""
        if self.mask is None:
            return np.arange(self.warps)
        each = self.mask.reshape(-1, 32)
        if (each.any(1) != each.all(1)).any():
            raise EmulationError("only some threads of a warp take part in what needs all of them")
        return np.flatnonzero(each[:, 0])

    # --- memory

    def report(self, kind: str, detail: str, count: int = 1) -> None:
        self.findings.add(kind, self.program.kernel.name, self.program.kernel.instructions[self.pc], detail, count)

    def who(self, threads: np.ndarray, bad: np.ndarray) -> str:
        first = int(threads[np.flatnonzero(bad)[0]])
        return f"thread {first % self.threads} of block {int(self.global_warp[first]) // self.warps_per_block}"

    def read_shared(
        self, threads: np.ndarray, address: np.ndarray, width: int, asynchronous: bool = False
    ) -> np.ndarray:
        flat = self.shared.flat(self.block[threads], address.astype(np.int64), width)
        self.check_shared_read(threads, flat, width, asynchronous)
        return self.shared.get(flat, width)

    def check_shared_read(self, threads: np.ndarray, flat: np.ndarray, width: int, asynchronous: bool = False) -> None:
        """Of bytes that were never written, that are still on their way, or that no fence has handed over."""
        every, some = self.shared.states(flat, width)
        unit = min(width, 8)
        missing = (every & every_byte(VALID, unit)) != every_byte(VALID, unit)
        flying = (some & every_byte(IN_FLIGHT, unit)) != 0
        if flying.any():
            self.report("read before it has arrived", self.who(threads, flying), int(flying.sum()))
        missing &= ~flying
        if missing.any():
            offset = int(flat[np.flatnonzero(missing)[0]]) % self.shared.stride - SHARED_BASE
            self.report(
                "read of uninitialised shared memory",
                f"{self.who(threads, missing)}, offset {offset}",
                int(missing.sum()),
            )
        if asynchronous:
            unfenced = (some & every_byte(UNFENCED, unit)) != 0
            if unfenced.any():
                self.report(
                    "asynchronous read without fence.proxy.async", self.who(threads, unfenced), int(unfenced.sum())
                )
        if self.shared.races is not None:
            bad = self.shared.races.read(*self._race(threads, flat, width))
            if bad.any():
                self.report("shared memory race: read after write", self.who(threads, bad), int(bad.sum()))

    def write_shared(self, threads: np.ndarray, address: np.ndarray, values: np.ndarray, width: int) -> None:
        flat = self.shared.flat(self.block[threads], address.astype(np.int64), width)
        self.check_shared_write(threads, flat, width)
        old = self.shared.get(flat, width) if self.shared.races is not None else None
        self.shared.put(flat, values, width, VALID | UNFENCED)
        if old is not None:
            new = self.shared.get(flat, width)
            self.conflicts(
                "shared memory", self.shared.races, threads, flat, width, same(old, values), same(new, values)
            )

    def check_shared_write(self, threads: np.ndarray, flat: np.ndarray, width: int) -> None:
        """Of bytes that are on their way, or that something asynchronous still reads."""
        _, some = self.shared.states(flat, width)
        flying = (some & every_byte(IN_FLIGHT, min(width, 8))) != 0
        if flying.any():
            self.report("write where an asynchronous copy is on its way", self.who(threads, flying), int(flying.sum()))
        self.copies.check_write(flat, width)

    def conflicts(
        self,
        what: str,
        races: Races,
        threads: np.ndarray,
        flat: np.ndarray,
        width: int,
        unchanged: object = False,
        kept: object = False,
    ) -> None:
        """Report races of a write; writes of the same bits by several warps, which replicated values make, are none."""
        earlier, at_once, over_read = races.write(*self._race(threads, flat, width))
        over_write = (earlier & ~np.asarray(unchanged, bool)) | (at_once & ~np.asarray(kept, bool))
        if over_write.any():
            self.report(f"{what} race: write after write", self.who(threads, over_write), int(over_write.sum()))
        if over_read.any():
            self.report(f"{what} race: write after read", self.who(threads, over_read), int(over_read.sum()))

    def _race(self, threads: np.ndarray, flat: np.ndarray, width: int) -> tuple:
        bytes_of = flat[:, None] + np.arange(width)
        return bytes_of, self.global_warp[threads], self.epoch[self.block[threads]], self.warps_per_block

    def read_global(self, threads: np.ndarray, address: np.ndarray, width: int) -> np.ndarray:
        """Units of `width` bytes."""
        parts = self._global_parts(threads, address, width)
        if len(parts) == 1:
            return operands.unit_view(parts[0][0], width)[parts[0][2] // width]
        out = np.empty(len(address), operands.unit_type(width))
        for allocation, mask, at in parts:
            out[mask] = operands.unit_view(allocation, width)[at // width]
        return out

    def write_global(self, threads: np.ndarray, address: np.ndarray, values: np.ndarray, width: int) -> None:
        for allocation, mask, at in self._global_parts(threads, address, width, writes=True):
            some, into = (values, threads) if mask is None else (values[mask], threads[mask])
            units = operands.unit_view(allocation, width)
            old = units[at // width] if allocation.races is not None else None
            units[at // width] = some
            if old is not None:
                self.conflicts(
                    "global memory", allocation.races, into, at, width, same(old, some), same(units[at // width], some)
                )

    def touch(self, allocation: Allocation, threads: np.ndarray, places: np.ndarray, writes: bool) -> None:
        """Count bytes [threads, n] of an allocation."""
        (allocation.written if writes else allocation.read)[places >> 5] = True
        key = (allocation.base, writes)
        if key not in self.touched:
            self.touched[key] = np.zeros((self.blocks, allocation.size // 32 * 32 + 32), bool)
        self.touched[key][self.block[threads][:, None], places] = True

    def _global_parts(self, threads: np.ndarray, address: np.ndarray, width: int, writes: bool = False) -> list:
        address = address.view(np.int64)
        if width > 1 and (address & (width - 1)).any():
            bad = (address & (width - 1)) != 0
            raise MemoryFaultError(
                f"{width} bytes at {int(address[bad][0]):#x}, which is not aligned, by {self.who(threads, bad)}"
            )
        parts = []
        for allocation, mask in self.memory.split(address, width):
            at = (address if mask is None else address[mask]) - allocation.base
            some = threads if mask is None else threads[mask]
            if allocation.covered is not None:
                bad = ~allocation.covered[at[:, None] + np.arange(width)].all(1)
                if bad.any():
                    self.report(
                        f"global {'write' if writes else 'read'} outside every argument's elements",
                        f"{self.who(some, bad)}, {allocation.name} byte {int(at[bad][0])}",
                        int(bad.sum()),
                    )
            if self.options.counters:
                self.touch(allocation, some, at[:, None] + np.arange(width), writes)
            if allocation.races is not None and not writes:
                bad = allocation.races.read(*self._race(some, at, width))
                if bad.any():
                    self.report("global memory race: read after write", self.who(some, bad), int(bad.sum()))
            parts.append((allocation, mask, at))
        return parts
