"""Everything private of torch that this project relies on: what a new torch may break stands here and nowhere else.

Where torch has a public way it is used instead; each entry says what it is for.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

__all__ = ["FakeTensorMode", "TorchDispatchMode", "tree_leaves", "tree_map", "tree_map_only"]  # used as they are

Marked = TypeVar("Marked", bound=Callable[..., Any])

# --- torch.compile, without importing the compiler as torch.compiler's own decorators do ---


def constant(function: Marked) -> Marked:
    """Let a compiled graph hold what the function gives; torch.compiler.assume_constant_result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def has_autocast(kind: str) -> bool:
    """Whether a kind of device has autocast, as meta has not; torch 2.11 does not trace the question."""
    return torch.amp.is_autocast_available(kind)


def uncompiled(function: Marked) -> Marked:
    """Keep the compiler out of the function; torch.compiler.disable."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def before_compilation(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that a torch.compile decorator was given."""
    return getattr(function, "_torchdynamo_orig_callable", function)


# torch 2.11 does not find the submodules of an object of a derived class that shares a module's attributes
TRACES_STAND_INS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def object_of(identity: int) -> Any:
    """The living object whose id() it is. torch 2.11 hands no module to a `constant` function, but its id()."""
    return ctypes.cast(identity, ctypes.py_object).value


def always(condition: bool) -> bool:
    """Whether a condition on sizes holds; in a graph of many sizes, whether for all of them, and none is assumed."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes long to import

    return statically_known_true(condition)


# --- who is looking ---


@constant
def is_transforming() -> bool:
    """Whether a transform of torch.func is at work: kernels have no rules for it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@constant
def is_forward_mode() -> bool:
    """Whether forward-mode derivatives are carried along, by torch.func.jvp and its like or by dual numbers."""
    return torch.autograd.forward_ad._current_level >= 0


def carries_tangents(*tensors: Tensor | None) -> bool:
    """Whether forward-mode derivatives are carried along by one of these; of tensors that a transform wraps, may be."""
    if not is_forward_mode():
        return False
    floating = [tensor for tensor in tensors if tensor is not None and tensor.is_floating_point()]
    if is_transforming():  # of nested ones only the innermost would say
        return any(map(torch._C._functorch.is_functorch_wrapped_tensor, floating))
    return any(torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in floating)


def is_traced() -> bool:
    """Whether a dispatch mode or a transform of torch.func is at work: what is made then must not be kept."""
    return is_in_torch_dispatch_mode() or is_transforming()


def is_dispatch_watched() -> bool:
    """Whether a dispatch mode, a transform or torch.jit.trace wants to see every op. Cheaper than `is_traced`."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
    )


# --- autograd ---


def is_graph_kept() -> bool:
    """In a backward pass: whether its graph is kept for another one (retain_graph=True)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def autograd_inside_op() -> AbstractContextManager[None]:
    """Autograd works inside an op's implementation as it does outside."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)


def is_tensor_hooked(tensor: Tensor) -> bool:
    """Whether a hook on the tensor would see its gradient."""
    return bool(tensor._backward_hooks)


def version_of(tensor: Tensor) -> int:
    """How often the tensor was changed in place."""
    return tensor._version


def storage_of(tensor: Tensor) -> int:
    """The identity of the tensor's memory."""
    return tensor.untyped_storage()._cdata


# --- registered ops ---


def argument_types(op: Any) -> dict[str, str]:
    """The types of an op's arguments, such as "Tensor?", by their names, in their order."""
    return {argument.name: str(argument.type) for argument in op._schema.arguments}


def number_of_outputs(op: Any) -> int:
    """How many results an op returns."""
    return len(op._schema.returns)


def overloads_of(op: Any) -> Any:
    """All overloads of an op as one, by which torch's table of FLOPs knows it."""
    return op._overloadpacket


@functools.cache
def draws(name: str) -> bool:
    """Whether torch's operator of this name draws random numbers."""
    found = getattr(torch.ops.aten, name, None)
    return found is not None and any(
        torch.Tag.nondeterministic_seeded in getattr(found, overload).tags for overload in found.overloads()
    )


# --- many tensors in a few launches ---

foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_

# --- modules: their attributes are ten times as slow to find by name, and more than a forward of few rows can bear ---


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The module's own submodules by name."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters by name; empty in a replica of DataParallel, where they are plain attributes."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers by name."""
    return module._buffers


# the same of vars(module), for hundreds of modules at a time: mapped, no line of Python runs for each
CHILDREN = itemgetter("_modules")
PARAMETERS = itemgetter("_parameters")
BUFFERS = itemgetter("_buffers")
FORWARD_HOOKS = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")
BACKWARD_HOOKS = itemgetter("_backward_hooks"), itemgetter("_backward_pre_hooks")


def replica_of(module: nn.Module) -> nn.Module:
    """A module with the same attributes and submodules, but no parameters: those are for the caller to set."""
    made: nn.Module = object.__new__(type(module))  # not by the class: that of a layer of FSDP would be built anew
    own = {"_parameters": {}, "_buffers": dict(module._buffers), "_modules": dict(module._modules)}
    made.__dict__ = {**module.__dict__, **own}
    return made


def is_forward_hooked(module: nn.Module) -> bool:
    """Whether calling the module fires a hook of its own where no gradient is wanted, or a forward put on it."""
    own = module.__dict__
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"]) or "forward" in own


def fires(module: nn.Module) -> bool:
    """Whether calling the module fires a hook of its own."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module fires a hook of its own, or a forward put on the instance."""
    return fires(module) or "forward" in module.__dict__


def is_compiled(module: nn.Module) -> bool:
    """Whether calling the module calls what torch.compile made of it, by the method `compile`."""
    return module._compiled_call_impl is not None


def plain_parts(parts: list[Any], classes: frozenset[type]) -> list[Any] | None:
    """The modules and all that is in them, if calling any does nothing but the forward of its class, one of these.

    None is passed over. Returns None if one does more, or is of another class.
    """
    found = []
    for part in parts:  # grows on the way
        if part is None:
            continue
        own = part.__dict__
        if type(part) not in classes or "forward" in own:
            return None
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return None
        found.append(part)
        if own["_modules"]:
            parts += own["_modules"].values()
    return None if is_any_hooked() else found


def is_any_hooked() -> bool:
    """Whether a hook on all modules is set."""
    return torch.nn.modules.module._has_any_global_hook()


# --- products on a CPU ---

_ONE_DNNS = {
    "none": ("none", None),
    "gelu": ("gelu", "none"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", None),
    "silu": ("swish", None),
}


def has_one_dnn() -> bool:
    """Whether torch has oneDNN, and is not told to do without, beside another library for products in float32."""
    one_dnn = torch.backends.mkldnn
    return bool(one_dnn.is_available() and one_dnn.enabled and torch.backends.mkl.is_available())


def one_dnn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """An activation of a linear layer by oneDNN, as torch.compile has it on a CPU: in float32, without a gradient."""
    name, algorithm = _ONE_DNNS[activation]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)


# --- data ---


def end_readers(batches: Iterator[Any]) -> None:
    """End the processes of a DataLoader's iterator, which else go on until it is collected."""
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()
