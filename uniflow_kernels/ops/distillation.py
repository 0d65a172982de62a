"""Layer-wise adaptive self-distillation: every layer of the student learns from the same layer of a frozen teacher."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uniflow_kernels import cuda_kernels, triton_kernels
from uniflow_kernels.choice import choose
from uniflow_kernels.ops.scaling import scaled

LAYER_WEIGHTS = ("adaptive", "uniform")
EPS = 1e-8  # the least norm, as in F.cosine_similarity
_CPU_CHUNK = 1 << 17  # elements at a time on a CPU: the temporaries stay in the cache
_GPU_CHUNK = 1 << 27


def layerwise_distillation(
    student: Sequence[Tensor] | Tensor,
    teacher: Sequence[Tensor] | Tensor,
    beta: float = 2.0,
    detach_weights: bool = True,
    *,
    skip_tokens: int = 0,
    layer_weights: str = "adaptive",
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine distance per layer, where deeper and worse-aligned layers weigh more.

    With alpha_l = 1 - mean cosine over all tokens of layer l = 1..L,
    w_l = (l/L) exp(beta*alpha_l) / sum_k (k/L) exp(beta*alpha_k) and loss = sum_l w_l alpha_l.

    Args:
        student: L tensors [B, S, D], float, or one [L, B, S, D]. Any strides with a contiguous last dimension.
        teacher: same shapes; no gradient flows into it.
        beta: how strongly badly aligned layers are preferred (the paper's ablation finds 2 best).
        detach_weights: whether the weights are constants for the gradient. The paper does not say.
        skip_tokens: how many tokens at the front do not count: 1 leaves a class token out without a copy.
        layer_weights: "adaptive", as above, or "uniform", 1/L each.

    Returns:
        (loss, alpha, weights): a scalar, [L] and [L], all float32; `alpha` and `weights` are detached. None of them is
        fetched from the device. A token of zeros has cosine 0 and a finite gradient, as in F.cosine_similarity.

    Raises:
        TypeError: if a dtype is none of floating point.
        ValueError: if there is no layer, the two sides differ in number of layers or in shape, `skip_tokens` leaves
            less than nothing, or `layer_weights` is unknown.

    Source: the UniFlow paper, layer-wise adaptive self-distillation.
    """
    if len(student) == 0 or len(student) != len(teacher):
        raise ValueError(
            f"student, teacher: expected as many layers in both, at least one, got {len(student)} and {len(teacher)}"
        )
    for layer, (s, t) in enumerate(zip(student, teacher, strict=True), start=1):
        if s.shape != student[0].shape:
            raise ValueError(
                f"student: layer {layer} has shape {tuple(s.shape)}, expected layer 1's {tuple(student[0].shape)}"
            )
        _check_layer(layer, s, t, skip_tokens)
    check_layer_weights(layer_weights)
    return _weigh(_alphas(list(student), list(teacher), skip_tokens), beta, detach_weights, layer_weights)


