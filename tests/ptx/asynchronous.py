"""What lands later: cp.async, TMA, mbarriers and wgmma. Late by default: at the wait that it is promised for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .memory import IN_FLIGHT, SHARED_BASE, UNFENCED, VALID, MemoryFaultError
from .operands import PARAM_WINDOW, TYPES, Step, address_of, builds, count_access, reader
from .parse import Imm, Instruction, Mem, PtxError


@dataclass
class Copy:
    """A cp.async by some threads, each with the number of its group."""

    threads: np.ndarray
    group: np.ndarray
    flat: np.ndarray
    source: np.ndarray
    size: np.ndarray
    width: int


@dataclass
class Bulk:
    """A box that TMA moves for one thread."""

    thread: int
    block: int
    tensor_map: Any
    coordinates: tuple[int, ...]
    flat: np.ndarray
    pc: int
    group: int = 0
    landed: bool = False


class Copies:
    """cp.async and TMA of a batch of blocks."""

    def __init__(self, m: Any) -> None:
        self.m = m
        self.pending: list[Copy] = []
        self.stores: list[Bulk] = []
        self.committed = np.zeros(m.n, np.int64)
        self.bulk_committed = np.zeros(m.n, np.int64)
        self.reading = np.zeros(len(m.shared.data) // 16, np.uint16)  # units that a store or a product still reads

    def check_write(self, flat: np.ndarray, width: int) -> None:
        if self.stores or self.m.products.busy:
            bad = self.reading[flat // 16] > 0
            if bad.any():
                self.m.report(
                    "write where an asynchronous store or product still reads",
                    f"{int(bad.sum())} accesses",
                    int(bad.sum()),
                )

    # --- cp.async

    def issue(self, threads: np.ndarray, address: np.ndarray, source: np.ndarray, size: np.ndarray, width: int) -> None:
        m = self.m
        flat = m.shared.flat(m.block[threads], address.astype(np.int64), width)
        m.check_shared_write(threads, flat, width)
        copy = Copy(threads, self.committed[threads], flat, source, size, width)
        if m.options.early:
            self._land(copy, np.ones(len(threads), bool))
        else:
            m.shared.put(flat, np.full(len(flat), np.nan).astype(m.shared.get(flat[:1], width).dtype), width, IN_FLIGHT)
            self.pending.append(copy)

    def _land(self, copy: Copy, now: np.ndarray) -> None:
        m = self.m
        threads, flat, size = copy.threads[now], copy.flat[now], copy.size[now]
        values = np.zeros((len(threads), copy.width), np.uint8)
        some = size > 0
        if some.any():
            if (size[some] != copy.width).any():
                raise PtxError("cp.async of a part")
            source = copy.source[now][some]
            count_access(m, "global cp.async", source, threads[some], copy.width)
            values[some] = m.read_global(threads[some], source, copy.width).view(np.uint8).reshape(-1, copy.width)
        unit = m.shared.get(flat[:1], copy.width).dtype
        m.shared.put(flat, values.view(unit)[:, 0], copy.width, VALID | UNFENCED)
        if m.shared.races is not None:
            m.conflicts("shared memory", m.shared.races, threads, flat, copy.width)

    def commit(self) -> None:
        self.committed[self.m.active()] += 1

    def wait(self, pending: int) -> None:
        active = np.zeros(self.m.n, bool)
        active[self.m.active()] = True
        kept = []
        for copy in self.pending:
            now = active[copy.threads] & (copy.group < self.committed[copy.threads] - pending)
            if now.any():
                self._land(copy, now)
            if not now.all():
                left = ~now
                kept.append(
                    Copy(
                        *(values[left] for values in (copy.threads, copy.group, copy.flat, copy.source, copy.size)),
                        copy.width,
                    )
                )
        self.pending = kept

    # --- TMA

    def box(self, thread: int, tensor_map: Any, coordinates: tuple[int, ...], address: int) -> Bulk:
        m = self.m
        block = int(m.block[thread])
        if address % 128:
            raise MemoryFaultError(f"TMA at shared address {address - SHARED_BASE}, no multiple of 128")
        flat = m.shared.flat(block, tensor_map.places(address), 16)
        return Bulk(thread, block, tensor_map, coordinates, flat, m.pc)

    def load(self, bulk: Bulk, barrier: Any) -> None:
        m = self.m
        threads = np.full(len(bulk.flat), bulk.thread)
        m.check_shared_write(threads, bulk.flat, 16)
        _, some = m.shared.states(bulk.flat, 16)
        unfenced = (some & np.uint64(int.from_bytes(bytes([UNFENCED]) * 8, "little"))) != 0
        if unfenced.any():
            m.report(
                "TMA load over generic writes without fence.proxy.async",
                f"{int(unfenced.sum())} units",
                int(unfenced.sum()),
            )
        if m.shared.races is not None:
            m.conflicts("shared memory (TMA)", m.shared.races, threads, bulk.flat, 16)
        if m.options.early:
            self.land_load(bulk, barrier)
        else:
            m.shared.put(bulk.flat, np.full(len(bulk.flat), np.nan + 1j * np.nan), 16, IN_FLIGHT)
            barrier.loads.append(bulk)

    def land_load(self, bulk: Bulk, barrier: Any) -> None:
        m, tensor_map = self.m, bulk.tensor_map
        row_bytes = tensor_map.box[0] * tensor_map.item
        values = np.full((tensor_map.box_bytes // row_bytes, row_bytes), tensor_map.fill, np.uint8)
        number, address, first, length = tensor_map.rows(bulk.coordinates)
        if length and len(number):
            values[number, first : first + length] = self._global_rows(bulk, address, length, False)
        m.shared.put(bulk.flat, values.reshape(-1).view(np.complex128), 16, VALID)
        m.counters.add_bulk("global TMA load", len(number) * length)
        barrier.transfer -= tensor_map.box_bytes
        barrier.settle()
        m.barriers.events += 1

    def _global_rows(self, bulk: Bulk, address: np.ndarray, length: int, writes: bool) -> np.ndarray:
        """The bytes [rows, length] at addresses; noted, and checked for bounds. For writes a view's places."""
        m = self.m
        (allocation, mask), *more = m.memory.split(address, length)
        if mask is not None or more:
            raise MemoryFaultError(f"a box of {bulk.tensor_map.name} in several allocations")
        at = address - allocation.base
        places = at[:, None] + np.arange(length)
        if allocation.covered is not None and not allocation.covered[places].all():
            m.report(
                f"global {'write' if writes else 'read'} outside every argument's elements",
                f"TMA of {bulk.tensor_map.name}",
            )
        threads = np.full(len(at), bulk.thread)
        if m.options.counters:
            m.touch(allocation, threads, places, writes)
        if allocation.races is not None:
            arguments = (places, m.global_warp[threads], m.epoch[m.block[threads]], m.warps_per_block)
            if writes:
                m.conflicts("global memory", allocation.races, threads, at, length)
            elif (bad := allocation.races.read(*arguments)).any():
                m.report("global memory race: read after write", f"TMA of {bulk.tensor_map.name}", int(bad.sum()))
        if writes:
            self._target = (allocation, places)
            return places
        return allocation.data[places]

    def store(self, bulk: Bulk) -> None:
        bulk.group = int(self.bulk_committed[bulk.thread])
        if self.m.options.early:
            self._land_store(bulk)
        else:
            self.reading[bulk.flat // 16] += 1
            self.stores.append(bulk)

    def _land_store(self, bulk: Bulk) -> None:
        m, tensor_map = self.m, bulk.tensor_map
        m.check_shared_read(np.full(len(bulk.flat), bulk.thread), bulk.flat, 16, asynchronous=True)
        row_bytes = tensor_map.box[0] * tensor_map.item
        values = m.shared.get(bulk.flat, 16).view(np.uint8).reshape(-1, row_bytes)
        number, address, first, length = tensor_map.rows(bulk.coordinates)
        if length and len(number):
            self._global_rows(bulk, address, length, True)
            allocation, places = self._target
            allocation.data[places] = values[number, first : first + length]
        m.counters.add_bulk("global TMA store", len(number) * length)

    def bulk_commit(self) -> None:
        self.bulk_committed[self.m.active()] += 1

    def bulk_wait(self, pending: int) -> None:
        if not self.stores:
            return
        active = set(self.m.active().tolist())
        kept = []
        for bulk in self.stores:
            if bulk.thread in active and bulk.group < self.bulk_committed[bulk.thread] - pending:
                self.reading[bulk.flat // 16] -= 1
                self._land_store(bulk)
            else:
                kept.append(bulk)
        self.stores = kept

    def finish(self) -> None:
        m = self.m
        if self.stores:
            m.pc = self.stores[0].pc
            m.report("the kernel ends before a bulk store was waited for", f"{len(self.stores)} boxes")
        for bulk in self.stores:
            self._land_store(bulk)
        if self.pending:
            m.report("the kernel ends before a cp.async was waited for", f"{len(self.pending)} copies")
        for barrier in m.barriers.known.values():
            if barrier.loads:
                m.report("the kernel ends before a TMA load was waited for", f"{len(barrier.loads)} boxes")


@builds("cp")
def _cp(instruction: Instruction, program: Any) -> Step:
    op = instruction.op
    if op == "cp.async.commit_group":
        return lambda m: m.copies.commit()
    if op in ("cp.async.wait_group", "cp.async.wait_all"):
        pending = instruction.operands[0].value if instruction.operands else 0
        return lambda m: (m.copies.commit() if op.endswith("all") else None, m.copies.wait(pending))[0]
    if op == "cp.async.bulk.commit_group":
        return lambda m: m.copies.bulk_commit()
    if op in ("cp.async.bulk.wait_group", "cp.async.bulk.wait_group.read"):
        left = instruction.operands[0].value
        return lambda m: m.copies.bulk_wait(left)
    if op.startswith("cp.async.bulk.tensor."):
        return _tensor_copy(instruction, program)
    if instruction.parts[:2] == ("cp", "async") and instruction.parts[2] in ("ca", "cg"):
        return _small_copy(instruction, program)
    raise PtxError(op)


def _small_copy(instruction: Instruction, program: Any) -> Step:
    to, source, width, *size = instruction.operands
    width = width.value
    addresses, sources = address_of(to, program, TYPES["u32"]), address_of(source, program, TYPES["u64"])
    get_size = reader(size[0] if size else Imm(width), TYPES["u32"], program)

    def step(m: Any) -> None:
        threads = m.active()
        address = addresses(m, threads)
        count_access(m, "shared cp.async", address, threads, width, True)
        m.copies.issue(threads, address, sources(m, threads), np.broadcast_to(get_size(m), m.n)[threads], width)

    return step


def tensor_map_at(m: Any, address: int) -> Any:
    """The tensor map whose 128 bytes lie at a generic address, which a launch has put among the parameters."""
    offset = address - PARAM_WINDOW
    if not 0 <= offset <= len(m.params) - 128 or offset % 64:
        raise MemoryFaultError(f"no tensor map at {address:#x}")
    return m.launch.tensor_maps[int(m.params[offset : offset + 8].view(np.uint64)[0])]


def _tensor_copy(instruction: Instruction, program: Any) -> Step:
    loads = ".mbarrier::complete_tx::bytes" in instruction.op
    ways = [f"shared::{where}.global.mbarrier::complete_tx::bytes" for where in ("cta", "cluster")]
    ways.append("global.shared::cta.bulk_group")
    plain = instruction.op in {f"cp.async.bulk.tensor.{rank}d.{way}" for rank in range(1, 6) for way in ways}
    if not plain:
        raise PtxError(instruction.op)
    shared, tensor = instruction.operands[:2] if loads else instruction.operands[1::-1]
    addresses = address_of(shared, program, TYPES["u32"])
    maps = address_of(Mem(tensor.base, tensor.offset), program, TYPES["u64"])
    coordinates = [reader(item, TYPES["s32"], program) for item in tensor.coordinates]
    barriers = address_of(instruction.operands[2], program, TYPES["u32"]) if loads else None

    def step(m: Any) -> None:
        threads = m.active()
        address, where = addresses(m, threads), maps(m, threads)
        at = np.stack([np.broadcast_to(get(m), m.n)[threads] for get in coordinates], 1)
        barrier = barriers(m, threads) if loads else None
        for i, thread in enumerate(threads):
            tensor_map = tensor_map_at(m, int(where[i]))
            bulk = m.copies.box(int(thread), tensor_map, tuple(map(int, at[i])), int(address[i]))
            if loads:
                m.copies.load(bulk, m.barriers.at(int(thread), int(barrier[i])))
            else:
                m.copies.store(bulk)

    return step
