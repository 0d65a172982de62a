"""Sampling a flow head: what is the same for all steps or all rows is computed once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniflow_kernels.graphs import GraphCache, Read, Reader, why_not_graph
from uniflow_kernels.ops.flow_blocks import Affine, Block, Form
from uniflow_kernels.ops.flow_fp8 import QuantizedLayers
from uniflow_kernels.ops.flow_head import ModulatedBlocks
from uniflow_kernels.ops.noise import where_drawn
from uniflow_kernels.solvers import Plan, Update, guide, last_update, schedule_steps
from uniflow_kernels.torch_private import has_autocast, is_any_hooked, is_forward_hooked, parameters_of


class Head(Protocol):
    """What of a `FlowHead`, a module, its sampling needs."""

    in_channels: int
    out_channels: int
    z_channels: int
    form: Form
    times: int
    precision: str | None
    cond_embed: nn.Linear
    input_proj: nn.Linear
    res_blocks: nn.ModuleList

    @property
    def time_embed(self) -> nn.Module:
        """t [...], or [..., 2] of a head of two times -> [..., W]."""
        ...

    @property
    def final_layer(self) -> _FinalLayer:
        """Its last layer, whose linear layer makes the output."""
        ...

    def tensors(self) -> tuple[list[Block], list[Affine], Affine | None]:
        """Blocks, modulations and final modulation."""
        ...

    def quantized(self) -> QuantizedLayers | None:
        """The layers of the modulations in the head's precision, if it has one."""
        ...

    def from_embedding(self, x: Tensor, y: Tensor, quantized: QuantizedLayers | None = None) -> Tensor:
        """The head behind its embeddings."""
        ...

    def from_embeddings(
        self, x: Tensor, ys: Iterable[Tensor], quantized: QuantizedLayers | None = None
    ) -> list[Tensor]:
        """The same for several conditions at one x."""
        ...

    def why_not_captured(self) -> str | None:
        """Why its modules must be called as they are in every step; None if its tensors are all that counts."""
        ...


class _FinalLayer(Protocol):
    linear: nn.Linear


Time = float | tuple[float, float]  # of a head of two times where a step begins and ends

# At most so many rows of modulations are made at a time: products of more rows gain nothing, and memory is bounded
# whatever the steps. At width W and depth D it is 256 * (3 D + 2) * W values, a seventh of the weights at W = 1024.
ROWS_AHEAD = 256


class Conditioned:
    """A head under a condition, at times known beforehand: they and the condition are embedded here, once.

    For few rows the modulations of many times are made together, and the modules are looked through once; not where
    gradients are wanted, inside torch.compile, or where a submodule was replaced or has a hook.

    Args:
        head: what is sampled.
        condition: [..., z_channels].
        times: as the head takes them, in the order in which they come or the other way round; pairs for two times.
        null_condition: what guidance leads away from: [..., z_channels], or [1, z_channels] for all rows, whose
            modulations are then one row; None without guidance.
        ahead: False where no memory is to be held for modulations made together.
    """

    def __init__(
        self,
        head: Head,
        condition: Tensor,
        times: Sequence[Time],
        null_condition: Tensor | None = None,
        ahead: bool = True,
    ) -> None:
        self.head = head
        self.quantized = head.quantized()  # once: a captured graph reads the weights again in every replay
        self.c = head.cond_embed(condition)
        self.null = None if null_condition is None else head.cond_embed(null_condition)
        # filled one by one: a list would be copied from the host, and the host would wait for it
        numbers = [number for time in times for number in (time if isinstance(time, tuple) else (time,))]
        on_device = torch.stack([torch.full((), t, dtype=torch.float32, device=condition.device) for t in numbers])
        self.embedded = head.time_embed(on_device.unflatten(0, (-1, 2)) if head.times == 2 else on_device)
        self.index = {time: i for i, time in enumerate(times)}
        self.ahead = _Ahead.of(head, self.embedded, self.c, self.null, self.quantized) if ahead else None

    def __call__(self, x: Tensor, time: Time) -> Tensor:
        """The head's output at x [..., in_channels], which is brought to the head's dtype, and one of the times."""
        x, i = x.to(self.c.dtype), self.index[time]
        if self.ahead is not None and self.ahead.serves(x):
            return self.ahead.alone(x, i)
        return self.head.from_embedding(x, self.embedded[i] + self.c, self.quantized)

    def both(self, x: Tensor, time: Time) -> list[Tensor]:
        """The outputs under the condition and under the null condition, in one pass."""
        assert self.null is not None
        x, i = x.to(self.c.dtype), self.index[time]
        if self.ahead is not None and self.ahead.serves(x):
            return self.ahead.both(x, i)
        ys = (self.embedded[i] + c for c in (self.c, self.null))  # each when it is needed
        return self.head.from_embeddings(x, ys, self.quantized)


