"""Pre-norm transformer layers without gradients: attention and MLP, each behind a norm and on a residual branch.

On a GPU several paths can serve: plain PyTorch ("eager", the layers' own forwards), row kernels that do residual,
LayerScale and norm around the library's products ("rows"), and products that do the row kernels' work ("products", or
"small products" in tiles of which a multiprocessor holds two): then nothing but what the products and attention read
and write passes through memory. Which one does is what was measured: `measured.json`, by `python -m benchmarks
choices`. Where nothing was, plain PyTorch serves, unless Triton is asked for by name.

On a CPU oneDNN makes the products in float32, and the MLP's activation in the first of them, where it is the faster
library: on AMD's processors ("oneDNN").

Source: the ViT's layer (Dosovitskiy et al. 2021) with LayerScale (Touvron et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from uniflow_kernels import cpu_kernels
from uniflow_kernels.choice import is_in_graph, requested
from uniflow_kernels.ops.flow_blocks import Affine, check_choice, flat_rows
from uniflow_kernels.ops.flow_choice import (
    MAX_WIDTH,
    RUNS,
    SMALL,
    UNMEASURED,
    fastest_first,
    is_plain,
    measured_on,
)
from uniflow_kernels.ops.modulated_norm import residual_norm
from uniflow_kernels.ops.registration import wants_gradient
from uniflow_kernels.packing import packed
from uniflow_kernels.torch_private import (
    constant,
    has_one_dnn,
    is_dispatch_watched,
    is_forward_mode,
    is_transforming,
    one_dnn_linear,
    version_of,
)
from uniflow_kernels.triton_kernels import why_not_on

if TYPE_CHECKING:
    from uniflow_kernels.triton_kernels.products import Moments

OP = "transformer_layers"
KERNELS = ("rows", "products", "small products")
ONE_DNN = "oneDNN"
_WORTH_ONE_DNN = 1 << 20  # multiplications
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP's
}
# of float16 the weight times the norm's may leave its range, where channels of large numbers have small weights
_FOLDS = (torch.bfloat16, torch.float32)
# what a layer that is called on its own left of the rows that it returned, for the next one: moments, norm, version
_left = WeakTensorKeyDictionary()


class Layer(NamedTuple):
    """The tensors of one layer of width W and hidden width H.

    Args:
        norm1, norm2: weight [W] and bias [W] or None; an RMS norm has no bias.
        qkv: [3W, W]; or three of [W, W], which lie side by side in what is made of them.
        attend: what makes [B, S, W] of queries, keys and values side by side, [B, S, 3W].
        proj: [W, W], with a bias or without, as all products.
        scale1, scale2: LayerScale [W]; None for none.
        fc1: [H, W].
        fc2: [W, H].
    """

    norm1: Affine
    qkv: tuple[Affine, ...]
    attend: Callable[[Tensor], Tensor]
    proj: Affine
    scale1: Tensor | None
    norm2: Affine
    fc1: Affine
    fc2: Affine
    scale2: Tensor | None

    def tensors(self) -> list[Tensor]:
        """All that are there."""
        affines = (self.norm1, *self.qkv, self.proj, self.norm2, self.fc1, self.fc2)
        return [t for t in (*(t for affine in affines for t in affine), self.scale1, self.scale2) if t is not None]


class LayerForm(NamedTuple):
    """The kind of norm ("layer" or "rms"), its eps, and the activation of the MLP, one of ACTIVATIONS."""

    norm: str = "layer"
    eps: float = 1e-5
    activation: str = "gelu"


class Folded(NamedTuple):
    """A product with the norm before it in it.

    Args:
        weight: the product's times the norm's, [N, K], in the dtype of the product's.
        sums: of each of its rows, [N] in float32, of what was rounded: so a row's mean cancels, however large it is.
        bias: the product's, and what the norm's bias makes, [N] in float32.
    """

    weight: Tensor
    sums: Tensor
    bias: Tensor | None


def fold_norm(norm: Affine, affine: Affine) -> Folded:
    """The product behind a norm as `Folded`, in plain PyTorch."""
    wide = affine.weight.float()
    weight = (wide if norm.weight is None else wide * norm.weight.float()).to(affine.weight.dtype)
    bias = None if affine.bias is None else affine.bias.float()
    if norm.bias is not None:
        made = wide @ norm.bias.float()
        bias = made if bias is None else bias + made
    return Folded(weight, weight.sum(1, dtype=torch.float32), bias)


def plain_layer(x: Tensor, layer: Layer, form: LayerForm) -> Tensor:
    """The definition: one layer in plain PyTorch, [B, S, W] -> [B, S, W]."""
    attended = F.linear(layer.attend(F.linear(_norm(x, layer.norm1, form), *_beside(layer.qkv))), *layer.proj)
    x = x + (attended if layer.scale1 is None else attended * layer.scale1)
    hidden = ACTIVATIONS[form.activation](F.linear(_norm(x, layer.norm2, form), *layer.fc1))
    made = F.linear(hidden, *layer.fc2)
    return x + (made if layer.scale2 is None else made * layer.scale2)


def _beside(affines: Sequence[Affine]) -> Affine:
    """Several products of one input as one; of parameters it is kept until they change."""
    return affines[0] if len(affines) == 1 else packed("side by side", _in_columns(affines), _joined)


def _in_columns(affines: Sequence[Affine]) -> tuple[Tensor | None, ...]:
    """All weights, then all biases."""
    return (*(affine.weight for affine in affines), *(affine.bias for affine in affines))


def _joined(*columns: Tensor) -> Affine:
    """One weight and one bias of what `_in_columns` gives; 0 where others have a bias, as keys have none in DINOv3."""
    weights, biases = columns[: len(columns) // 2], columns[len(columns) // 2 :]
    if len(weights) == 1:
        return Affine(weights[0], biases[0])
    if all(bias is None for bias in biases):
        return Affine(torch.cat(weights))
    there = [w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True)]
    return Affine(torch.cat(weights), torch.cat(there))


def _norm(x: Tensor, norm: Affine, form: LayerForm) -> Tensor:
    if form.norm == "rms":
        return F.rms_norm(x, x.shape[-1:], norm.weight, form.eps)
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, form.eps)


def transformer_layers(
    x: Tensor, layers: Sequence[Layer], form: LayerForm, path: str, more_follow: bool = False
) -> Iterator[Tensor]:
    """The output of each layer, computed when it is asked for; no gradient is recorded.

    Args:
        x: [B, S, W].
        layers: at least one.
        form: of all of them.
        path: "eager", ONE_DNN or one of KERNELS, as `choose_layers_path` says.
        more_follow: whether the last output may be x in another call, as where each layer is called on its own; then
            what the last product knows of its rows stays with it.
    """
    if path == "eager":
        for layer in layers:
            x = plain_layer(x, layer, form)
            yield x
    elif path == ONE_DNN:
        for layer in layers:
            x = _by_one_dnn(x, layer, form)
            yield x
    elif path == "rows":
        yield from _by_rows(x, layers, form)
    else:
        yield from _by_products(x, layers, form, path in SMALL, more_follow)


def _by_one_dnn(x: Tensor, layer: Layer, form: LayerForm) -> Tensor:
    attended = layer.attend(linear_by_one_dnn(_norm(x, layer.norm1, form), _beside(layer.qkv)))
    x = _add(x, linear_by_one_dnn(attended, layer.proj), layer.scale1)
    hidden = linear_by_one_dnn(_norm(x, layer.norm2, form), layer.fc1, form.activation)
    return _add(x, linear_by_one_dnn(hidden, layer.fc2), layer.scale2)


def linear_by_one_dnn(x: Tensor, affine: Affine, activation: str = "none") -> Tensor:
    """An activation of a linear layer; by oneDNN where that gains more than the 13 microseconds that its call takes."""
    if x.numel() * len(affine.weight) < _WORTH_ONE_DNN:
        made, inside = F.linear(x, *affine), "none"
    else:
        inside = "none" if activation == "quick_gelu" else activation  # which it does not have
        made = one_dnn_linear(x, *affine, inside)
    return made if inside == activation else ACTIVATIONS[activation](made)


def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    return x + branch if scale is None else torch.addcmul(x, branch, scale)


def _by_rows(x: Tensor, layers: Sequence[Layer], form: LayerForm) -> Iterator[Tensor]:
    """Row kernels that add, scale and norm: also where one layer ends and the next begins."""

    def add_and_norm(x: Tensor, q: Tensor, scale: Tensor | None, norm: Affine) -> tuple[Tensor, Tensor]:
        return residual_norm(x, q, scale, weight=norm.weight, bias=norm.bias, norm=form.norm, eps=form.eps)

    h = _norm(x, layers[0].norm1, form)
    for layer, following in zip(layers, (*layers[1:], None), strict=True):
        attended = F.linear(layer.attend(F.linear(h, *_beside(layer.qkv))), *layer.proj)
        x, h = add_and_norm(x, attended, layer.scale1, layer.norm2)
        made = F.linear(ACTIVATIONS[form.activation](F.linear(h, *layer.fc1)), *layer.fc2)
        if following is not None:
            x, h = add_and_norm(x, made, layer.scale2, following.norm1)
        else:
            x = _add(x, made, layer.scale2)
        yield x


def _by_products(
    x: Tensor, layers: Sequence[Layer], form: LayerForm, small: bool, more_follow: bool
) -> Iterator[Tensor]:
    """Four products a layer and attention: each reads what the one before wrote, and nothing else."""
    from uniflow_kernels.triton_kernels import layer_products
    from uniflow_kernels.triton_kernels.layer_products import folded_norm, residual_product
    from uniflow_kernels.triton_kernels.products import moments

    shape, rms = x.shape, form.norm == "rms"

    def fold(weight: Tensor | None, bias: Tensor | None, *columns: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return layer_products.fold_norm((weight, bias), _joined(*columns))

    def normed(rows: Tensor, of_rows: Moments, norm: Affine, affines: Sequence[Affine], activation: str) -> Tensor:
        # in a CUDA graph it is made in every replay, which is to see new weights
        made = packed("folded norm", (*norm, *_in_columns(affines)), fold)
        return folded_norm(rows, of_rows, *made, activation, rms, form.eps, small)

    rows = flat_rows(x)
    recalled = _recall(x, rms)
    known: Moments | None = moments(rows, rms) if recalled is None else recalled
    for i, layer in enumerate(layers):
        assert known is not None
        qkv = normed(rows, known, layer.norm1, layer.qkv, "none")
        attended = flat_rows(layer.attend(qkv.view(*shape[:-1], -1)))
        free = None if known is recalled else known  # x may be asked about again
        rows, known = residual_product(attended, layer.proj, layer.scale1, rows, rms, free, small)
        del qkv, attended  # before the largest of all is made
        assert known is not None
        hidden = normed(rows, known, layer.norm2, (layer.fc1,), form.activation)
        last = i + 1 == len(layers)
        wanted = None if last and not more_follow else rms
        rows, known = residual_product(hidden, layer.fc2, layer.scale2, rows, wanted, known, small)
        out = rows.view(shape)
        if last and more_follow:
            _remember(out, known, rms)
        yield out


def _remember(x: Tensor, known: Moments | None, rms: bool) -> None:
    """Keep the moments of x's rows for as long as it is there and unchanged; what has no versions may change."""
    if not x.is_inference():
        _left[x] = known, rms, version_of(x)


