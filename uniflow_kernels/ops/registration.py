"""Registered ops: one node for whoever looks at a graph, a plain call where nobody does."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from uniflow_kernels import cpu_kernels, cuda_kernels
from uniflow_kernels.choice import choose, requested
from uniflow_kernels.torch_private import (
    argument_types,
    carries_tangents,
    is_dispatch_watched,
    is_forward_mode,
    is_transforming,
    number_of_outputs,
)

_LIBRARY = torch.library.Library("uniflow_kernels", "FRAGMENT")
_OWN = (Tensor, Parameter, type(None))  # classes without rules of their own; a tensor may be missing


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    linear: bool = False,
    tags: Sequence[torch.Tag] = (),
    group: Any = None,
) -> Callable[..., Any]:
    """Register an op, and give the function that calls it.

    The dispatcher takes several times as long as a small op's work on a CPU. Unless a compiler, a mode, a function
    transform or a subclass of Tensor wants to see the op, the function therefore goes around it.

    Args:
        schema: as `torch.library.define` takes it. With a gradient the first output is the result, and all others are
            for `setup`.
        implementation: of the op, for any device; nothing in it is recorded for a gradient.
        fake: the same without the work, for shapes and dtypes.
        setup: called with ctx, the arguments and the outputs; saves what `backward` needs, and which inputs want a
            gradient (`ctx.needs_input_grad` counts differently around the dispatcher).
        backward: called with ctx and the gradient of each output, that of all but the first None; gives the gradients
            by the names of the arguments, a list for a list of tensors, whose every tensor needs one or None. Without
            it and `setup` the op has no gradient.
        linear: whether what `backward` does can be differentiated again; autograd raises an error for all other ops.
        tags: what torch is to know of the op.
        group: a NamedTuple class. All functions here, and callers, take the arguments that have the names of its fields
            as one, before the others; a field of which the schema knows nothing keeps its default.

    Returns:
        A function of the op's arguments, all by position, that gives the first output; without a gradient all outputs.
        It raises a RuntimeError where forward-mode derivatives are carried along, for which the op has no rule and
        torch would take zeros.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=tuple(tags))
    op = getattr(torch.ops.uniflow_kernels, name).default
    form = _Arguments(argument_types(op), group)
    _LIBRARY.impl(name, form.taking(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"uniflow_kernels::{name}", form.taking(fake), lib=_LIBRARY)
    if setup is not None and backward is not None:
        return _with_gradient(op, form, implementation, setup, backward, linear)

    def call(*arguments: Any) -> Any:
        tensors = form.tensors(arguments)
        _refuse_tangents(name, tensors)
        if is_watched(*tensors) or wants_gradient(tensors):
            return op(*form.flat(arguments))
        return implementation(*arguments)

    return call


class _Arguments:
    """The arguments of an op as its schema has them, "flat", and as its functions take them: with the group as one."""

    def __init__(self, kinds: dict[str, str], group: Any) -> None:
        self.group, self.names = group, tuple(kinds)
        self.fields: tuple[str, ...] = () if group is None else group._fields
        self.others = [name for name in kinds if name not in self.fields]
        known = [name for name in self.fields if name in kinds and "Tensor" in kinds[name]]
        alone = [name for name in self.others if "Tensor" in kinds[name]]
        self._in_group = [self.fields.index(name) for name in known]
        self._alone = [self.others.index(name) + (group is not None) for name in alone]
        self.with_tensors = known + alone  # the names, in the order of `tensors`

    def tensors(self, arguments: Sequence[Any]) -> list[Any]:
        """Whatever stands in the places of tensors and of lists of them."""
        found = [arguments[0][place] for place in self._in_group]
        for place in self._alone:
            given = arguments[place]
            if isinstance(given, (list, tuple)):
                found.extend(given)
            else:
                found.append(given)
        return found

    def flat(self, arguments: Sequence[Any]) -> Sequence[Any]:
        if self.group is None:
            return arguments
        by_name = dict(zip((*self.fields, *self.others), (*arguments[0], *arguments[1:]), strict=True))
        return [by_name[name] for name in self.names]

    def grouped(self, flat: Sequence[Any]) -> Sequence[Any]:
        if self.group is None:
            return flat
        by_name = dict(zip(self.names, flat, strict=False))  # torch leaves out what is a default of the schema
        group = self.group(**{name: by_name[name] for name in self.fields if name in by_name})
        return group, *[by_name[name] for name in self.others if name in by_name]

    def taking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the flat arguments."""
        return function if self.group is None else lambda *flat: function(*self.grouped(flat))


def _with_gradient(
    op: Any,
    form: _Arguments,
    implementation: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
    linear: bool,
) -> Callable[..., Any]:
    others, name = number_of_outputs(op) - 1, op.name().rpartition(":")[2]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # outputs that are not the result have no gradient: not one of zeros either
        setup(ctx, form.grouped(inputs), output)

    def flat_backward(ctx: Any, *incoming: Any) -> tuple[Any, ...]:
        found = backward(ctx, *incoming)
        return tuple(found.get(name) for name in form.names)

    torch.library.register_autograd(op, flat_backward, setup_context=setup_context, lib=_LIBRARY)

    class Direct(torch.autograd.Function):
        """The op without the dispatcher; autograd looks into no list, so the tensors are given to it one by one."""

        @staticmethod
        def forward(ctx: Any, arguments: tuple[Any, ...], *tensors: Tensor | None) -> Any:
            outputs = implementation(*arguments)
            setup(ctx, arguments, outputs)
            return outputs[0] if others else outputs

        @staticmethod
        def backward(ctx: Any, incoming: Tensor) -> Any:
            if torch.is_grad_enabled() and not linear:
                raise RuntimeError(f"{name}: it has no second derivative, which create_graph=True asks for")
            found = backward(ctx, incoming, *[None] * others)
            gradients: list[Any] = [None]  # of the arguments as a whole
            for argument in form.with_tensors:
                of_one = found.get(argument)
                gradients.extend(of_one if isinstance(of_one, list) else (of_one,))
            return tuple(gradients)

    def call(*arguments: Any) -> Any:
        tensors = form.tensors(arguments)
        _refuse_tangents(name, tensors)
        if is_watched(*tensors):
            outputs = op(*form.flat(arguments))
        elif wants_gradient(tensors):
            return Direct.apply(arguments, *tensors)
        else:
            outputs = implementation(*arguments)
        return outputs[0] if others else outputs

    return call


def _refuse_tangents(name: str, tensors: Sequence[Tensor | None]) -> None:
    if carries_tangents(*tensors):
        raise RuntimeError(f"{name}: it has no forward-mode derivative")


def wants_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd is to record what is done with these."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # any() would take twice as long, and every op asks
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether a compiler, a mode, a function transform or a subclass of Tensor wants to see what is done with these."""
    if torch.compiler.is_compiling() or is_dispatch_watched():
        return True
    for tensor in tensors:  # noqa: SIM110 - as in `wants_gradient`
        if type(tensor) not in _OWN:
            return True
    return False


def is_left_to_torch(op: str, device: torch.device) -> bool:
    """Whether the transforms of torch.func or forward-mode derivatives are at work: then the definition must serve.

    Raises a ValueError if a backend was asked for by name.
    """
    if not (is_transforming() or is_forward_mode()):
        return False
    reason = "the kernels have no rules for the transforms of torch.func, nor for dual numbers"
    return kernels_for(op, "", device, lambda _: reason) is None


def kernels_for(op: str, module: str, device: torch.device, why_not: Callable[[str], str | None]) -> Any:
    """The module whose kernels serve a call of an op, or None for plain PyTorch.

    Args:
        op: its name.
        module: that of its Triton kernels.
        device: where it is to run.
        why_not: of "triton", "cuda" or "cpu": why its kernels cannot serve; None where they can.
    """
    wanted = requested()
    if wanted == "eager":
        return None
    if wanted == "auto" and device.type == "cpu":  # Triton's interpreter must be asked for
        return cpu_kernels if why_not("cpu") is None else None
    # the order of "auto" on a GPU; to be turned where a measurement says so
    chosen = choose(op, {name: why_not(name) for name in (("triton", "cuda") if wanted == "auto" else (wanted,))})
    if chosen == "triton":
        return importlib.import_module(f"uniflow_kernels.triton_kernels.{module}")
    return {"cuda": cuda_kernels, "cpu": cpu_kernels}.get(chosen)