class _Ahead:
    """A head whose modulations are made for several times at once.

    Args:
        head: the tensors of its submodules are all that counts.
        embedded: the times, [S, W].
        conditions: the embedded conditions of all R rows, and behind them the null condition's R or one, [C, W].
        rows: that go through the head at a time: R, or 2R with a null condition.
        shape: [...] of x.
        quantized: the layers that make the modulations, if not the head's own.
    """

    def __init__(
        self,
        head: Head,
        embedded: Tensor,
        conditions: Tensor,
        rows: int,
        shape: torch.Size,
        quantized: QuantizedLayers | None,
    ) -> None:
        self.embedded, self.conditions, self.shape = embedded, conditions, shape
        self.input, self.output = ((layer.weight, layer.bias) for layer in (head.input_proj, head.final_layer.linear))
        self.blocks = ModulatedBlocks(*head.tensors(), head.form, conditions, rows, quantized)
        self.together = ROWS_AHEAD // rows
        self.made: tuple[int, list[tuple[Tensor, ...]]] = (-1, [])

    @classmethod
    def of(
        cls, head: Head, embedded: Tensor, c: Tensor, null: Tensor | None, quantized: QuantizedLayers | None
    ) -> _Ahead | None:
        """None where it cannot serve, or where there is nothing to gain."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not head.res_blocks:
            return None
        conditions = c.reshape(-1, c.shape[-1])
        rows = len(conditions)
        if null is not None:
            if null.numel() != null.shape[-1] and null.shape != c.shape:
                return None
            conditions, rows = torch.cat([conditions, null.reshape(-1, c.shape[-1])]), 2 * rows
        if len(embedded) == 1 or not 0 < rows <= ROWS_AHEAD // 2 or head.why_not_captured() is not None:
            return None
        return cls(head, embedded, conditions, rows, c.shape[:-1], quantized)

    def serves(self, x: Tensor) -> bool:
        """Whether x is of the rows that the conditions are of, and wants no gradient."""
        return x.shape[:-1] == self.shape and not torch.is_grad_enabled()

    def alone(self, x: Tensor, i: int) -> Tensor:
        """The head's output [..., out_channels] at x [..., in_channels] and the i-th time."""
        modulations, rows = self._modulations(i), self.shape.numel()
        if self.blocks.rows != rows:  # those of the null condition are not wanted
            modulations = tuple(modulation[:rows] for modulation in modulations)
        out = self.blocks(F.linear(x.reshape(rows, -1), *self.input), modulations)
        return F.linear(out, *self.output).view(*self.shape, -1)

    def both(self, x: Tensor, i: int) -> list[Tensor]:
        """That, and the output under the null condition."""
        projected = F.linear(x.reshape(self.shape.numel(), -1), *self.input)
        out = self.blocks(torch.cat([projected, projected]), self._modulations(i))
        return list(F.linear(out, *self.output).view(2, *self.shape, -1))

    def _modulations(self, i: int) -> tuple[Tensor, ...]:
        """Those of the i-th time; made here with those of its neighbours if they are not there."""
        which, within = divmod(i, self.together)
        if self.made[0] != which:
            self.made = (-1, [])  # their memory is free for the next ones
            embedded = self.embedded[which * self.together : (which + 1) * self.together]
            self.made = which, self.blocks.modulations(embedded.unsqueeze(1) + self.conditions)
        return self.made[1][within]


