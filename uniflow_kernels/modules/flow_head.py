"""The per-token velocity network: an MLP with adaptive LayerNorm, keys and numbers of the official SimpleMLPAdaLN.

Everything is applied to the last dimension; the others may have any number and broadcast, so that what is the same for
many rows (the time embedding of a shared t, the modulation of a shared condition) is computed once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from itertools import chain, repeat
from operator import contains, itemgetter
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniflow_kernels.modules.flow_layers import (
    FinalLayer,
    FlowBlock,
    IntervalEmbedding,
    LayerNorm,
    TimestepEmbedding,
    affine_of,
    modulation_of,
)
from uniflow_kernels.modules.sampling import check_dtype, replayed, sampler, start
from uniflow_kernels.ops.flow_blocks import Affine, Block, Form, block_after_block, check_choice, in_order
from uniflow_kernels.ops.flow_choice import (
    Call,
    call_of,
    choose_path,
    dtype_of_products,
    explain,
    is_plain_for,
    what_is_shared,
)
from uniflow_kernels.ops.flow_fp8 import QuantizedLayers
from uniflow_kernels.ops.flow_head import RECOMPUTE, run_flow_blocks, run_quantized
from uniflow_kernels.ops.flow_tangents import Dual, Rules, flow_blocks_with_tangents
from uniflow_kernels.ops.fp8_linear import check_precision, explain_fp8, refused
from uniflow_kernels.packing import packed
from uniflow_kernels.solvers import Interval, Plan
from uniflow_kernels.torch_private import (
    BACKWARD_HOOKS,
    CHILDREN,
    FORWARD_HOOKS,
    PARAMETERS,
    children_of,
    is_any_hooked,
    is_forward_hooked,
    is_hooked,
)

Tensors = tuple[list[Block], list[Affine], Affine | None]  # as `fused_flow_blocks` takes them


class FlowHead(nn.Module):
    """Predicts, token by token, the velocity at x and t under a condition c.

    Args:
        in_channels: size of a row of x.
        model_channels: width W.
        out_channels: size of a row of the output.
        z_channels: size of a row of the condition.
        num_res_blocks: number of flow blocks.
        grad_checkpointing: the same as recompute="block"; can be set later.
        norm: "layer", or "rms" (VibeVoice, DeCo); the blocks' has a weight (and a bias if "layer"), the final one none.
        eps: of the norms.
        mlp: "silu", or "swiglu" (Ming-UniVision, SphereAR, VibeVoice), with parameters mlp.w12 and mlp.w3.
        hidden: size of the MLP's hidden layer; W by default.
        bias: whether the linear layers have one.
        modulation_order: how the modulations lie side by side: "shift-scale-gate" or "scale-shift-gate" (SphereAR); in
            the final layer without the gate.
        modulation_groups: number of groups of consecutive blocks that share one modulation, held by the group's first
            block (SphereAR); by default every block has its own.
        final_modulation: whether the final layer is modulated.
        recompute: what the backward pass computes again instead of keeping it: "none", or "block": everything but the
            blocks' inputs.
        precision: "fp8" for modulations made of 8-bit floats, which have no gradient: for inference; None for those of
            the parameters' dtype. Can be set later.
        times: 1, or 2 for a head that predicts the mean velocity between two times: then t is [M, 2] or [2], where a
            step begins and where it ends.

    Raises:
        ValueError: for an unknown name, groups that do not divide the number of blocks, or other `times`.

    Source: `SimpleMLPAdaLN` of the official release (first in MAR); same parameter names, shapes and numbers.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        z_channels: int,
        num_res_blocks: int,
        grad_checkpointing: bool = False,
        *,
        norm: str = "layer",
        eps: float = 1e-6,
        mlp: str = "silu",
        hidden: int | None = None,
        bias: bool = True,
        modulation_order: str = "shift-scale-gate",
        modulation_groups: int | None = None,
        final_modulation: bool = True,
        recompute: str = "none",
        precision: str | None = None,
        times: int = 1,
    ) -> None:
        super().__init__()
        if times not in (1, 2):
            raise ValueError(f"times: expected 1 or 2, got {times}")
        form = Form(norm, eps, mlp, modulation_order)
        form.check()
        check_precision(precision)
        check_choice("recompute", recompute, RECOMPUTE)
        groups = num_res_blocks if modulation_groups is None else modulation_groups
        if num_res_blocks and (groups < 1 or num_res_blocks % groups):
            raise ValueError(f"modulation_groups: expected a divisor of the {num_res_blocks} blocks, got {groups}")
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.z_channels = z_channels
        self.num_res_blocks = num_res_blocks
        self.grad_checkpointing = grad_checkpointing
        self.form = form
        self.recompute = recompute
        self.precision = precision
        self.times = times
        self.blocks_per_group = num_res_blocks // groups if num_res_blocks else 1

        embedding = TimestepEmbedding if times == 1 else IntervalEmbedding
        self.time_embed: Any = embedding(model_channels, bias)
        self.cond_embed = nn.Linear(z_channels, model_channels, bias)
        self.input_proj = nn.Linear(in_channels, model_channels, bias)
        self.res_blocks = nn.ModuleList(
            FlowBlock(model_channels, form, hidden, bias, modulated=i % self.blocks_per_group == 0)
            for i in range(num_res_blocks)
        )
        self.final_layer = FinalLayer(model_channels, out_channels, form, bias, final_modulation)
        self._remember_parts()
        self._found = _Found()
        self.reset_parameters()

    def for_intervals(self) -> FlowHead:
        """A copy for two times, to be trained for few steps: where both are equal its velocity is this head's."""
        head = copy.deepcopy(self)
        if self.times == 1:
            embedding = IntervalEmbedding(self.model_channels)
            for place in range(2):
                embedding[place] = copy.deepcopy(self.time_embed)
            head.time_embed, head.times = embedding, 2
            head._remember_parts()
        return head

    def _remember_parts(self) -> None:
        self._built = {whole: [type(part) for part in self._parts(whole)] for whole in (False, True)}

    def reset_parameters(self) -> None:
        """As in MAR: Xavier for products, std 0.02 for the time MLP, zero for modulations and output, so that v = 0."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                elif name.startswith("time_embed"):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor | float, c: Tensor) -> Tensor:
        """Velocity at x and t under the condition c.

        Args:
            x: [M, in_channels], or [M, `padded_columns`] with zeros in the columns behind, and then the result has as
                many behind its own as make its rows a multiple of 16 bytes too.
            t: [M], or one t for all rows: a number, a 0-d tensor or [1].
            c: [M, z_channels], or [1, z_channels]: one condition for all rows (its modulations are computed once).

        Returns:
            [M, out_channels].

        Raises:
            TypeError: if x or c is not floating point, or not in the weights' dtype without autocast; or t complex.
            ValueError: if the shapes do not fit together, or the head's `precision` cannot serve.
        """
        t = self._checked(x, t, c)
        return self.from_embedding(x, self.time_embed(t) + self.cond_embed(c))

    def jvp(
        self,
        x: Tensor,
        t: Tensor | float,
        c: Tensor,
        dx: Tensor | None,
        dt: Tensor | float,
        dc: Tensor | None = None,
        *,
        stop_tangent: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The velocity and its derivative along a direction, in one pass.

        What `torch.func.jvp` gives, in less time and memory. Both are differentiable. See docs/few_steps.md for what
        kernels serve.

        Args:
            x, t, c: as `forward` takes them.
            dx: the direction of x, of its shape and dtype; None for zeros.
            dt: that of t: of its shape, or a number for all.
            dc: that of c, of its shape and dtype; zeros if not given.
            stop_tangent: the derivative is a constant for gradients, and nothing is kept for it.

        Returns:
            (velocity, tangent), [M, out_channels] each.

        Raises:
            TypeError: as `forward`, or if a direction has another dtype.
            ValueError: as `forward`, if a direction has another shape, for a head whose `precision` is set, or if the
                backend asked for cannot serve.
        """
        t = self._checked(x, t, c)
        if self.precision is not None:
            raise ValueError(f"precision: {self.precision} has no derivatives")
        dt = dt if isinstance(dt, Tensor) else torch.full_like(t, dt, dtype=torch.promote_types(t.dtype, torch.float32))
        for name, value, direction in (("dx", x, dx), ("dt", t, dt), ("dc", c, dc)):
            if direction is not None and direction.shape != value.shape:
                raise ValueError(f"{name}: expected shape {tuple(value.shape)}, got {tuple(direction.shape)}")
            if direction is not None and value is not t and direction.dtype != value.dtype:
                raise TypeError(f"{name}: expected {value.dtype}, got {direction.dtype}")
        if self._why_not_fused() is not None or self.why_not_captured() is not None:
            along = torch.zeros_like(x) if dx is None else dx, dt, torch.zeros_like(c) if dc is None else dc
            velocity, tangent = cast(tuple[Tensor, Tensor], torch.func.jvp(self, (x, t.to(dt.dtype), c), along))
            return velocity, tangent.detach() if stop_tangent else tangent
        rules, blocks = Rules(recorded=not stop_tangent), self.tensors()
        y = rules.sum(self.time_embed.with_tangent(t, dt, rules), rules.linear(Dual(c, dc), affine_of(self.cond_embed)))
        columns = slice(self.in_channels)  # zeros are behind
        rows = Dual(x[:, columns], None if dx is None else dx[:, columns])
        projected = rules.linear(rows, affine_of(self.input_proj))
        last = affine_of(self.final_layer.linear)
        made = flow_blocks_with_tangents(projected, y, *blocks, last, self.form, rules)
        assert made.tangent is not None
        return made.value, made.tangent

    def _checked(self, x: Tensor, t: Tensor | float, c: Tensor) -> Tensor:
        """The time as a tensor, if all fits."""
        check_dtype("x", x, self.input_proj)
        check_dtype("c", c, self.cond_embed)
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device) if not isinstance(t, Tensor) else t
        if x.ndim != 2 or x.shape[1] not in (self.in_channels, self.padded_columns(dtype_of_products(x))):
            raise ValueError(f"x: expected shape [M, {self.in_channels}], got {tuple(x.shape)}")
        if self.times == 2 and t.shape not in ((2,), (1, 2), (x.shape[0], 2)):
            raise ValueError(f"t: expected shape [2] or [{x.shape[0]}, 2], begin and end, got {tuple(t.shape)}")
        if self.times == 1 and t.shape not in ((), (1,), x.shape[:1]):
            raise ValueError(f"t: expected a scalar or shape [{x.shape[0]}], one t a row of x, got {tuple(t.shape)}")
        if c.ndim != 2 or c.shape[1] != self.z_channels or c.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"c: expected shape [{x.shape[0]} or 1, {self.z_channels}], got {tuple(c.shape)}")
        return t

    def sample(
        self,
        condition: Tensor,
        steps: int,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        schedule: str = "linear",
        solver: str = "euler",
        cfg: float = 1.0,
        cfg_interval: Interval | None = None,
        null_condition: Tensor | None = None,
        temperature: float = 1.0,
        time_scale: float = 1000.0,
    ) -> Tensor:
        """Draw rows under a condition: follow the velocity from noise at t = 0 to t = 1.

        For up to 128 rows, half as many with guidance, the modulations of many steps are made before them and held.

        On CUDA all steps become one graph, captured the second time that a kind of input comes (shapes, dtypes,
        settings); the last eight kinds are kept. Weights are read where they are, so a training step between two calls
        is seen. Where a graph cannot serve, the steps run one by one: while gradients are wanted, inside torch.compile
        or another capture; and, with a warning, where modules have hooks or were replaced, or the capture fails.

        Args:
            condition: [..., z_channels], in the head's dtype.
            steps: number of steps, at least 1.
            noise: [..., in_channels] to start from; drawn in float32 if not given. The state between the steps is
                float32 (float64 for a head in float64).
            generator: to draw it with, on any device.
            schedule: "linear", "pow_p" or "shifted_a", see `uniflow_kernels.solvers.schedule_steps`.
            solver: "euler", "heun" or "midpoint"; the last two evaluate the head twice in a step. A head of two `times`
                knows where a step ends, and takes "euler" alone.
            cfg: guidance scale; 1 is none.
            cfg_interval: the sigmas at which to guide, see `uniflow_kernels.solvers.guides_at`.
            null_condition: what guidance leads away from: [1, z_channels] for all rows, or like `condition`; zeros if
                not given.
            temperature: what the noise is multiplied by.
            time_scale: the head was trained on time_scale * t (UniFlow: 1000).

        Returns:
            [..., in_channels], in the condition's dtype.

        Raises:
            TypeError: if condition, null condition or noise is not floating point; or one of the first two is not in
                the weights' dtype without autocast.
            ValueError: if the shapes do not fit together, or for an unknown schedule or solver.
        """
        plan = Plan(steps, schedule, solver, cfg, cfg_interval)
        inputs = start(self, condition, plan, noise, generator, null_condition, temperature)
        return replayed(self, sampler(self, plan, time_scale), inputs, (plan, time_scale))

    def from_embedding(self, x: Tensor, y: Tensor, quantized: QuantizedLayers | None = None) -> Tensor:
        """The head behind its embeddings.

        Args:
            x: [..., in_channels], or with columns of zeros behind, as `forward` takes them.
            y: time embedding plus condition embedding, before SiLU: [..., W], broadcastable to x's rows.
            quantized: what `quantized` gave before, which is else asked here.

        Returns:
            [..., out_channels].
        """
        return self._from_projection(self._projected(x), y, quantized, x.shape[-1] > self.in_channels)

    def from_embeddings(
        self, x: Tensor, ys: Iterable[Tensor], quantized: QuantizedLayers | None = None
    ) -> list[Tensor]:
        """The head at the same x for several conditions, as guidance needs it: x is projected once.

        The arguments are as `from_embedding` takes them; gives as many tensors [..., out_channels].
        """
        x = self._projected(x)
        return [self._from_projection(x, y, quantized) for y in ys]

    def quantized(self, precision: str | None = None) -> QuantizedLayers | None:
        """The layers of the modulations in a precision, or else in the head's own; None where neither asks for any.

        Raises:
            ValueError: for an unknown precision, or if the modules must be called as they are.
        """
        if precision is None and self.precision is None:
            return None
        check_precision(precision or self.precision)
        if (reason := self._why_not_fused()) is not None:
            raise refused(reason)
        _, modulations, final = self.tensors()
        return QuantizedLayers.of(modulations, final)

    def padded_columns(self, dtype: torch.dtype) -> int:
        """in_channels, rounded up so that rows of this dtype are a multiple of 16 bytes (588 in bfloat16: 592).

        On a GPU products of rows of other lengths take slower kernels; `interpolate(columns=...)` writes such rows, and
        `velocity_loss(columns=...)` reads them.
        """
        return self.in_channels + _behind(self.in_channels, dtype)

    def _projected(self, x: Tensor) -> Tensor:
        """`input_proj` of x [..., in_channels], or of x with columns of zeros behind, by a weight with as many."""
        layer, behind = self.input_proj, x.shape[-1] - self.in_channels
        if not behind:
            return layer(x)
        if not _is_plain(layer):
            return layer(x[..., : self.in_channels])
        return F.linear(x, _padded(layer.weight, (0, behind)), layer.bias)

    def _velocity(self, x: Tensor, padded: bool) -> Tensor:
        """`final_layer.linear` of x [..., W], with columns of zeros behind, if padded, by a weight of as many."""
        layer = self.final_layer.linear
        behind = _behind(layer.out_features, dtype_of_products(x)) if padded else 0
        if not behind:
            return layer(x)
        if not _is_plain(layer):
            return F.pad(layer(x), (0, behind))
        bias = None if layer.bias is None else _padded(layer.bias, (0, behind))
        return F.linear(x, _padded(layer.weight, (0, 0, 0, behind)), bias)

    def _from_projection(self, x: Tensor, y: Tensor, quantized: QuantizedLayers | None, padded: bool = False) -> Tensor:
        quantized = quantized or self.quantized()
        if quantized is not None:
            return self._velocity(run_quantized(x, y, *self.tensors(), self.form, quantized=quantized), padded)
        recompute = "block" if self.grad_checkpointing else self.recompute
        tensors = self._found(self)
        if tensors is None:
            reason = self._why_not_fused()
            choose_path(Call(x.device, x.dtype, self.model_channels, 0, rows=None, why_not=reason))  # raises, or eager
            out = self._by_modules(x, y, recompute == "block" and torch.is_grad_enabled())
            return F.pad(out, (0, _behind(out.shape[-1], dtype_of_products(x)))) if padded else out
        path = "eager" if is_plain_for(x) else choose_path(call_of(x, y, *tensors))
        return self._velocity(run_flow_blocks(x, y, *tensors, self.form, recompute, path), padded)

    def tensors(self) -> Tensors:
        """Blocks, modulations and final modulation, as `fused_flow_blocks` takes them."""
        blocks, last = self._blocks(), self.final_layer
        modulations = [modulation_of(block) for block in blocks[:: self.blocks_per_group]]
        final = None if last.adaLN_modulation is None else modulation_of(last)
        return [block.tensors() for block in blocks], modulations, final

    def _looked_for(self) -> Tensors | None:
        """The same; None where calling the modules does more than the op."""
        return None if self._why_not_fused() is not None else self.tensors()

    def explain(self) -> str:
        """What the blocks run on with tensors of its parameters' device and dtype, and why."""
        parameter, reason = next(self.parameters(), torch.empty(0)), self._why_not_fused()
        hidden = 0 if reason else self._blocks()[0].tensors().down.weight.shape[1]
        shared = what_is_shared(1, 1, len(self.res_blocks) // self.blocks_per_group, len(self.res_blocks))
        call = Call(parameter.device, parameter.dtype, self.model_channels, hidden, 1, shared=shared, why_not=reason)
        explained = "flow_head: {}; {}".format(*explain(call))
        if self.precision is not None:
            explained += "; modulations in fp8: {}; {}".format(
                *explain_fp8(parameter.device, self.model_channels, reason)
            )
        return explained

    def _why_not_fused(self) -> str | None:
        if not self.res_blocks:
            return "there are no blocks"
        return None if self._is_as_built(whole=False) else _CHANGED

    def why_not_captured(self) -> str | None:
        """Why a CUDA graph would leave something out that the modules do; None if it would not."""
        return None if self._is_as_built(whole=True) else _CHANGED

    def _is_as_built(self, whole: bool) -> bool:
        """Whether calling the fused op's parts, or the whole head's, does nothing but what they were built to do."""
        parts = self._parts(whole)
        hooked = is_forward_hooked if whole else is_hooked  # what is captured wants no gradient
        if is_any_hooked() or any(map(hooked, parts)) or [type(part) for part in parts] != self._built[whole]:
            return False
        return all(vars(part)["eps"] == self.form.eps for part in parts if type(part) in _NORMS)

    def _parts(self, whole: bool) -> list[nn.Module]:
        """All that the fused op stands for, or all there is: found in every call, thrice as fast as `modules()` is."""
        parts: list[nn.Module] = list(self.children()) if whole else [getattr(self, name) for name in _FUSED]
        for part in parts:  # which grows
            parts += [child for child in children_of(part).values() if child is not None]
        return parts

    def _blocks(self) -> list[FlowBlock]:
        return cast(list[FlowBlock], list(self.res_blocks))

    def _by_modules(self, x: Tensor, y: Tensor, again: bool) -> Tensor:
        """Submodule by submodule, each called once, so that hooks, adapters and replaced forwards work.

        `again`: the backward pass calls the blocks once more.
        """
        blocks = self._blocks()
        each = [lambda x, shared, block=block: block(x, y, shared) for block in blocks]
        firsts = blocks[:: self.blocks_per_group] if self.blocks_per_group > 1 else []
        x = block_after_block(x, each, [partial(first.adaLN_modulation, y) for first in firsts], again)
        return self.final_layer(x, y)


class _Known(NamedTuple):
    """The tensors that were found, and in which modules: all, and the attributes of some."""

    tensors: Tensors
    parts: list[nn.Module]
    own: list[dict[str, Any]]  # of all
    whole: list[dict[str, Any]]  # of those that have parts
    holding: list[dict[str, Any]]  # of those that have places for parameters
    norms: list[dict[str, Any]]
    state: tuple[list[Any], ...] = ()

    @classmethod
    def of(cls, head: FlowHead, tensors: Tensors) -> _Known | None:
        """None where a tensor is no parameter of a module, as in replicas of DataParallel."""
        parts = head._parts(whole=False)
        own = list(map(vars, parts))
        whole, holding = ([part for part in own if of(part)] for of in (CHILDREN, PARAMETERS))
        known = cls(tensors, parts, own, whole, holding, [part for part in own if "eps" in part])
        held = chain.from_iterable(PARAMETERS(part).values() for part in holding)
        given = (tensor for affine in in_order(*tensors) for tensor in affine if tensor is not None)
        return known._replace(state=known.seen()) if {*map(id, given)} <= {*map(id, held)} else None

    def seen(self) -> tuple[list[Any], ...]:
        """What is the same as long as the same would be found; no line of Python runs for each part."""
        return (
            list(map(type, self.parts)),
            list(chain.from_iterable(map(dict.values, map(CHILDREN, self.whole)))),
            list(map(id, chain.from_iterable(map(dict.values, map(PARAMETERS, self.holding))))),
            list(map(_EPS, self.norms)),
        )

    def holds(self, head: FlowHead) -> bool:
        """Whether they would be found again, and no hook fires."""
        if [children_of(head)[name] for name in _FUSED] != self.parts[:2] or self.seen() != self.state:
            return False
        hooks = (*FORWARD_HOOKS, *BACKWARD_HOOKS) if torch.is_grad_enabled() else FORWARD_HOOKS
        hooked = is_any_hooked() or any(any(map(of, self.own)) for of in hooks)
        return not (hooked or any(map(contains, self.own, repeat("forward"))))


class _Found:
    """The tensors of a head's fused op, looked for again where a module, a parameter or a norm's eps is another.

    To see that none is, and that there is no hook, takes a third of the time, which counts beside few rows. What was
    replaced is held until the next call. A copy of a head, or one that was pickled, has found nothing yet.
    """

    def __init__(self) -> None:
        self._known: _Known | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Found, ()

    def __call__(self, head: FlowHead) -> Tensors | None:
        """None where calling the modules does more than the op."""
        if torch.compiler.is_compiling():  # a graph is guarded by what it reads of the modules
            return head._looked_for()
        known = self._known
        if known is not None and known.holds(head):
            return known.tensors
        tensors = head._looked_for()
        if tensors is not None:
            self._known = _Known.of(head, tensors) or known
        return tensors


_FUSED = "res_blocks", "final_layer"  # what the op stands for
_EPS = itemgetter("eps")
_NORMS = (LayerNorm, nn.RMSNorm)
_CHANGED = "a submodule was replaced, wrapped or given a hook"


def _behind(columns: int, dtype: torch.dtype) -> int:
    """How many columns more make rows of a dtype a multiple of 16 bytes."""
    return -columns % max(1, 16 // dtype.itemsize)


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer does nothing but its product."""
    return type(layer) is nn.Linear and not is_any_hooked() and not is_hooked(layer)


def _padded(parameter: Tensor, zeros: tuple[int, ...]) -> Tensor:
    """With zeros behind; without a gradient made once, until the parameter changes."""

    def pad(given: Tensor) -> Tensor:
        return F.pad(given, zeros)

    if torch.is_grad_enabled() and parameter.requires_grad:
        return pad(parameter)
    return packed(("padded", zeros), [parameter], pad)