def _recall(x: Tensor, rms: bool) -> Moments | None:
    """What `_remember` kept; None if x is another tensor, was changed, or its moments are those of another norm."""
    kept = _left.get(x)
    return None if kept is None or kept[1:] != (rms, version_of(x)) else kept[0]


def choose_layers_path(x: Tensor, layers: Sequence[Layer], form: LayerForm, path: str = "auto") -> str:
    """The path of a call: the first in the order of their measured times that can serve.

    Args:
        x, layers, form: as `transformer_layers` takes them.
        path: one of KERNELS where no other may serve, as in tests and benchmarks; else "auto".

    Returns:
        "eager", ONE_DNN or one of KERNELS.

    Raises:
        ValueError: for an unknown path, or one that cannot serve, saying why.
    """
    check_choice("path", path, ("auto", *KERNELS, ONE_DNN))
    every = [tensor for layer in layers for tensor in layer.tensors()]
    if path == "auto" and serves_one_dnn(x, every):
        return ONE_DNN
    if path != "auto":
        if path == ONE_DNN:
            reason = why_not_one_dnn(x.device, x.dtype) or why_not_tensors(x, every)
        else:
            reason = _why_not(x, every) or _why_not_path(x, layers, path)
        if reason is not None:
            raise ValueError(f"{OP}: path {path!r} cannot serve this input: {reason}")
        return path
    if not may_have_kernels(x) or _why_not(x, every) is not None:
        return "eager"
    order = paths_by_time(x, x.shape[-1])
    return next((each for each in order if _why_not_path(x, layers, each) is None), "eager")