def normal(
    shape: Sequence[int],
    device: torch.device,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers on `device`, drawn where the generator is."""
    drawn_on = where_drawn(generator, device)
    return torch.randn(shape, dtype=dtype, device=drawn_on, generator=generator).to(device)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise a TypeError if the argument of this name is not floating point."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating point dtype, got {tensor.dtype}")


def check_dtype(name: str, tensor: Tensor, layer: nn.Module) -> None:
    """The same, and if a linear layer as PyTorch has it would be given another dtype than that of its weight."""
    check_floating(name, tensor)
    weight = parameters_of(layer).get("weight") if type(layer) is nn.Linear else None
    if weight is None or weight.dtype == tensor.dtype or is_any_hooked() or is_forward_hooked(layer):
        return
    kind = tensor.device.type
    if not (has_autocast(kind) and torch.is_autocast_enabled(kind)):
        raise TypeError(f"{name}: expected {weight.dtype}, the dtype of the head's weights, got {tensor.dtype}")


def start(
    head: Head,
    condition: Tensor,
    plan: Plan,
    noise: Tensor | None,
    generator: torch.Generator | None,
    null_condition: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a `sampler` begins with: noise times temperature, the condition, and the null condition if it counts.

    Raises:
        TypeError, ValueError: as `FlowHead.sample` says.
    """
    plan.check(head.times)
    if condition.ndim == 0 or condition.shape[-1] != head.z_channels:
        raise ValueError(f"condition: expected shape [..., {head.z_channels}], got {tuple(condition.shape)}")
    if head.out_channels != head.in_channels:
        raise ValueError(f"out_channels: a velocity has those of x, {head.in_channels}, not {head.out_channels}")
    if null_condition is not None and null_condition.shape not in ((1, head.z_channels), condition.shape):
        raise ValueError(
            f"null_condition: expected shape (1, {head.z_channels}) or {tuple(condition.shape)}, "
            f"got {tuple(null_condition.shape)}"
        )
    shape = (*condition.shape[:-1], head.in_channels)
    if noise is None:
        noise = normal(shape, condition.device, generator)
    elif noise.shape != shape:
        raise ValueError(f"noise: expected shape {shape}, got {tuple(noise.shape)}")
    check_floating("noise", noise)
    check_dtype("condition", condition, head.cond_embed)
    if null_condition is not None:
        check_dtype("null_condition", null_condition, head.cond_embed)
    noise = noise.to(condition.device, torch.promote_types(condition.dtype, torch.float32)) * temperature
    return noise, condition, null_condition if plan.cfg != 1.0 else None


def sampler(head: Head, plan: Plan, time_scale: float) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """All steps, from noise, condition and null condition to rows in the condition's dtype."""

    def steps_of(noise: Tensor, condition: Tensor, null_condition: Tensor | None) -> Tensor:
        return follow(head, noise, condition, plan, null_condition, time_scale).taken().to(condition.dtype)

    return steps_of


def follow(
    head: Head,
    noise: Tensor,
    condition: Tensor,
    plan: Plan,
    null_condition: Tensor | None = None,
    time_scale: float = 1000.0,
    ahead: bool = True,
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
        ahead: see `Conditioned`.
    """
    if plan.cfg == 1.0:
        null_condition = None
    elif null_condition is None:
        null_condition = condition.new_zeros(1, condition.shape[-1])
    times: dict[float, Time] = {t: time_scale * t for t in plan.times()}
    if head.times == 2:
        times = {t: (time_scale * t, time_scale * (t + dt)) for t, dt in schedule_steps(plan.steps, plan.schedule)}
    conditioned = Conditioned(head, condition, list(times.values()), null_condition, ahead)
    del condition, null_condition  # it has embedded them

    def velocity(x: Tensor, t: float) -> Tensor:
        if not plan.guides_at(t):
            return conditioned(x, times[t])
        v, null_velocity = conditioned.both(x, times[t])
        return guide(v, null_velocity, plan.cfg)

    return last_update(velocity, noise, plan.steps, plan.schedule, plan.solver)


class _Replays(GraphCache):
    """The graphs of one head, which it does not hold; and what was said of its modules, until one of them changes."""

    def __init__(self) -> None:
        super().__init__("FlowHead.sample")
        self.reader = Reader()
        self._said: tuple[object, str | None] = (None, None)

    def why_not(self, head: Head, read: Read) -> str | None:
        """`head.why_not_captured()`, asked again where the modules are others or have hooks."""
        structure, reason = self._said
        if read.hooked:
            return head.why_not_captured()
        if structure is not read.structure:
            reason = head.why_not_captured()
            self._said = read.structure, reason
        return reason


# by head, beside it and not in it: copies and pickles of a head know nothing of them
_GRAPHS: WeakKeyDictionary[Head, _Replays] = WeakKeyDictionary()


def replayed(head: Head, sampler: Callable[..., Tensor], inputs: Sequence[Tensor | None], how: Hashable) -> Tensor:
    """sampler(*inputs), all its steps as one CUDA graph where that can be.

    Args:
        head: what the sampler evaluates.
        sampler: makes rows from the inputs and the head, and draws nothing.
        inputs: the first one is a tensor.
        how: the sampler's settings, to tell graphs apart.
    """
    assert inputs[0] is not None
    device = inputs[0].device
    if why_not_graph(device, inputs) is not None:
        return sampler(*inputs)
    graphs = _GRAPHS.get(head)
    if graphs is None:
        graphs = _GRAPHS.setdefault(head, _Replays())
    read = graphs.reader(cast(nn.Module, head))
    if why_not_graph(device, read.tensors) is not None:
        return sampler(*inputs)
    if (reason := graphs.why_not(head, read)) is not None:
        warnings.warn(f"FlowHead.sample: the steps run without a CUDA graph: {reason}", stacklevel=3)
        return sampler(*inputs)
    return graphs(sampler, inputs, read.tensors, (how, head.precision), read.structure)
