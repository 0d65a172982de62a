"""Flow matching of a per-token head, chunk by chunk: the loss and its gradients with the activations of one chunk.

The head mixes no tokens, so the loss is a sum over tokens, and its gradient can be made for a few thousand of them at a
time, right in the forward pass. What is kept is the gradient itself; the backward pass multiplies it by what comes in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from threading import RLock
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from uniflow_kernels.modules.casting import cast_once
from uniflow_kernels.modules.flow_head import FlowHead
from uniflow_kernels.ops.flow_choice import dtype_of_products
from uniflow_kernels.ops.registration import register
from uniflow_kernels.ops.velocity import (
    check_weights,
    interpolate_from,
    source_of,
    velocity_loss_and_gradient,
    velocity_loss_from,
)
from uniflow_kernels.source import Source
from uniflow_kernels.torch_private import (
    autograd_inside_op,
    constant,
    foreach_add_,
    foreach_mul,
    foreach_mul_,
    is_forward_mode,
    is_graph_kept,
    is_tensor_hooked,
    is_transforming,
    object_of,
)

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def flow_matching_loss(
    head: nn.Module,
    condition: Tensor,
    images: Tensor,
    t: Tensor,
    patch_size: int,
    noise: Tensor | None = None,
    seed: int | Tensor | torch.Generator | None = None,
    *,
    offset: int = 0,
    first_row: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    time_scale: float = 1.0,
    chunk_tokens: int | Literal["auto"] | None = "auto",
) -> Tensor:
    """`velocity_loss` of what the head makes of `interpolate`, without keeping the head's activations.

    The head is called as it is, hooks and all, with x_t [M, C*P*P] in the dtype of `condition`, time_scale*t [M] and
    the condition [M, Z], for M tokens at a time.

    Args:
        head: as `FlowHead`; it must treat every row by itself.
        condition: [B, N, Z], float.
        images, patch_size, noise, seed, offset, first_row, mean, std: see `interpolate`; the noise is the same for any
            chunk.
        t: [B] or [B, N], in [0, 1].
        weights, mask: [B, N], see `velocity_loss`.
        time_scale: what t is multiplied by for the head (1000 in UniFlow).
        chunk_tokens: how many tokens are worked on at a time: whole images, or whole lines of patches of one. None
            takes all at once and keeps the activations for the backward pass, as plain autograd does; so does a number
            that all tokens fit in. "auto" is 4096 on a CPU, and on a GPU, which waits for Python where there is little
            to do, up to 32768: as many as an eighth of its memory has room for; inside the transforms of torch.func and
            for forward-mode derivatives all at once, and a number that they do not fit in raises.

    Returns:
        In float32: the mean over the tokens that count; a scalar. Differentiable, once, in `condition` and the head's
        parameters; where all is one chunk also in images, t and noise, and more than once where the head is.

    Threads that want losses of one head take turns.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if the shapes do not fit together, `chunk_tokens` is less than 1, `images`, `t` or `noise` wants a
            gradient although there are chunks, or FSDP2 holds a part of the head sharded.
    """
    # a seed is drawn once for all chunks
    source = source_of(images, patch_size, noise, seed, offset, first_row, mean, std, repeats=1)
    rows = source.rows
    if condition.ndim != 3 or condition.shape[:2] != rows[:2]:
        raise ValueError(f"condition: expected shape {(*rows[:2], 'Z')}, one row a patch, got {tuple(condition.shape)}")
    if t.shape != rows[:1] and t.shape != rows[:2]:  # torch.compile takes "not in" wrongly
        raise ValueError(f"t: expected shape {rows[:1]} or {rows[:2]}, got {tuple(t.shape)}")
    check_weights(weights, mask, rows[:2])
    # on a CPU it gains nothing
    columns = head.padded_columns(condition.dtype) if isinstance(head, FlowHead) and images.is_cuda else rows[2]
    batch = _Batch(source, t, weights, mask, columns, time_scale)
    transformed = is_transforming() or is_forward_mode()
    if chunk_tokens == "auto":
        memory = _memory_of(condition.device.index) if condition.is_cuda else None
        chunk_tokens = None if transformed else _tokens_at_once(head, dtype_of_products(condition), memory)
    if isinstance(chunk_tokens, str) or (chunk_tokens is not None and chunk_tokens < 1):
        raise ValueError(f'chunk_tokens: expected at least 1, or None for all at once, or "auto", got {chunk_tokens!r}')
    if chunk_tokens is None or rows[0] * rows[1] <= chunk_tokens:
        return _loss(head, condition, batch, "mean")  # one chunk: autograd does it with less ado
    if transformed:
        raise ValueError("chunk_tokens: expected None inside torch.func's transforms and for forward-mode derivatives")
    for name, value in (("images", images), ("t", t), ("noise", noise)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected constants; chunk_tokens=None gives them a gradient")
    if _is_fsdp(head):
        return _within_call(head, lambda c: _chunked(head, head.forward, c, batch, chunk_tokens), condition)
    return _chunked(head, head, condition, batch, chunk_tokens)


class _Batch(NamedTuple):
    """What the loss is of, besides head and condition; the names are those of `flow_matching_loss`.

    x_t has `columns`.
    """

    source: Source
    t: Tensor
    weights: Tensor | None
    mask: Tensor | None
    columns: int
    time_scale: float

    def times(self) -> Tensor:
        """What the head is given as t: [B, N], or [B, 1] where an image has one."""
        return self.time_scale * (self.t if self.t.ndim == 2 else self.t[:, None])

    def scale(self) -> Tensor:
        """One over the number of tokens that count; a scalar in float32."""
        if self.mask is not None:
            return self.mask.sum().clamp(min=1).float().reciprocal()
        batch, tokens, _ = self.source.rows
        return self.source.images.new_full((), 1 / max(1, batch * tokens), dtype=torch.float32)

    def chunks(self, most: int) -> Iterator[tuple[slice, slice, _Batch]]:
        """Images and tokens of each chunk of about `most` tokens, and the chunk; one empty chunk of an empty batch."""
        (lines, across), count = self.source.grid, len(self.source.images)
        at_once = max(1, most // max(1, lines * across))
        height = max(1, lines if lines * across <= most else most // max(1, across))
        for start in range(0, max(1, count), at_once):
            images = slice(start, min(start + at_once, count))
            for top in range(0, max(1, lines), height):
                yield self._chunk(images, slice(top, min(top + height, lines)))

    def _chunk(self, images: slice, lines: slice) -> tuple[slice, slice, _Batch]:
        across = self.source.grid[1]
        tokens = slice(lines.start * across, lines.stop * across)
        at = (images, tokens)
        part = self._replace(
            source=self.source.part(images, lines),
            t=self.t[at] if self.t.ndim == 2 else self.t[images],
            weights=None if self.weights is None else self.weights[at],
            mask=None if self.mask is None else self.mask[at],
        )
        return images, tokens, part


def _loss(head: Head, condition: Tensor, batch: _Batch, reduction: str) -> Tensor:
    """The definition: interpolate, head, velocity loss."""
    velocity = _velocity(head, condition, batch, batch.times())
    return velocity_loss_from(batch.source, velocity, None, batch.weights, batch.mask, reduction)


def _velocity(head: Head, condition: Tensor, batch: _Batch, times: Tensor) -> Tensor:
    """What the head makes of the batch, at `batch.times()`."""
    x_t, tokens = interpolate_from(batch.source, batch.t, batch.columns, condition.dtype), condition.shape[:2]
    return head(x_t.flatten(0, 1), times.expand(tokens).flatten(), condition.flatten(0, 1)).unflatten(0, tokens)


# --- chunk by chunk ---


@constant
def _memory_of(gpu: int) -> int:
    """Its bytes, used or not."""
    return torch.cuda.get_device_properties(gpu).total_memory


def _tokens_at_once(head: nn.Module, dtype: torch.dtype, memory: int | None) -> int:
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


def _chunked(head: nn.Module, call: Head, condition: Tensor, batch: _Batch, chunk_tokens: int) -> Tensor:
    parameters = _trained(head)
    compiling = torch.compiler.is_compiling()
    if not torch.is_grad_enabled() or not (condition.requires_grad or parameters):
        if compiling:
            return _loss(call, condition, batch, "mean")
        losses = [
            _loss(call, condition[images, tokens], part, "sum") for images, tokens, part in batch.chunks(chunk_tokens)
        ]
        return torch.stack(losses).sum() * batch.scale()
    if compiling:
        device = condition.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return flow_matching_op(
            batch.source,
            condition,
            parameters,
            *batch[1:],
            chunk_tokens,
            _remember(id(head)),
            condition.requires_grad,
            autocast,
        )
    with _turn(head):  # another thread's stand-ins are none of its parameters
        step = _Step(head, call, _trained(head), batch, chunk_tokens)
        return _FlowMatching.apply(step, condition, *step.parameters)


_turns: WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = WeakKeyDictionary()


def _turn(head: nn.Module) -> AbstractContextManager[Any]:
    """One thread at a time."""
    return _turns.setdefault(head, RLock())


def _trained(head: nn.Module) -> list[Tensor]:
    """The parameters that want a gradient."""
    for name, parameter in head.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"head: its parameter {name} is sharded; call fully_shard on the whole head that is given here and on "
                "no part of it, or make the loss inside a call of the module that is sharded"
            )
    return [parameter for parameter in head.parameters() if parameter.requires_grad]


def _in_place_of_trained(head: nn.Module, stand_ins: list[Tensor]) -> dict[str, Tensor]:
    """The stand-in for every place in `_HeadOf(head)` that holds a trained parameter: shared ones have several."""
    of = dict(zip(map(id, _trained(head)), stand_ins, strict=True))
    places = (
        (path, module.named_parameters(recurse=False, remove_duplicate=False))
        for path, module in head.named_modules(prefix="head")
    )
    return {f"{path}.{name}": of[id(p)] for path, own in places for name, p in own if id(p) in of}


class _Step(NamedTuple):
    """Loss and gradients of one batch."""

    head: nn.Module
    call: Head
    parameters: Sequence[Tensor]
    batch: _Batch
    chunk_tokens: int

    def run(self, condition: Tensor, for_condition: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The mean loss, one over the number of tokens that count, and the gradients of the sum of their losses.

        The sum's, not the mean's: that would vanish in float16, where a head's activations may be. The gradients are
        that of the condition, if it is wanted, and those of the parameters, half precision in float32.
        """
        condition = condition.detach()
        with torch.enable_grad(), _turn(self.head):
            if (cast := cast_once(self.head, _trained(self.head), self.parameters, condition.device.type)) is not None:
                loss, gradients = self._replace(call=cast[0])._over_chunks(condition, for_condition, cast[1])
            elif self._are_the_heads_own():
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

    def _are_the_heads_own(self) -> bool:
        """Whether the parameters are those in the head, and have no hooks.

        Hooks must see the one gradient that the backward pass brings, not those of the chunks; a compiled graph may
        bring tensors of its own. Stand-ins in the head are seen by all threads.
        """
        own = _trained(self.head)
        return all(map(operator.is_, self.parameters, own)) and not any(map(is_tensor_hooked, own))

    def _over_chunks(
        self, condition: Tensor, for_condition: bool, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        sums = _Sums(parameters)
        rows = [torch.empty_like(condition)] if for_condition else []
        losses, times = [], self.batch.times()
        for images, tokens, part in self.batch.chunks(self.chunk_tokens):
            c = condition[images, tokens].requires_grad_(for_condition)
            of_part = times[images, tokens] if times.shape[1] > 1 else times[images]
            velocity = _velocity(self.call, c, part, of_part)
            loss, gradient = velocity_loss_and_gradient(part.source, velocity, part.weights, part.mask)
            losses.append(loss)
            inputs = [c, *parameters] if for_condition else parameters
            found = torch.autograd.grad(velocity, inputs, gradient, allow_unused=True, materialize_grads=True)
            if for_condition:
                rows[0][images, tokens] = found[0]
            sums.add(found[int(for_condition) :])
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
            if _launches(of[0]) and dtype != _accumulated_in(dtype):
                sizes = [tensor.numel() for tensor in of]
                whole = torch.zeros(sum(sizes), dtype=_accumulated_in(dtype), device=of[0].device)
                sums = [part.view(tensor.shape) for part, tensor in zip(whole.split(sizes), of, strict=True)]
            else:
                sums = [torch.zeros_like(tensor, dtype=_accumulated_in(dtype)) for tensor in of]
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


def _accumulated_in(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _keep(ctx: Any, scale: Tensor, gradients: list[Tensor], for_condition: bool, parameters: Sequence[Tensor]) -> None:
    ctx.save_for_backward(scale, *gradients)
    ctx.for_condition = for_condition
    ctx.dtypes = [p.dtype for p in parameters]


def _scaled(ctx: Any, incoming: Tensor, in_place: bool) -> tuple[Tensor | None, list[Tensor]]:
    """What was kept, as gradients of condition and parameters."""
    scale, *gradients = ctx.saved_tensors
    if in_place:
        foreach_mul_(gradients, incoming * scale)
    else:
        gradients = list(foreach_mul(gradients, incoming * scale))
    for_condition = gradients.pop(0) if ctx.for_condition else None
    return for_condition, [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]


class _FlowMatching(torch.autograd.Function):
    """Condition and parameters to the loss; its parameters are inputs, so that their hooks see one gradient a step."""

    @staticmethod
    def forward(ctx: Any, step: _Step, condition: Tensor, *parameters: Tensor) -> Tensor:
        loss, scale, gradients = step.run(condition, condition.requires_grad)
        _keep(ctx, scale, gradients, condition.requires_grad, parameters)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        again = is_graph_kept()
        for_condition, for_parameters = _scaled(ctx, incoming, in_place=not again)
        return None, for_condition, *for_parameters


# --- FSDP2 ---


def _is_fsdp(head: nn.Module) -> bool:
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


# --- the registered op: what a compiled graph calls, where nothing looks into the head ---

_heads: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


@constant
def _remember(number: int) -> int:
    """The id of the head, which stands for it in a graph; the graph is compiled again for another one."""
    _heads[number] = object_of(number)
    return number


def _flow_matching(
    source: Source, condition: Tensor, parameters: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *fields, chunk_tokens, head_number, for_condition, autocast = rest
    head = _heads[head_number]
    step = _Step(head, head, parameters, _Batch(source, *fields), chunk_tokens)
    with autograd_inside_op(), torch.autocast(condition.device.type, dtype=autocast, enabled=autocast is not None):
        loss, scale, gradients = step.run(condition, for_condition)
        return loss, scale, list(foreach_mul(gradients, 1.0)) if gradients else []  # that share no memory


def _flow_matching_fake(
    source: Source, condition: Tensor, parameters: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    for_condition = rest[-2]
    loss, scale = (condition.new_empty((), dtype=torch.float32) for _ in range(2))
    gradients = [torch.empty_like(condition)] if for_condition else []
    return loss, scale, gradients + [torch.empty_like(p, dtype=_accumulated_in(p.dtype)) for p in parameters]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    _, scale, gradients = output
    _keep(ctx, scale, gradients, inputs[-2], inputs[2])


def _backward(ctx: Any, incoming: Tensor, *_: Any) -> dict[str, Any]:
    for_condition, for_parameters = _scaled(ctx, incoming, in_place=False)
    return {"condition": for_condition, "parameters": for_parameters}


flow_matching_op = register(
    "flow_matching(Tensor condition, Tensor[] parameters, Tensor images, Tensor t, Tensor? noise, Tensor? held, "
    "Tensor? weights, Tensor? mask, float[]? mean, float[]? std, SymInt number, SymInt offset, SymInt first_row, "
    "SymInt patch_size, SymInt columns, float time_scale, "
    "SymInt chunk_tokens, int head, bool for_condition, ScalarType? autocast) -> (Tensor, Tensor, Tensor[])",
    _flow_matching,
    _flow_matching_fake,
    _setup,
    _backward,
    group=Source,
)