def paths_by_time(x: Tensor, width: int) -> list[str]:
    """Those of x's rows in layers of a width, the fastest first, of what is asked for."""
    among = KERNELS if requested() == "triton" else ("eager", *KERNELS)
    return [path for path in _order(x.device, x.dtype, width, x.shape[:-1].numel()) if path in among]


def serves_one_dnn(x: Tensor, tensors: list[Tensor]) -> bool:
    """Whether oneDNN makes the products of x and weights."""
    possible = requested() == "auto" and why_not_one_dnn(x.device, x.dtype) is None
    return possible and why_not_tensors(x, tensors) is None


def may_have_kernels(x: Tensor, width: int | None = None) -> bool:
    """Whether anything but "eager" may come of `choose_layers_path`, before layers (of x's width) are looked at."""
    if torch.compiler.is_compiling() or not x.numel() or is_dispatch_watched():  # a trace sees no launches
        return False
    if requested() == "auto" and why_not_one_dnn(x.device, x.dtype) is None:
        return not torch.is_grad_enabled()
    if is_plain(x.is_cuda) or requested() not in ("auto", "triton"):
        return False
    return requested() == "triton" or bool(measured_on(x.device, x.dtype, width or x.shape[-1], OP))


def explain_layers(device: torch.device, dtype: torch.dtype, width: int) -> tuple[str, str]:
    """What serves layers of a width by their rows, and why: where that was measured, or what speaks against kernels."""
    reason = why_not_here(device, dtype, width)
    if requested() == "auto" and (why := why_not_one_dnn(device, dtype)) is None:
        return RUNS[ONE_DNN], f"measured in docs/layers.md; Triton: {reason}"
    if reason is not None:
        return RUNS["eager"], f"Triton: {reason}" + (f"; oneDNN: {why}" if device.type == "cpu" else "")
    known = measured_on(device, dtype, width, OP)
    if not known:
        return RUNS["eager"], f"Triton, on request: {UNMEASURED}"
    served = "; ".join(
        f"from {rows} rows {RUNS[_order(device, dtype, width, rows)[0]]}" for rows in [each.rows for each in known]
    )
    return served, f"measured on {known[0].gpu}"


