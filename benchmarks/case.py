"""What a case is: a question, the sizes it is asked at, and the forms that compete there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from uniflow_kernels import FlowHead

Module = TypeVar("Module", bound=nn.Module)
Form = Callable[..., Any]  # the inputs of a problem to a tensor, or a tuple of tensors


@dataclass(frozen=True)
class Work:
    """What no version can avoid: bytes moved (each input read once, each output written once) and FLOPs done."""

    bytes: int
    flops: int

    @classmethod
    def of(cls, flops: int, *moved: Any) -> Work:
        """`flops`, and the bytes of all tensors and parameters in `moved`."""
        return cls(sum(tensor.nbytes for tensor in tensors(moved)), flops)


@dataclass(frozen=True)
class Problem:
    """One question at one size.

    Args:
        inputs: what every form is called with: tensors, modules, lists of them, numbers. Gradients are wanted for all
            tensors and parameters in it that require one; where none does, only the forward pass is measured.
        ours: our function.
        plain: the same in eager PyTorch, as the official release writes it; also run in float64 as the reference.
        tokens: rows that are worked on, for the plots.
        forward: what the forward pass must do.
        backward: what the backward pass must do, if there is one.
        compiled: makes the compiled rival with the given `torch.compile`; None compiles `plain` whole.
        libraries: other rivals, from other packages mostly: name -> a function that imports the package and returns the
            form.
    """

    inputs: tuple[Any, ...]
    ours: Form
    plain: Form
    tokens: int
    forward: Work
    backward: Work | None = None
    compiled: Callable[[Callable[[Form], Form]], Form] | None = None
    libraries: Mapping[str, Callable[[], Form]] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """Arguments of a case's `build`. A quick run takes only `quick` sizes, and compiles only at `compile` ones."""

    values: dict[str, int | str]
    quick: bool
    compile: bool


def at(*, quick: bool = False, compile: bool = False, **values: int | str) -> Size:
    """A `Size`, written as a call."""
    return Size(values, quick, compile)


@dataclass(frozen=True)
class Case:
    """A question.

    Args:
        name: on the command line and in the results.
        question: one sentence.
        build: makes the problem, from the values of a size; called with the device and the seed set.
        cuda: sizes on a GPU.
        cpu: sizes on a CPU.
        check_at_most: upper limits for a size's values in the check: float64 needs several times the memory.
    """

    name: str
    question: str
    build: Callable[..., Problem]
    cuda: tuple[Size, ...]
    cpu: tuple[Size, ...]
    check_at_most: Mapping[str, int] = field(default_factory=dict)

    def sizes(self, device: str, quick: bool) -> list[Size]:
        """The sizes asked on "cuda" or "cpu"."""
        return [size for size in getattr(self, device) if size.quick or not quick]

    def problem(self, device: str, values: Mapping[str, int | str]) -> Problem:
        """The problem that is timed; the same numbers every time."""
        torch.manual_seed(0)
        with torch.device(device):
            return self.build(**values)

    def check_problem(self, device: str, values: Mapping[str, int | str]) -> Problem:
        """The problem that is checked: not larger than `check_at_most`."""
        limits = self.check_at_most
        return self.problem(device, {k: min(v, limits[k]) if k in limits else v for k, v in values.items()})


def map_inputs(inputs: Any, tensor: Callable[[Tensor], Any], module: Callable[[nn.Module], Any]) -> Any:
    """`inputs` with every tensor and every module replaced; whether a gradient is wanted is carried over."""
    if isinstance(inputs, Tensor):
        return tensor(inputs.detach()).requires_grad_(inputs.requires_grad)
    if isinstance(inputs, nn.Module):
        return module(inputs)
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(map_inputs(item, tensor, module) for item in inputs)
    return inputs


def in_float64(inputs: Any) -> Any:
    """A copy of `inputs` in float64, modules too."""
    return map_inputs(
        inputs, lambda x: x.double() if x.is_floating_point() else x.clone(), lambda m: copy.deepcopy(m).double()
    )


def tensors(inputs: Any) -> Iterator[Tensor]:
    """All tensors in `inputs`, parameters of modules too."""
    return (tensor for _, tensor in _named(inputs, "input"))


def named_leaves(inputs: Any) -> dict[str, Tensor]:
    """Name -> tensor or parameter, of all that want a gradient."""
    return {name: tensor for name, tensor in _named(inputs, "input") if tensor.requires_grad}


def _named(inputs: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(inputs, Tensor):
        yield name, inputs
    elif isinstance(inputs, nn.Module):
        yield from inputs.named_parameters()
    elif isinstance(inputs, (list, tuple)):
        for index, item in enumerate(inputs):
            yield from _named(item, f"{name} {index}")


def randomised(module: Module, dtype: torch.dtype) -> Module:
    """`module` in `dtype` with no parameter left at zero, so that no branch of it is dead.

    Matrices keep the variance of their input; vectors stay near where their module begins (0 or 1).
    """
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.add_(noise, alpha=0.1)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return module.to(dtype)


def linear_flops(rows: int, *modules: nn.Module) -> int:
    """FLOPs of all products of `modules` with `rows` rows each."""
    parts = (part for module in modules for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d)))
    return 2 * rows * sum(part.weight.numel() for part in parts)


def sampling_flops(head: FlowHead, rows: int, steps: int, cfg: float) -> int:
    """FLOPs of a sampler: condition and times are embedded once; guidance's null condition is one row."""
    flops = linear_flops(rows, head.cond_embed) + steps * linear_flops(1, head.time_embed)
    flops += steps * linear_flops(rows, head.input_proj, head.res_blocks, head.final_layer)
    if cfg != 1.0:
        modulations = [layer for name, layer in head.named_modules() if name.endswith("adaLN_modulation")]
        flops += steps * (linear_flops(rows, head.res_blocks, head.final_layer) - linear_flops(rows - 1, *modulations))
    return flops


def attention_flops(batch: int, length: int, width: int) -> int:
    """FLOPs of q k^T and of its softmax times v, all heads together."""
    return 4 * batch * length * length * width
