"""mbarriers, and the fence that hands shared memory to asynchronous readers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import SHARED_BASE, UNFENCED, MemoryFaultError
from .operands import TYPES, Step, address_of, builds, reader, writer
from .parse import Imm, Instruction, PtxError


@dataclass
class Barrier:
    """An mbarrier: arrivals and bytes that its phase still waits for."""

    expected: int
    pending: int
    transfer: int = 0
    phase: int = 0
    loads: list[Any] = field(default_factory=list)
    made: tuple[int, int] = (-1, -1)  # the warp that initialised it, and its epoch
    waited: set[tuple[int, int]] = field(default_factory=set)  # warps that waited for it, and when

    def settle(self) -> None:
        if self.pending == 0 and self.transfer == 0:
            self.phase ^= 1
            self.pending = self.expected


class Barriers:
    """All mbarriers of a batch of blocks, by their place in shared memory."""

    def __init__(self, m: Any) -> None:
        self.m = m
        self.known: dict[int, Barrier] = {}
        self.events = self.seen = 0

    def at(self, thread: int, address: int) -> Barrier:
        place = int(self.m.block[thread]) * self.m.shared.stride + address
        if place not in self.known:
            raise MemoryFaultError(f"no mbarrier at shared offset {address - SHARED_BASE}")
        return self.known[place]

    def init(self, thread: int, address: int, expected: int) -> None:
        place = int(self.m.shared.flat(int(self.m.block[thread]), np.array([address]), 8)[0])
        if place in self.known:
            raise MemoryFaultError("an mbarrier is initialised again, without mbarrier.inval")
        self.known[place] = Barrier(expected, expected, made=self._now(thread))

    def _now(self, thread: int) -> tuple[int, int]:
        return int(self.m.warp[thread]), int(self.m.epoch[self.m.block[thread]])

    def seen_by(self, threads: np.ndarray, barrier: Barrier) -> None:
        """Other warps may use an mbarrier after a barrier only."""
        warp, epoch = barrier.made
        epochs = self.m.epoch[self.m.block[threads]]
        barrier.waited.update(zip(self.m.warp[threads].tolist(), epochs.tolist(), strict=True))
        early = (self.m.warp[threads] != warp) & (epochs == epoch)
        if early.any():
            self.m.report("an mbarrier is used before its initialisation is visible", self.m.who(threads, early))

    def invalidate(self, thread: int, address: int) -> None:
        barrier = self.at(thread, address)
        if barrier.loads or barrier.transfer:
            self.m.report("an mbarrier is invalidated while copies are on their way", f"{len(barrier.loads)} boxes")
        warp, epoch = self._now(thread)
        if others := sorted(other for other, when in barrier.waited if other != warp and when == epoch):
            self.m.report("an mbarrier is invalidated while others may wait for it", f"warps {others}")
        del self.known[int(self.m.block[thread]) * self.m.shared.stride + address]

    def wait(self, thread: int, address: int, parity: int) -> bool:
        barrier = self.at(thread, address)
        if barrier.phase == parity and barrier.pending == 0:
            loads, barrier.loads = barrier.loads, []
            for bulk in loads:
                self.m.copies.land_load(bulk, barrier)
        return barrier.phase != parity

    def progress(self) -> bool:
        """Whether anything happened since the last time everybody was stalled."""
        changed = self.events != self.seen
        self.seen = self.events
        return changed


@builds("mbarrier")
def _mbarrier(instruction: Instruction, program: Any) -> Step:
    parts = [part for part in instruction.parts[1:] if part not in ("shared", "shared::cta", "b64")]
    if parts == ["init"]:
        mem, number = instruction.operands
        addresses = address_of(mem, program, TYPES["u32"])
        return lambda m: [m.barriers.init(int(t), int(a), number.value) for t, a in _each(m, addresses)] and None
    if parts == ["inval"]:
        addresses = address_of(instruction.operands[0], program, TYPES["u32"])
        return lambda m: [m.barriers.invalidate(int(t), int(a)) for t, a in _each(m, addresses)] and None
    if parts in (["arrive", "expect_tx"], ["arrive"]):
        _, mem, *size = instruction.operands
        addresses = address_of(mem, program, TYPES["u32"])
        get = reader(size[0] if size else Imm(0), TYPES["u32"], program)

        def arrive(m: Any) -> None:
            sizes = np.broadcast_to(get(m), m.n)
            for thread, address in _each(m, addresses):
                barrier = m.barriers.at(int(thread), int(address))
                if not barrier.pending:
                    raise MemoryFaultError("more arrivals at an mbarrier than it expects")
                barrier.transfer += int(sizes[thread])
                barrier.pending -= 1
                barrier.settle()
                m.barriers.events += 1

        return arrive
    if parts == ["try_wait", "parity"]:
        done, mem, parity = instruction.operands
        put = writer(done, np.dtype(bool))
        addresses, get = address_of(mem, program, TYPES["u32"]), reader(parity, TYPES["u32"], program)

        def wait(m: Any) -> None:
            threads = m.active()
            address, parities = addresses(m, threads), np.broadcast_to(get(m), m.n)[threads]
            keys = np.stack([m.block[threads], address, parities], 1)
            different, inverse = np.unique(keys, axis=0, return_inverse=True)
            first = np.zeros(len(different), np.int64)
            first[inverse[::-1]] = threads[::-1]
            ready = np.array(
                [m.barriers.wait(int(t), int(a), int(p)) for t, (_, a, p) in zip(first, different, strict=True)]
            )
            result = np.zeros(m.n, bool)
            result[threads] = ready[inverse]
            put(m, result)
            for number, (thread, (_, where, _)) in enumerate(zip(first, different, strict=True)):
                m.barriers.seen_by(threads[inverse == number], m.barriers.at(int(thread), int(where)))
            if not result[threads].all():
                if m.pcs is None:
                    raise MemoryFaultError("an mbarrier that nobody completes is waited for")
                m.stalled[threads] = ~result[threads]

        return wait
    raise PtxError(instruction.op)


def _each(m: Any, addresses: Any) -> Any:
    threads = m.active()
    return zip(threads, addresses(m, threads), strict=True)


@builds("fence", "membar")
def _fence(instruction: Instruction, program: Any) -> Step:
    if instruction.op not in ("fence.proxy.async.shared::cta", "fence.proxy.async"):
        return lambda m: None

    def step(m: Any) -> None:
        shadow = m.shared.shadow.reshape(m.blocks, -1)
        if m.mask is None:
            shadow &= np.uint8(0xFF & ~UNFENCED)
        else:
            whole = m.mask.reshape(m.blocks, -1).all(1)
            shadow[whole] &= np.uint8(0xFF & ~UNFENCED)

    return step