class LayerwiseDistillation:
    """`layerwise_distillation` layer by layer: push each as soon as both sides have it, and let the teacher's go.

    Every push computes the layer's cosines and their gradient while both are still in the cache; nothing of the
    teacher is kept.

        distillation = LayerwiseDistillation(layers=24, skip_tokens=1)
        for layer, (student, teacher) in enumerate(states, start=1):
            distillation.push(layer, student, teacher)
        loss, alpha, weights = distillation.result()

    Args:
        layers: L.
        beta, detach_weights, skip_tokens, layer_weights: see `layerwise_distillation`.

    Raises:
        ValueError: if there is no layer, or for unknown `layer_weights`.
    """

    def __init__(
        self,
        layers: int,
        beta: float = 2.0,
        detach_weights: bool = True,
        *,
        skip_tokens: int = 0,
        layer_weights: str = "adaptive",
    ) -> None:
        if layers < 1:
            raise ValueError(f"layers: expected at least 1, got {layers}")
        self.beta = beta
        self.detach_weights = detach_weights
        self.skip_tokens = skip_tokens
        self.layer_weights = check_layer_weights(layer_weights)
        self._alphas: list[Tensor | None] = [None] * layers

    def push(self, layer: int, student: Tensor, teacher: Tensor) -> None:
        """Take layer 1..L, in any order.

        Args:
            layer: which.
            student, teacher: [B, S, D].

        Raises:
            TypeError: if a dtype is none of floating point.
            ValueError: if there is no such layer, it has been pushed already, or the shapes differ.
        """
        if not 1 <= layer <= len(self._alphas):
            raise ValueError(f"layer: expected 1 to {len(self._alphas)}, got {layer}")
        if self._alphas[layer - 1] is not None:
            raise ValueError(f"layer: {layer} has been pushed already")
        _check_layer(layer, student, teacher, self.skip_tokens)
        self._alphas[layer - 1] = _alphas([student], [teacher], self.skip_tokens)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, alpha, weights) as `layerwise_distillation` gives them; the next step can then be pushed.

        Raises:
            ValueError: if a layer is missing.
        """
        missing = [layer for layer, alpha in enumerate(self._alphas, start=1) if alpha is None]
        if missing:
            raise ValueError(f"layer: {', '.join(map(str, missing))} of {len(self._alphas)} not pushed yet")
        alpha = torch.cat([alpha for alpha in self._alphas if alpha is not None])
        self._alphas = [None] * len(self._alphas)
        return _weigh(alpha, self.beta, self.detach_weights, self.layer_weights)


def _check_layer(layer: int, student: Tensor, teacher: Tensor, skip_tokens: int) -> None:
    if student.ndim != 3:
        raise ValueError(f"student: layer {layer}: expected [B, S, D], got shape {tuple(student.shape)}")
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher: layer {layer} has shape {tuple(teacher.shape)}, expected the student's {tuple(student.shape)}"
        )
    for name, side in (("student", student), ("teacher", teacher)):
        if not side.is_floating_point():
            raise TypeError(f"{name}: layer {layer}: expected a floating point dtype, got {side.dtype}")
    if not 0 <= skip_tokens <= student.shape[1]:
        raise ValueError(f"skip_tokens: expected 0 to {student.shape[1]} tokens, got {skip_tokens}")


def _alphas(student: list[Tensor], teacher: list[Tensor], skip_tokens: int) -> Tensor:
    """The mean cosine distance of each layer, [L] in float32, differentiable in the student."""
    with_gradient = torch.is_grad_enabled() and any(s.requires_grad for s in student)
    distances = torch.ops.uniflow_kernels.cosine_distances(
        student, [t.detach() for t in teacher], skip_tokens, with_gradient
    )[0]
    return distances


def check_layer_weights(name: str) -> str:
    """`name`, or a ValueError that lists the choices if it is none of them."""
    if name not in LAYER_WEIGHTS:
        raise ValueError(f"layer_weights: expected one of {', '.join(LAYER_WEIGHTS)}, got {name!r}")
    return name


def _weigh(alpha: Tensor, beta: float, detach_weights: bool, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    if kind == "uniform":
        return alpha.mean(), alpha.detach(), torch.full_like(alpha, 1 / len(alpha))
    depth = torch.arange(1, len(alpha) + 1, device=alpha.device, dtype=alpha.dtype) / len(alpha)
    # (l/L) exp(beta*alpha), normalised, is a softmax with the depth as log-prior: no overflow for any beta
    weights = torch.softmax(beta * (alpha.detach() if detach_weights else alpha) + depth.log(), dim=0)
    return (weights * alpha).sum(), alpha.detach(), weights.detach()


# --- in plain PyTorch ---


def plain_cosine_distance(
    student: Tensor, teacher: Tensor, skip_tokens: int, distances: Tensor, gradient: Tensor | None
) -> None:
    """1 - cosine of every token of a layer, and its gradient, a piece at a time.

    Args:
        student, teacher: [B, S, D].
        skip_tokens: how many at the front do not count.
        distances: [B, S - skip_tokens], float32; written.
        gradient: None, or [B, S, D]; written: each token's gradient of its own distance.
    """
    limit = _CPU_CHUNK if student.device.type == "cpu" else _GPU_CHUNK
    batch, length, width = student.shape
    counted = length - skip_tokens
    images = max(1, limit // max(1, counted * width))
    tokens = max(1, limit // max(1, width))
    for b in range(0, batch, images):
        for start in range(skip_tokens, length, tokens):
            rows = slice(b, b + images), slice(start, start + tokens)
            s, t = student[rows].float(), teacher[rows].float()
            s_norm = s.norm(dim=-1, keepdim=True)
            s_least, t_least = s_norm.clamp(min=EPS), t.norm(dim=-1, keepdim=True).clamp_(min=EPS)
            s_unit, t_unit = s / s_least, t / t_least
            cosine = (s_unit * t_unit).sum(-1, keepdim=True)
            distances[rows[0], start - skip_tokens : start - skip_tokens + tokens] = 1 - cosine[..., 0]
            if gradient is not None:
                # below the least norm the denominator is a constant
                along = s_unit.mul_(cosine * (s_norm > EPS))
                largest = torch.finfo(gradient.dtype).max
                gradient[rows] = along.sub_(t_unit).div_(s_least).clamp_(-largest, largest)
    if gradient is not None:
        gradient[:, :skip_tokens] = 0


# --- the registered op ---

_LIBRARY = torch.library.Library("uniflow_kernels", "FRAGMENT")
_LIBRARY.define(
    "cosine_distances(Tensor[] student, Tensor[] teacher, SymInt skip_tokens, bool with_gradient) -> (Tensor, Tensor[])"
)


def _choose(student: list[Tensor], teacher: list[Tensor]) -> Any:
    """The module whose kernels serve such layers, or None for plain PyTorch."""
    sides = (*student, *teacher)
    layout = None
    if any(side.stride(-1) != 1 and side.shape[-1] > 1 for side in sides):
        layout = "the elements of a token are not neighbours in memory"
    elif any(side.dtype != student[0].dtype for side in sides):
        layout = "the layers differ in dtype"
    triton = triton_kernels.why_not(*sides) or layout
    if triton is None and student[0].shape[-1] > triton_kernels.MOST_DISTILLED_COLUMNS:
        triton = f"it keeps at most {triton_kernels.MOST_DISTILLED_COLUMNS} columns in registers"
    chosen = choose("layerwise_distillation", {"triton": triton, "cuda": cuda_kernels.why_not(*sides) or layout})
    if chosen == "triton":
        return importlib.import_module("uniflow_kernels.triton_kernels.distillation")
    return cuda_kernels if chosen == "cuda" else None


@torch.library.impl(_LIBRARY, "cosine_distances", "CompositeExplicitAutograd")
def _cosine_distances(
    student: list[Tensor], teacher: list[Tensor], skip_tokens: int, with_gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    batch, length, _ = student[0].shape
    gradients = [torch.empty_like(s, memory_format=torch.contiguous_format) for s in student] if with_gradient else []
    distances = torch.empty(len(student), batch, length - skip_tokens, device=student[0].device)
    kernels = _choose(student, teacher)
    if kernels is not None:
        kernels.cosine_distances(student, teacher, skip_tokens, gradients, distances)
        return _mean(distances), gradients
    for layer, (s, t) in enumerate(zip(student, teacher, strict=True)):
        plain_cosine_distance(s, t, skip_tokens, distances[layer], gradients[layer] if with_gradient else None)
    return _mean(distances), gradients


def _mean(distances: Tensor) -> Tensor:
    """Over the tokens of each layer; 0 where there is none."""
    return distances.flatten(1).sum(1) / max(1, distances[0].numel())


@torch.library.register_fake("uniflow_kernels::cosine_distances", lib=_LIBRARY)
def _cosine_distances_fake(
    student: list[Tensor], teacher: list[Tensor], skip_tokens: int, with_gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    gradients = [torch.empty_like(s, memory_format=torch.contiguous_format) for s in student] if with_gradient else []
    return student[0].new_empty(len(student), dtype=torch.float32), gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    student, _, skip_tokens, _ = inputs
    ctx.save_for_backward(*output[1])
    ctx.layers = len(student)
    ctx.wanted = [s.requires_grad for s in student]
    ctx.tokens = student[0].shape[0] * (student[0].shape[1] - skip_tokens)


def _backward(ctx: Any, incoming: Tensor, _: Any) -> tuple[Any, ...]:
    factors = incoming / max(1, ctx.tokens)
    gradients = [
        scaled(gradient, factor) if wanted else None
        for gradient, factor, wanted in zip(ctx.saved_tensors, factors.unbind(), ctx.wanted, strict=True)
    ]
    return gradients, [None] * ctx.layers, None, None


torch.library.register_autograd("uniflow_kernels::cosine_distances", _backward, setup_context=_setup, lib=_LIBRARY)
