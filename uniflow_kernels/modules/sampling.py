"""Sampling a flow head: what is the same for all steps or all rows is computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uniflow_kernels.solvers import Plan, Update, guide, last_update

if TYPE_CHECKING:
    from uniflow_kernels.modules.flow_head import FlowHead


def follow(
    head: FlowHead,
    noise: Tensor,
    condition: Tensor,
    plan: Plan,
    null_condition: Tensor | None = None,
    time_scale: float = 1000.0,
) -> Update:
    """Carry noise along the head's velocity to the last update, which is left to the caller.

    The state keeps the noise's dtype, the head works in its own. The times of all steps are embedded before the first.

    Args:
        head: predicts the velocity.
        noise: [..., in_channels], at t = 0.
        condition: [..., z_channels].
        plan: steps, solver and guidance.
        null_condition: what guidance leads away from: [..., z_channels], or [1, z_channels] for all rows, whose
            modulations are then one row; zeros if not given.
        time_scale: the head is given time_scale * t.
    """
    c = head.cond_embed(condition)
    null = None
    if plan.cfg != 1.0:
        null = head.cond_embed(condition.new_zeros(1, head.z_channels) if null_condition is None else null_condition)
    times = plan.times()
    # filled one by one: a list would be copied from the host, and the host would wait for it
    scaled = torch.stack([torch.full((), t, device=noise.device) for t in times]) * time_scale
    embedded = dict(zip(times, head.time_embed(scaled), strict=True))

    def velocity(x: Tensor, t: float) -> Tensor:
        time, x = embedded[t], x.to(c.dtype)
        if null is None or not plan.guides_at(t):
            return head.from_embedding(x, time + c)
        v, null_velocity = head.from_embeddings(x, [time + c, time + null])
        return guide(v, null_velocity, plan.cfg)

    return last_update(velocity, noise, plan.steps, plan.schedule, plan.solver)