def _order(device: torch.device, dtype: torch.dtype, width: int, rows: int) -> tuple[str, ...]:
    """The paths, the fastest first; the last serves wherever kernels do. "eager" alone where nothing was measured."""
    found = fastest_first(measured_on(device, dtype, width, OP), rows, training=False, graph=is_in_graph())
    return (*found, "rows") if found or requested() == "triton" else ("eager",)


@constant
def why_not_one_dnn(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why oneDNN is not asked for products of a dtype by name; None where it is."""
    if device.type != "cpu":
        return f"it runs on CPUs, not on {device.type}"
    if dtype != torch.float32:
        return f"torch takes it for products in {dtype} where it is the faster"
    if not cpu_kernels.is_amds() or not has_one_dnn():
        return "it was the faster on AMD's processors, beside MKL"
    return None


def why_not_here(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why no kernels can serve layers of a width."""
    if width > MAX_WIDTH:
        return f"it holds a row in one program: up to {MAX_WIDTH} wide, not {width}"
    return why_not_on(device, dtype)


def _why_not(x: Tensor, tensors: list[Tensor]) -> str | None:
    """Why no kernels can serve."""
    if (reason := why_not_here(x.device, x.dtype, x.shape[-1])) is not None:
        return reason
    return why_not_tensors(x, tensors)


def why_not_tensors(x: Tensor, tensors: list[Tensor]) -> str | None:
    """Why nothing but plain PyTorch can serve x with such weights."""
    if is_transforming() or is_forward_mode():
        return "it has no rules for the transforms of torch.func, nor for dual numbers"
    every = [x, *tensors]
    if wants_gradient(every):
        return "it has no gradients"
    if any(type(tensor) not in (Tensor, Parameter) for tensor in every):
        return "a tensor is of a subclass with rules of its own"
    if torch.is_autocast_enabled(x.device.type) or any(tensor.dtype != x.dtype for tensor in every):
        return "x and the layers are not of one dtype"
    return None


def _why_not_path(x: Tensor, layers: Sequence[Layer], path: str) -> str | None:
    """Why a path cannot serve what kernels can."""
    if path in ("eager", "rows"):
        return None
    from uniflow_kernels.triton_kernels import products

    if x.dtype not in _FOLDS:
        return f"the norm is folded into weights of bfloat16, not {x.dtype}"
    given = [affine.weight for layer in layers for affine in (layer.proj, layer.fc2)]
    width, hidden = x.shape[-1], {layer.fc1.weight.shape[0] for layer in layers}
    return products.why_not(x.device, x.dtype, (width, 3 * width, *hidden), [flat_rows(x), *given], path in SMALL)
