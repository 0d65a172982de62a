"""Registered ops: one node for whoever looks at a graph, a plain call where nobody does."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from uniflow_kernels import cuda_kernels
from uniflow_kernels.choice import choose, requested
from uniflow_kernels.torch_private import argument_types, is_dispatch_watched, number_of_outputs

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
        backward: called with ctx and the gradient of each output, that of all but the first None; gives a gradient, or
            None, for each argument, a list of them for a list. Without it and `setup` the op has no gradient.
        linear: whether what `backward` does can be differentiated again; autograd raises an error for all other ops.
        tags: what torch is to know of the op.

    Returns:
        A function of the op's arguments, all by position, that gives the first output; without a gradient all outputs.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=tuple(tags))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"uniflow_kernels::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.uniflow_kernels, name).default
    if setup is not None and backward is not None:
        return _with_gradient(op, implementation, setup, backward, linear)
    tensors_in = _tensors_of(op)

    def call(*arguments: Any) -> Any:
        tensors = tensors_in(arguments)
        return (op if is_watched(*tensors) or wants_gradient(tensors) else implementation)(*arguments)

    return call


def _with_gradient(
    op: Any, implementation: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any], linear: bool
) -> Callable[..., Any]:
    others, tensors_in = number_of_outputs(op) - 1, _tensors_of(op)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # outputs that are not the result have no gradient: not one of zeros either
        setup(ctx, inputs, output)

    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_LIBRARY)

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
                name = op.name().rpartition(":")[2]
                raise RuntimeError(f"{name}: it has no second derivative, which create_graph=True asks for")
            return None, *tensors_in(backward(ctx, incoming, *[None] * others))

    def call(*arguments: Any) -> Any:
        tensors = tensors_in(arguments)
        if is_watched(*tensors):
            outputs = op(*arguments)
        elif wants_gradient(tensors):
            return Direct.apply(arguments, *tensors)
        else:
            outputs = implementation(*arguments)
        return outputs[0] if others else outputs

    return call


def _tensors_of(op: Any) -> Callable[[Sequence[Any]], list[Any]]:
    """A function of an op's arguments: whatever stands in the places of tensors and of lists of them."""
    places = [place for place, kind in enumerate(argument_types(op)) if "Tensor" in kind]

    def tensors_in(arguments: Sequence[Any]) -> list[Any]:
        found: list[Any] = []
        for place in places:
            given = arguments[place]
            found.extend(given if isinstance(given, (list, tuple)) else (given,))
        return found

    return tensors_in


def wants_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd is to record what is done with these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether a compiler, a mode, a function transform or a subclass of Tensor wants to see what is done with these."""
    return torch.compiler.is_compiling() or is_dispatch_watched() or any(type(tensor) not in _OWN for tensor in tensors)


def kernels_for(
    op: str, module: str, device: torch.device, why_not: Callable[[], tuple[str | None, str | None]]
) -> Any:
    """The module whose kernels serve a call of a loss, or None for plain PyTorch.

    Args:
        op: its name.
        module: that of its Triton kernels.
        device: where it is to run.
        why_not: why the Triton kernels and those of the CUDA part cannot serve; None where they can.
    """
    if device.type == "cpu" and requested() == "auto":
        return None  # nothing but Triton's interpreter would run there
    triton, cuda = why_not()
    # the order of "auto"; to be turned where a measurement says so
    chosen = choose(op, {"triton": triton, "cuda": cuda})
    if chosen == "triton":
        return importlib.import_module(f"uniflow_kernels.triton_kernels.{module}")
    return cuda_kernels if chosen == "cuda" else None
