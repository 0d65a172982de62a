"""One process or many: what torchrun started, and the few things that its processes tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from uniflow.training.interfaces import Losses, student_of
from uniflow_kernels.torch_private import tree_leaves, uncompiled

T = TypeVar("T")

READER_LOST = (
    "a process that reads samples was killed; if memory was short, fewer (recipe.workers) need less; --resume auto "
    "goes on from the last checkpoint"
)


class ProcessLostError(RuntimeError):
    """Another process of the job has ended, or one that reads samples."""


@dataclass(frozen=True)
class Processes:
    """The processes of the job and which of them this is; alone if torchrun has not started it.

    `control` is a group of CPUs, over which the processes agree without waiting for their GPUs; a process that has
    ended is noticed there first.
    """

    rank: int = 0
    world: int = 1
    control: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what all have in common."""
        return self.rank == 0

    def largest(self, *values: float) -> Sequence[float]:
        """The largest of each value among all processes."""
        if self.control is None:
            return values
        together = torch.tensor(values, dtype=torch.float64, device="cpu")
        dist.all_reduce(together, dist.ReduceOp.MAX, self.control)
        return together.tolist()

    def average(self, values: Tensor) -> Tensor:
        """The mean over the processes, on their device; in place."""
        if self.control is not None:
            dist.all_reduce(values)
            values /= self.world
        return values

    def of_all(self, value: T) -> list[T]:
        """The value that each process gives, by rank."""
        values = [value] * self.world
        if self.control is not None:
            dist.all_gather_object(values, value, self.control)
        return values

    def to_first(self, value: T) -> list[T]:
        """The value that each process gives, by rank, in the first; nothing in the others."""
        values: list[T] = [value] * self.world if self.first else []
        if self.control is not None:
            dist.gather_object(value, values if self.first else None, 0, self.control)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process."""
        made = [make() if self.first else None]
        if self.control is not None:
            dist.broadcast_object_list(made, 0, self.control)
        return cast(T, made[0])

    def wait(self) -> None:
        """Until all are here."""
        if self.control is not None:
            dist.barrier(self.control)


@contextmanager
def joined(
    device: torch.device, then: str = "--resume auto goes on from the last checkpoint"
) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that torchrun started, if it did; gives them and this process's device.

    Args:
        device: that of the user's choice.
        then: what to do where another process has ended, for the message.

    Raises:
        ProcessLostError: instead of what torch raises where another process of the job has ended.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        yield Processes(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo")), device
    except RuntimeError as error:
        if not _tells_of_a_loss(error):
            raise
        raise ProcessLostError(f"another process of the job has ended, and so does this one; {then}") from None
    dist.destroy_process_group()


@contextmanager
def watching_readers() -> Iterator[None]:
    """For what happens while processes read samples; torch tells of one that is killed wherever the program is then.

    Raises:
        ProcessLostError: instead of what torch raises.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise ProcessLostError(READER_LOST) from None


def _tells_of_a_loss(error: RuntimeError) -> bool:
    # torch has no type of its own for it
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "closed by peer"))


def shard(objective: nn.Module, precision: str, processes: Processes) -> None:
    """Spread the student's parameters over the processes, in place.

    Each of its `layers` is gathered when it is needed; the rest once a step. A teacher stays whole on every process.

    Raises:
        ValueError: if there are no processes.
        TypeError: when the objective is called, if FSDP cannot find the total in what it gives.
    """
    if processes.control is None:
        raise ValueError("parallel: fsdp needs torchrun")
    objective.register_forward_hook(_show_total)  # before FSDP's own
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bfloat16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the images are also what the loss compares with
    )
    student = student_of(objective)
    for layer in student.layers():
        fully_shard(layer, mp_policy=policy)
    others = set(objective.parameters()) - {parameter for _, parameter in student.named_parameters()}
    fully_shard(objective, mp_policy=policy, ignored_params=others)


@uncompiled
def _show_total(_objective: nn.Module, _inputs: Any, losses: Losses) -> None:
    """Let FSDP find the total: a root whose outputs it does not find keeps its parameters as they are, without a word.

    torch 2.11 looks where pytrees do, to which a dataclass is a leaf until it is registered; later ones look into
    dataclasses too.
    """
    kind = type(losses)

    def hidden() -> bool:
        return not any(leaf is losses.total for leaf in tree_leaves(losses))

    if hidden():
        if is_dataclass(kind):
            torch.export.register_dataclass(kind)
        if hidden():
            raise TypeError(f"objective: parallel: fsdp needs losses that are a dataclass with total, got {kind}")


def replicate(objective: nn.Module, processes: Processes) -> nn.Module:
    """The objective under DistributedDataParallel, for the parameters that are trained now."""
    if processes.control is None or isinstance(objective, FSDPModule):
        return objective
    return DistributedDataParallel(objective, gradient_as_bucket_view=True)


@contextmanager
def synchronized(objective: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged only in the `last` backward pass of a step."""
    pause: AbstractContextManager[Any] = nullcontext()
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(last)
    elif isinstance(objective, DistributedDataParallel) and not last:
        pause = objective.no_sync()
    with pause:
        yield


@contextmanager
def gathered(objective: nn.Module) -> Iterator[None]:
    """Inside the block the student can be called by itself, whatever holds its parameters."""
    if isinstance(objective, FSDPModule):
        objective.unshard()
    yield
    if isinstance(objective, FSDPModule):
        objective.reshard()
