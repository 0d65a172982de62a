"""Flow matching of a per-token head: the loss and its gradients, all at once or chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from uniflow_kernels.modules.chunks import (
    Head,
    Step,
    accumulated_in,
    in_chunks,
    is_fsdp,
    keep,
    most_at_once,
    scaled,
    trained,
)
from uniflow_kernels.modules.flow_head import FlowHead
from uniflow_kernels.ops.flow_choice import dtype_of_products
from uniflow_kernels.ops.registration import register
from uniflow_kernels.ops.velocity import check_weights, interpolate_from, source_of, velocity_loss_from
from uniflow_kernels.source import Source
from uniflow_kernels.torch_private import (
    autograd_inside_op,
    constant,
    foreach_mul,
    object_of,
)


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
    columns = rows[2]
    if isinstance(head, FlowHead) and _wants_whole_lines(images):
        columns = head.padded_columns(dtype_of_products(condition))
    batch = _Batch(source, t, weights, mask, columns, time_scale)
    most = most_at_once("chunk_tokens", chunk_tokens, rows[0] * rows[1], head, condition)
    if most is None:
        return batch.loss(head, condition, "mean")  # one chunk: autograd does it with less ado
    for name, value in (("images", images), ("t", t), ("noise", noise)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected constants; chunk_tokens=None gives them a gradient")
    if torch.compiler.is_compiling() and not is_fsdp(head):
        return _compiled(head, condition, batch, most)
    return in_chunks(head, condition, batch, most)


def _wants_whole_lines(images: Tensor) -> bool:
    """Whether products of rows that are no multiple of 16 bytes are slower: on a CPU it gains nothing."""
    return images.is_cuda


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

    def scale(self) -> Tensor:
        """One over the number of tokens that count; a scalar in float32."""
        if self.mask is not None:
            return self.mask.sum().clamp(min=1).float().reciprocal()
        batch, tokens, _ = self.source.rows
        return self.source.images.new_full((), 1 / max(1, batch * tokens), dtype=torch.float32)

    def chunks(self, most: int) -> Iterator[tuple[tuple[slice, slice], _Batch]]:
        """Images and tokens of each chunk of about `most` tokens, and the chunk; one empty chunk of an empty batch."""
        (lines, across), count = self.source.grid, len(self.source.images)
        at_once = max(1, most // max(1, lines * across))
        height = max(1, lines if lines * across <= most else most // max(1, across))
        for start in range(0, max(1, count), at_once):
            images = slice(start, min(start + at_once, count))
            for top in range(0, max(1, lines), height):
                yield self._chunk(images, slice(top, min(top + height, lines)))

    def loss(self, head: Head, condition: Tensor, reduction: str) -> Tensor:
        """The definition: interpolate, head, velocity loss."""
        x_t = interpolate_from(self.source, self.t, self.columns, condition.dtype)
        t = self.time_scale * (self.t if self.t.ndim == 2 else self.t[:, None])
        tokens = condition.shape[:2]
        velocity = head(x_t.flatten(0, 1), t.expand(tokens).flatten(), condition.flatten(0, 1)).unflatten(0, tokens)
        # a head that was not built here, or whose forward is another, leaves the columns behind out
        columns = self.columns if velocity.shape[-1] == self.columns else None
        return velocity_loss_from(self.source, velocity, columns, self.weights, self.mask, reduction)

    def _chunk(self, images: slice, lines: slice) -> tuple[tuple[slice, slice], _Batch]:
        across = self.source.grid[1]
        tokens = slice(lines.start * across, lines.stop * across)
        at = (images, tokens)
        part = self._replace(
            source=self.source.part(images, lines),
            t=self.t[at] if self.t.ndim == 2 else self.t[images],
            weights=None if self.weights is None else self.weights[at],
            mask=None if self.mask is None else self.mask[at],
        )
        return at, part


def _compiled(head: nn.Module, condition: Tensor, batch: _Batch, chunk_tokens: int) -> Tensor:
    parameters = trained(head)
    if not torch.is_grad_enabled() or not (condition.requires_grad or parameters):
        return batch.loss(head, condition, "mean")
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
    step = Step(head, head, parameters, _Batch(source, *fields), chunk_tokens)
    with autograd_inside_op(), torch.autocast(condition.device.type, dtype=autocast, enabled=autocast is not None):
        loss, scale, gradients = step.run(condition, for_condition)
        return loss, scale, list(foreach_mul(gradients, 1.0)) if gradients else []  # that share no memory


def _flow_matching_fake(
    source: Source, condition: Tensor, parameters: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    for_condition = rest[-2]
    loss, scale = (condition.new_empty((), dtype=torch.float32) for _ in range(2))
    gradients = [torch.empty_like(condition)] if for_condition else []
    return loss, scale, gradients + [torch.empty_like(p, dtype=accumulated_in(p.dtype)) for p in parameters]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    _, scale, gradients = output
    keep(ctx, scale, gradients, inputs[-2], inputs[2])


def _backward(ctx: Any, incoming: Tensor, *_: Any) -> dict[str, Any]:
    for_condition, for_parameters = scaled(ctx, incoming, in_place=False)
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
