"""Losses of a per-token head, chunk by chunk, with their gradients: the activations of one chunk are held at a time.

The head mixes no rows, so a loss is a sum over rows, and its gradient can be made for a few thousand of them at a time,
right in the forward pass. What is kept is the gradient itself; the backward pass multiplies it by what comes in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from threading import RLock
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from uniflow_kernels.modules.casting import cast_once
from uniflow_kernels.modules.flow_head import FlowHead
from uniflow_kernels.ops.flow_choice import dtype_of_products
from uniflow_kernels.torch_private import (
    constant,
    foreach_add_,
    foreach_mul,
    foreach_mul_,
    is_forward_mode,
    is_graph_kept,
    is_tensor_hooked,
    is_transforming,
)

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


@constant
def _memory_of(gpu: int) -> int:
    """Its bytes, used or not."""
    return torch.cuda.get_device_properties(gpu).total_memory


def rows_at_once(head: nn.Module, dtype: torch.dtype, memory: int | None) -> int:
    """The chunk of a head that works in a dtype, on a GPU with so many bytes or on a CPU (None): a power of two.

    It depends on nothing that changes from step to step, so that runs are the same.
    """
    if memory is None:
        return 4096
    chunk = 32768
    # 7 values a block and channel are kept, counted; of another head as of the release's
    depth, width = (len(head.res_blocks), head.model_channels) if isinstance(head, FlowHead) else (12, 1024)
    while chunk > 4096 and chunk * 7 * depth * width * dtype.itemsize > memory // 8:
        chunk //= 2
    return chunk


def most_at_once(
    name: str, given: int | Literal["auto"] | None, rows: int, head: nn.Module, condition: Tensor
) -> int | None:
    """How many of so many rows are worked on at a time; None for all at once.

    Args:
        name: of the argument that is given, for errors.
        given: a number, None for all, or "auto".
        rows: that there are.
        head: whose rows they are.
        condition: of any rows.

    Raises:
        ValueError: for less than 1, or for less than all where only all at once can be differentiated.
    """
    transformed = is_transforming() or is_forward_mode()
    if given == "auto":
        memory = _memory_of(condition.device.index) if condition.is_cuda else None
        given = None if transformed else rows_at_once(head, dtype_of_products(condition), memory)
    if isinstance(given, str) or (given is not None and given < 1):
        raise ValueError(f'{name}: expected at least 1, or None for all at once, or "auto", got {given!r}')
    if given is None or rows <= given:
        return None
    if transformed:
        raise ValueError(f"{name}: expected None inside torch.func's transforms and for forward-mode derivatives")
    return given


class Batch(Protocol):
    """What is worked on in chunks: rows that a head treats each by itself, with what their loss is of."""

    def scale(self) -> Tensor:
        """One over the number of rows that count; a scalar in float32."""
        ...

    def chunks(self, most: int) -> Iterator[tuple[Any, Batch]]:
        """Where each chunk of about `most` rows stands in the condition, and the chunk."""
        ...

    def loss(self, head: Head, condition: Tensor, reduction: str) -> Tensor:
        """The "mean" or the "sum" of the losses of the rows that count."""
        ...


def in_chunks(head: nn.Module, condition: Tensor, batch: Batch, most: int) -> Tensor:
    """The mean loss of a batch, of `most` rows at a time; gradients of condition and head are made on the way."""
    if is_fsdp(head):
        return _within_call(head, lambda c: _in_chunks(head, head.forward, c, batch, most), condition)
    return _in_chunks(head, head, condition, batch, most)


def _in_chunks(head: nn.Module, call: Head, condition: Tensor, batch: Batch, most: int) -> Tensor:
    parameters = trained(head)
    if not torch.is_grad_enabled() or not (condition.requires_grad or parameters):
        losses = [part.loss(call, condition[place], "sum") for place, part in batch.chunks(most)]
        return torch.stack(losses).sum() * batch.scale()
    with _turn(head):  # another thread's stand-ins are none of its parameters
        step = Step(head, call, trained(head), batch, most)
        return _InChunks.apply(step, condition, *step.parameters)


_turns: WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = WeakKeyDictionary()


def _turn(head: nn.Module) -> AbstractContextManager[Any]:
    """One thread at a time."""
    return _turns.setdefault(head, RLock())


def trained(head: nn.Module) -> list[Tensor]:
    """The parameters that want a gradient."""
    found: list[Tensor] = []
    for name, parameter in head.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"head: its parameter {name} is sharded; call fully_shard on the whole head that is given here and on "
                "no part of it, or make the loss inside a call of the module that is sharded"
            )
        if parameter.requires_grad:
            found.append(parameter)
    return found


def _in_place_of_trained(head: nn.Module, stand_ins: list[Tensor]) -> dict[str, Tensor]:
    """The stand-in for every place in `_HeadOf(head)` that holds a trained parameter: shared ones have several."""
    of = dict(zip(map(id, trained(head)), stand_ins, strict=True))
    places = (
        (path, module.named_parameters(recurse=False, remove_duplicate=False))
        for path, module in head.named_modules(prefix="head")
    )
    return {f"{path}.{name}": of[id(p)] for path, own in places for name, p in own if id(p) in of}


class Step(NamedTuple):
    """Loss and gradients of one batch."""

    head: nn.Module
    call: Head
    parameters: Sequence[Tensor]
    batch: Batch
    most: int

    def run(self, condition: Tensor, for_condition: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The mean loss, one over the number of tokens that count, and the gradients of the sum of their losses.

        The sum's, not the mean's: that would vanish in float16, where a head's activations may be. The gradients are
        that of the condition, if it is wanted, and those of the parameters, half precision in float32.
        """
        condition = condition.detach()
        with torch.enable_grad(), _turn(self.head):
            own = trained(self.head)
            if (cast := cast_once(self.head, own, self.parameters, condition.device.type)) is not None:
                loss, gradients = self._replace(call=cast[0])._over_chunks(condition, for_condition, cast[1])
            elif self._are_the_heads(own):
                loss, gradients = self._over_chunks(condition, for_condition, self.parameters)
            else:
                stand_ins = [parameter.detach().requires_grad_() for parameter in self.parameters]
                loss, gradients = functional_call(
                    _HeadOf(self.head),
                    _in_place_of_trained(self.head, stand_ins),
                    (self._over_chunks, condition, for_condition, stand_ins),
                    tie_weights=False,
                )
        scale = self.batch.scale()
        return loss * scale, scale, gradients

    def _are_the_heads(self, own: list[Tensor]) -> bool:
        """Whether the parameters are those in the head, its `own`, and have no hooks.

        Hooks must see the one gradient that the backward pass brings, not those of the chunks; a compiled graph may
        bring tensors of its own. Stand-ins in the head are seen by all threads.
        """
        return all(map(operator.is_, self.parameters, own)) and not any(map(is_tensor_hooked, own))

    def _over_chunks(
        self, condition: Tensor, for_condition: bool, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        sums = _Sums(parameters)
        rows = [torch.empty_like(condition)] if for_condition else []
        losses, one = [], condition.new_ones((), dtype=torch.float32)  # what autograd would make for every chunk
        for place, part in self.batch.chunks(self.most):
            c = condition[place].requires_grad_(for_condition)
            loss = part.loss(self.call, c, "sum")
            losses.append(loss.detach())
            inputs = [c, *parameters] if for_condition else parameters
            found = torch.autograd.grad(loss, inputs, one, allow_unused=True, materialize_grads=True)
            if for_condition:
                rows[0][place] = found[0]
            sums.add(found[int(for_condition) :])
            del found  # before those of the next chunk are made
        return torch.stack(losses).sum(), rows + sums.each


class _HeadOf(nn.Module):
    """Runs a function while `functional_call` has other tensors in the place of the head's parameters."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class _Sums:
    """Sums of gradients that come chunk by chunk, those of half precision in float32.

    On a GPU those of half precision lie side by side, and a chunk's are added in two launches: torch's own addition of
    many tensors takes no two dtypes together and would make a launch for each. Others it adds in a few.

    Args:
        like: tensors of which the gradients are.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.each = list(like)  # in whose places they come
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, tensor in enumerate(like):
            by_dtype.setdefault(tensor.dtype, []).append(i)
        self._groups: list[tuple[list[int], list[Tensor], Tensor | None]] = []
        for dtype, places in by_dtype.items():
            of, whole = [like[i] for i in places], None
            if _launches(of[0]) and dtype != accumulated_in(dtype):
                sizes = [tensor.numel() for tensor in of]
                whole = torch.zeros(sum(sizes), dtype=accumulated_in(dtype), device=of[0].device)
                sums = [part.view(tensor.shape) for part, tensor in zip(whole.split(sizes), of, strict=True)]
            else:
                sums = [torch.zeros_like(tensor, dtype=accumulated_in(dtype)) for tensor in of]
            self._groups.append((places, sums, whole))
            for i, tensor in zip(places, sums, strict=True):
                self.each[i] = tensor

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Those of one more chunk."""
        for places, sums, whole in self._groups:
            found = [gradients[i] for i in places]
            if whole is None:
                foreach_add_(sums, found)
            else:
                whole.add_(torch.cat([gradient.reshape(-1) for gradient in found]))


def _launches(tensor: Tensor) -> bool:
    """Whether an operation costs a launch; on a CPU it costs the memory that it takes, and one copy more is slower."""
    return tensor.is_cuda


def accumulated_in(dtype: torch.dtype) -> torch.dtype:
    """In what dtype gradients of a dtype are summed."""
    return torch.promote_types(dtype, torch.float32)


def keep(ctx: Any, scale: Tensor, gradients: list[Tensor], for_condition: bool, parameters: Sequence[Tensor]) -> None:
    """Save what `scaled` needs."""
    ctx.save_for_backward(scale, *gradients)
    ctx.for_condition = for_condition
    ctx.dtypes = [p.dtype for p in parameters]


def scaled(ctx: Any, incoming: Tensor, in_place: bool) -> tuple[Tensor | None, list[Tensor]]:
    """What was kept, as gradients of condition and parameters."""
    scale, *gradients = ctx.saved_tensors
    if in_place:
        foreach_mul_(gradients, incoming * scale)
    else:
        gradients = list(foreach_mul(gradients, incoming * scale))
    for_condition = gradients.pop(0) if ctx.for_condition else None
    return for_condition, [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]


class _InChunks(torch.autograd.Function):
    """Condition and parameters to the loss; its parameters are inputs, so that their hooks see one gradient a step."""

    @staticmethod
    def forward(ctx: Any, step: Step, condition: Tensor, *parameters: Tensor) -> Tensor:
        loss, scale, gradients = step.run(condition, condition.requires_grad)
        keep(ctx, scale, gradients, condition.requires_grad, parameters)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        again = is_graph_kept()
        for_condition, for_parameters = scaled(ctx, incoming, in_place=not again)
        return None, for_condition, *for_parameters


# --- FSDP2 ---


def is_fsdp(head: nn.Module) -> bool:
    """Whether FSDP2 holds the head."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(head, FSDPModule)


def _within_call(head: nn.Module, step: Callable[[Tensor], Tensor], condition: Tensor) -> Tensor:
    """`step` as one call of a head under FSDP2: its hooks gather the parameters before, and reduce their gradients."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    name = "_flow_matching_step"
    setattr(head, name, step)
    try:
        register_fsdp_forward_method(head, name)
        return getattr(head, name)(condition)
    finally:
        delattr(head, name)
