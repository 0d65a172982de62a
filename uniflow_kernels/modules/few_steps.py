"""Objectives of heads that draw in one or a few steps: mean flow, and self-distillation.

Such a head predicts the mean velocity between two times, u(x, s, e): where x stands at s, x + (e - s) u stands at e.
Where both times are equal u is the velocity itself, and both objectives are flow matching.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from uniflow_kernels.modules.chunks import Head, in_chunks, most_at_once
from uniflow_kernels.modules.flow_head import FlowHead
from uniflow_kernels.torch_private import uncompiled


def mean_flow_loss(
    head: nn.Module,
    condition: Tensor,
    data: Tensor,
    times: Tensor,
    noise: Tensor,
    *,
    cfg: float | Tensor = 1.0,
    null_condition: Tensor | None = None,
    power: float = 1.0,
    eps: float = 1e-3,
    mask: Tensor | None = None,
    time_scale: float = 1000.0,
    chunk_rows: int | Literal["auto"] | None = "auto",
) -> Tensor:
    """How far the mean velocity is from v + (e - s) du/ds, where v is the velocity at s, and du/ds along the path.

    A row's error is the mean over its channels of the squared distance, divided by (error + eps)^power, a constant.

    Args:
        head: of two `times`, as `FlowHead(times=2)`; it must treat every row by itself. It is called with x, time_scale
            times the times, and the condition.
        condition: [..., Z], float.
        data: x at time 1, [..., C], float.
        times: [..., 2] or [2], in [0, 1]: s and e. Where they are equal no derivative counts.
        noise: x at time 0, of the shape of `data`.
        cfg: the scale of guidance that the head is to have learnt, so that drawing needs none: v becomes
            null + cfg * (v - null), with the head's own velocity under `null_condition`. A number, or one a row, [...]:
            1 for rows whose condition is the null condition.
        null_condition: what guidance leads away from: [1, Z] for all rows, or like `condition`, and then a constant;
            zeros if not given.
        power: 1 in the paper; 0 is the plain squared error.
        eps: of the weight.
        mask: [...], bool: which rows count; all if not given.
        time_scale: see `head`.
        chunk_rows: how many rows are worked on at a time, see `flow_matching_loss`. A graph of torch.compile calls
            chunks as they are.

    Returns:
        In float32: the mean over the rows that count; a scalar. Differentiable in condition and the head's parameters.

    Raises:
        TypeError: if something is not floating point.
        ValueError: if the shapes do not fit together, or `chunk_rows` is less than 1.

    Source: Geng et al. 2025, Mean Flows for One-step Generative Modeling, eq. 8 to 10 and 19, in this package's
    direction of time.
    """
    settings = _Settings(cfg, null_condition, power, eps, time_scale, _mean_flow)
    return _loss(head, condition, data, times, noise, mask, settings, chunk_rows)


def self_distillation_loss(
    head: nn.Module,
    condition: Tensor,
    data: Tensor,
    times: Tensor,
    noise: Tensor,
    *,
    cfg: float | Tensor = 1.0,
    null_condition: Tensor | None = None,
    power: float = 0.0,
    eps: float = 1e-3,
    mask: Tensor | None = None,
    time_scale: float = 1000.0,
    chunk_rows: int | Literal["auto"] | None = "auto",
) -> Tensor:
    """How far the head's steps move otherwise than the head's own velocity where they lead.

    The step from s leads to X = x + (e - s) u(x, s, e). As e goes on, X moves by dX/de, which is to be the velocity
    there, u(X, e, e), a constant. Where both times are equal u is to be the data's velocity.

    Args:
        head, condition, data, times, noise, null_condition, mask, time_scale, chunk_rows, eps: see `mean_flow_loss`.
        cfg: see `mean_flow_loss`; of rows whose times are equal, from which the others learn it.
        power: see `mean_flow_loss`.

    Returns:
        In float32: the mean over the rows that count; a scalar. Differentiable in condition and the head's parameters.

    Raises:
        TypeError, ValueError: as `mean_flow_loss`.

    Source: Boffi et al. 2025, How to build a consistency model: Lagrangian self-distillation.
    """
    settings = _Settings(cfg, null_condition, power, eps, time_scale, _self_distillation)
    return _loss(head, condition, data, times, noise, mask, settings, chunk_rows)


class _Settings(NamedTuple):
    """The names are those of `mean_flow_loss`."""

    cfg: float | Tensor
    null_condition: Tensor | None
    power: float
    eps: float
    time_scale: float
    errors: Any  # of an objective: `_mean_flow` or `_self_distillation`

    def of(self, rows: slice) -> _Settings:
        """Those of some rows."""
        cfg, null = self.cfg, self.null_condition
        return self._replace(
            cfg=cfg[rows] if isinstance(cfg, Tensor) else cfg,
            null_condition=null if null is None or len(null) == 1 else null[rows],
        )

    def guided(self, head: Head, x: Tensor, begin: Tensor, velocity: Tensor, condition: Tensor) -> Tensor:
        """The velocity [M, C] that the head is to learn."""
        if not isinstance(self.cfg, Tensor) and self.cfg == 1.0:
            return velocity
        null = condition.new_zeros(()) if self.null_condition is None else self.null_condition
        cfg = self.cfg[:, None] if isinstance(self.cfg, Tensor) else self.cfg
        with torch.no_grad():
            away = head(
                x, self.time_scale * begin[:, None].expand(-1, 2), null.to(condition.dtype).expand_as(condition)
            )
        return away + cfg * (velocity - away)


class _Rows(NamedTuple):
    """What the loss of M rows is of, besides head and condition."""

    data: Tensor
    noise: Tensor
    times: Tensor
    mask: Tensor | None
    settings: _Settings

    def scale(self) -> Tensor:
        """One over the number of rows that count; a scalar in float32."""
        if self.mask is not None:
            return self.mask.sum().clamp(min=1).float().reciprocal()
        return self.data.new_full((), 1 / max(1, len(self.data)), dtype=torch.float32)

    def chunks(self, most: int) -> Iterator[tuple[slice, _Rows]]:
        """Where each chunk stands in the condition, and the chunk; one empty chunk of no rows."""
        for start in range(0, max(1, len(self.data)), most):
            rows = slice(start, start + most)
            mask = self.mask
            yield (
                rows,
                _Rows(
                    self.data[rows],
                    self.noise[rows],
                    self.times[rows],
                    None if mask is None else mask[rows],
                    self.settings.of(rows),
                ),
            )

    def loss(self, head: Head, condition: Tensor, reduction: str) -> Tensor:
        """The definition."""
        errors = self.settings.errors(self, head, condition)
        weights = (errors.detach() + self.settings.eps).pow(-self.settings.power)
        errors = (errors * weights).float()
        if self.mask is not None:
            errors = errors.where(self.mask, 0)
        return errors.sum() * self.scale() if reduction == "mean" else errors.sum()


def _mean_flow(rows: _Rows, head: Head, condition: Tensor) -> Tensor:
    """The squared error of each row, [M]."""
    settings, (begin, end) = rows.settings, rows.times.unbind(-1)
    x = torch.lerp(rows.noise, rows.data, begin[:, None])
    inside = x.to(condition.dtype)
    velocity = settings.guided(head, inside, begin, rows.data - rows.noise, condition)
    dt = settings.time_scale * torch.stack([torch.ones_like(begin), torch.zeros_like(begin)], dim=-1)
    times = settings.time_scale * rows.times
    mean, tangent = _with_tangent(head, inside, times, condition, velocity.to(condition.dtype), dt, stop_tangent=True)
    target = velocity + (end - begin)[:, None] * tangent
    return (mean - target.detach()).square().mean(-1)


def _self_distillation(rows: _Rows, head: Head, condition: Tensor) -> Tensor:
    """The squared error of each row, [M]."""
    settings, (begin, end) = rows.settings, rows.times.unbind(-1)
    x = torch.lerp(rows.noise, rows.data, begin[:, None])
    inside = x.to(condition.dtype)
    dt = settings.time_scale * torch.stack([torch.zeros_like(begin), torch.ones_like(begin)], dim=-1)
    mean, tangent = _with_tangent(head, inside, settings.time_scale * rows.times, condition, None, dt)
    length = (end - begin)[:, None]
    slope = mean + length * tangent
    with torch.no_grad():
        there = (x + length * mean).to(condition.dtype)
        target = head(there, settings.time_scale * end[:, None].expand(-1, 2), condition).to(x.dtype)
    true = settings.guided(head, inside, begin, rows.data - rows.noise, condition)
    return (slope - torch.where(length == 0, true, target)).square().mean(-1)


def _with_tangent(
    head: Any, x: Tensor, t: Tensor, c: Tensor, dx: Tensor | None, dt: Tensor, stop_tangent: bool = False
) -> tuple[Tensor, Tensor]:
    """What the head predicts and its derivative along dx and dt."""
    if hasattr(head, "jvp"):
        return head.jvp(x, t, c, dx, dt, stop_tangent=stop_tangent)
    given = (x, t), (torch.zeros_like(x) if dx is None else dx, dt)
    mean, tangent = torch.func.jvp(lambda x, t: head(x, t, c), *given)[:2]
    return mean, tangent.detach() if stop_tangent else tangent


def _loss(
    head: nn.Module,
    condition: Tensor,
    data: Tensor,
    times: Tensor,
    noise: Tensor,
    mask: Tensor | None,
    settings: _Settings,
    chunk_rows: int | Literal["auto"] | None,
) -> Tensor:
    _check(head, condition, data, times, noise, mask, settings)
    wide, cfg, null = torch.promote_types(data.dtype, torch.float32), settings.cfg, settings.null_condition
    batch = _Rows(
        data.to(wide).flatten(0, -2),
        noise.to(wide).flatten(0, -2),
        times.to(wide).expand(*data.shape[:-1], 2).reshape(-1, 2),
        None if mask is None else mask.flatten(),
        settings._replace(
            cfg=cfg.to(wide).flatten() if isinstance(cfg, Tensor) else cfg,
            null_condition=None if null is None else null.flatten(0, -2),
        ),
    )
    condition = condition.flatten(0, -2)
    most = most_at_once("chunk_rows", chunk_rows, len(batch.data), head, condition)
    if most is None:
        return batch.loss(head, condition, "mean")
    return uncompiled(in_chunks)(head, condition, batch, most)


def _check(
    head: nn.Module,
    condition: Tensor,
    data: Tensor,
    times: Tensor,
    noise: Tensor,
    mask: Tensor | None,
    settings: _Settings,
) -> None:
    given = {"condition": condition, "data": data, "times": times, "noise": noise}
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point dtype, got {tensor.dtype}")
    if data.ndim < 2:
        raise ValueError(f"data: expected shape [..., C], a row a token, got {tuple(data.shape)}")
    rows, cfg, null = tuple(data.shape[:-1]), settings.cfg, settings.null_condition
    if condition.ndim != data.ndim or condition.shape[:-1] != rows:
        raise ValueError(f"condition: expected shape {(*rows, 'Z')}, got {tuple(condition.shape)}")
    if noise.shape != data.shape:
        raise ValueError(f"noise: expected the shape of data, {tuple(data.shape)}, got {tuple(noise.shape)}")
    if times.shape not in ((2,), (*rows, 2)):
        raise ValueError(f"times: expected shape (2,) or {(*rows, 2)}, begin and end, got {tuple(times.shape)}")
    for name, value in (("mask", mask), ("cfg", cfg)):
        if isinstance(value, Tensor) and value.shape != rows:
            raise ValueError(f"{name}: expected shape {rows}, one value a row, got {tuple(value.shape)}")
    if null is not None and null.shape not in ((1, condition.shape[-1]), condition.shape):
        raise ValueError(
            f"null_condition: expected shape {(1, condition.shape[-1])} or {tuple(condition.shape)}, "
            f"got {tuple(null.shape)}"
        )
    if isinstance(head, FlowHead) and head.times != 2:
        raise ValueError("head: expected one of two times, as FlowHead(times=2) or `for_intervals()` gives")
