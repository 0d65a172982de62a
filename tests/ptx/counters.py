"""What a profiler would count: instructions by class, sectors of global memory, conflicts of shared memory."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

CLASSES = {
    "fp32": {"fma", "add.f", "sub.f", "mul.f", "neg.f", "max.f", "min.f", "abs.f"},
    "mufu": {"ex2", "lg2", "rsqrt", "sqrt", "rcp", "sin", "cos", "tanh", "div.full", "div.approx"},
    "convert": {"cvt"},
    "shuffle": {"shfl", "vote", "elect", "prmt", "movmatrix"},
    "memory": {"ld", "st", "cp", "atom", "red", "ldmatrix", "stmatrix"},
    "tensor": {"mma", "wgmma"},
    "sync": {"bar", "barrier", "mbarrier", "fence", "membar", "bra", "ret", "exit"},
}


def class_of(op: str) -> str:
    """The pipe that an instruction takes, roughly."""
    parts = op.split(".")
    head, kind = parts[0], parts[-1]
    if (
        head in ("add", "sub", "mul", "neg", "max", "min", "abs", "fma")
        and kind.startswith(("f", "b"))
        and kind != "b32"
    ):
        return "fp32"
    if head == "div":
        return "mufu" if parts[1] in ("full", "approx") else "divide"
    if (
        (head in ("wgmma", "cp") and parts[1] in ("fence", "commit_group", "wait_group"))
        or "commit_group" in op
        or "wait_group" in op
    ):
        return "sync"
    return next((name for name, heads in CLASSES.items() if head in heads), "int")


def short(name: str) -> str:
    """A kernel's name without what C++ makes of it."""
    found = re.search(r"\d([a-z_]+_kernel)", name)
    return found[1] if found else name


@dataclass
class Access:
    """Accesses of one kind: by a warp, in 32-byte sectors or in passes over the banks."""

    requests: int = 0
    bytes: int = 0
    sectors: int = 0  # global: sectors; shared: wavefronts
    least: int = 0  # what as many bytes need at best


@dataclass
class Counters:
    """Of one launch."""

    kernel: str = ""
    blocks: int = 0
    warps: int = 0
    instructions: Counter = field(default_factory=Counter)
    access: dict[str, Access] = field(default_factory=dict)
    tensor_flops: int = 0
    shared: int = 0  # bytes of a block
    footprint: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # name: bytes read, written, in arguments
    of_a_block: dict[str, list[int]] = field(
        default_factory=dict
    )  # load or store: sectors and bytes, each once a block

    def of(self, kind: str) -> Access:
        return self.access.setdefault(kind, Access())

    def add_global(self, kind: str, address: np.ndarray, active: np.ndarray, width: int) -> None:
        """Addresses [warps * 32] of one instruction."""
        sector = np.where(active, address >> np.uint64(5), np.uint64(0)).reshape(-1, 32)
        ordered = np.sort(sector, 1)
        new = ordered[:, 1:] != ordered[:, :-1]
        count = (new & (ordered[:, 1:] != 0)).sum() + (ordered[:, 0] != 0).sum()
        threads = int(active.sum())
        into = self.of(kind)
        into.requests += int(active.reshape(-1, 32).any(1).sum())
        into.bytes += threads * width
        into.sectors += int(count)
        into.least += -(-threads * width // 32)

    def add_touched(self, kind: str, touched: np.ndarray) -> None:
        """Which bytes [blocks, n * 32] each of some blocks loaded or stored."""
        sectors, bytes_of = self.of_a_block.setdefault(kind, [0, 0])
        sectors += int(touched.reshape(len(touched), -1, 32).any(2).sum())
        self.of_a_block[kind] = [sectors, bytes_of + int(touched.sum())]

    def add_bulk(self, kind: str, size: int) -> None:
        into = self.of(kind)
        into.requests += 1
        into.bytes += size
        into.sectors += -(-size // 32)
        into.least += -(-size // 32)

    def add_shared(self, kind: str, address: np.ndarray, active: np.ndarray, width: int) -> None:
        """Passes over 32 banks of 4 bytes: a quarter of a warp at a time for 16 bytes, half of it for 8."""
        group = {16: 8, 8: 16}.get(width, 32)
        words = max(1, width // 4)
        word = (address.astype(np.int64) >> 2).reshape(-1, group)
        live = active.reshape(-1, group)
        every = (word[:, :, None] + np.arange(words)).reshape(len(word), -1)
        alive = np.repeat(live, words, 1)
        every = np.sort(np.where(alive, every, -1), 1)
        fresh = np.concatenate([every[:, :1] >= 0, (every[:, 1:] != every[:, :-1]) & (every[:, 1:] >= 0)], 1)
        bank = every % 32
        rows = np.broadcast_to(np.arange(len(every))[:, None], every.shape)
        counts = np.bincount((rows * 32 + bank)[fresh], minlength=len(every) * 32).reshape(-1, 32).max(1)
        into = self.of(kind)
        into.requests += int(active.reshape(-1, 32).any(1).sum())
        into.bytes += int(active.sum()) * width
        into.sectors += int(counts.sum())
        into.least += int((counts > 0).sum())

    def merge(self, other: Counters) -> None:
        self.blocks += other.blocks
        self.warps += other.warps
        self.instructions.update(other.instructions)
        self.tensor_flops += other.tensor_flops
        self.shared = max(self.shared, other.shared)
        for kind, sizes in other.of_a_block.items():
            self.of_a_block[kind] = [sum(pair) for pair in zip(self.of_a_block.get(kind, (0, 0)), sizes, strict=True)]
        for kind, access in other.access.items():
            into = self.of(kind)
            for name in ("requests", "bytes", "sectors", "least"):
                setattr(into, name, getattr(into, name) + getattr(access, name))
        for name, three in other.footprint.items():
            self.footprint[name] = tuple(map(sum, zip(self.footprint.get(name, (0, 0, 0)), three, strict=True)))

    def table(self) -> str:
        """One table in text."""
        total = sum(self.instructions.values())
        mix = ", ".join(f"{name} {count}" for name, count in self.instructions.most_common())
        of_each = self.warps // max(1, self.blocks)
        lines = [f"{self.kernel}: {self.blocks} blocks of {of_each} warps, {total} warp instructions: {mix}"]
        if self.tensor_flops:
            lines.append(f"  tensor FLOPs {self.tensor_flops:,}")
        for kind, access in sorted(self.access.items()):
            unit = "wavefronts" if kind.startswith("shared") else "sectors"
            lines.append(
                f"  {kind:22} requests {access.requests:8} bytes {access.bytes:11,} {unit} {access.sectors:9}"
                f" (least {access.least}, x{access.sectors / max(1, access.least):.2f})"
            )
        for name, (read, written, own) in self.footprint.items():
            lines.append(f"  {name:22} {own:11,} bytes: touched once {read:,} read, {written:,} written")
        return "\n".join(lines)
