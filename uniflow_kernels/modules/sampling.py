"""Sampling a flow head: what is the same for all steps or all rows is computed once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from uniflow_kernels.graphs import GraphCache, why_not_graph
from uniflow_kernels.solvers import Plan, Update, guide, last_update

if TYPE_CHECKING:
    from uniflow_kernels.modules.flow_head import FlowHead


class Conditioned:
    """A head under a condition, at times known beforehand: they and the condition are embedded here, once.

    Args:
        head: what is sampled.
        condition: [..., z_channels].
        times: as the head takes them.
        null_condition: what guidance leads away from: [..., z_channels], or [1, z_channels] for all rows, whose
            modulations are then one row; None without guidance.
    """

    def __init__(
        self, head: FlowHead, condition: Tensor, times: Sequence[float], null_condition: Tensor | None = None
    ) -> None:
        self.head = head
        self.c = head.cond_embed(condition)
        self.null = None if null_condition is None else head.cond_embed(null_condition)
        # filled one by one: a list would be copied from the host, and the host would wait for it
        on_device = torch.stack([torch.full((), t, device=condition.device) for t in times])
        self.embedded = dict(zip(times, head.time_embed(on_device), strict=True))

    def __call__(self, x: Tensor, time: float) -> Tensor:
        """The head's output at x [..., in_channels], which is brought to the head's dtype, and one of the times."""
        return self.head.from_embedding(x.to(self.c.dtype), self.embedded[time] + self.c)

    def both(self, x: Tensor, time: float) -> list[Tensor]:
        """The outputs under the condition and under the null condition, in one pass."""
        assert self.null is not None
        embedded = self.embedded[time]
        return self.head.from_embeddings(x.to(self.c.dtype), [embedded + self.c, embedded + self.null])


def follow(
    head: FlowHead,
    noise: Tensor,
    condition: Tensor,
    plan: Plan,
    null_condition: Tensor | None = None,
    time_scale: float = 1000.0,
) -> Update:
    """Carry noise along the head's velocity to the last update, which is left to the caller.

    The state keeps the noise's dtype, the head works in its own.

    Args:
        head: predicts the velocity.
        noise: [..., in_channels], at t = 0.
        condition: [..., z_channels].
        plan: steps, solver and guidance.
        null_condition: as `Conditioned` takes it; zeros if not given.
        time_scale: the head is given time_scale * t.
    """
    if plan.cfg == 1.0:
        null_condition = None
    elif null_condition is None:
        null_condition = condition.new_zeros(1, condition.shape[-1])
    conditioned = Conditioned(head, condition, [time_scale * t for t in plan.times()], null_condition)

    def velocity(x: Tensor, t: float) -> Tensor:
        if not plan.guides_at(t):
            return conditioned(x, time_scale * t)
        v, null_velocity = conditioned.both(x, time_scale * t)
        return guide(v, null_velocity, plan.cfg)

    return last_update(velocity, noise, plan.steps, plan.schedule, plan.solver)


# by head, beside it and not in it: copies and pickles of a head know nothing of them
_GRAPHS: WeakKeyDictionary[FlowHead, GraphCache] = WeakKeyDictionary()


def replayed(head: FlowHead, sampler: Callable[..., Tensor], inputs: Sequence[Tensor | None], how: Hashable) -> Tensor:
    """sampler(*inputs), all its steps as one CUDA graph where that can be.

    Args:
        head: what the sampler evaluates.
        sampler: makes rows from the inputs and the head, and draws nothing.
        inputs: the first one is a tensor.
        how: the sampler's settings, to tell graphs apart.
    """
    assert inputs[0] is not None
    parameters = list(head.parameters())
    if why_not_graph(inputs[0].device, (*inputs, *parameters)) is not None:
        return sampler(*inputs)
    if (reason := head.why_not_captured()) is not None:
        warnings.warn(f"FlowHead.sample: the steps run without a CUDA graph: {reason}", stacklevel=3)
        return sampler(*inputs)
    graphs = _GRAPHS.get(head)
    if graphs is None:
        graphs = _GRAPHS.setdefault(head, GraphCache("FlowHead.sample"))
    return graphs(sampler, inputs, parameters, how)
