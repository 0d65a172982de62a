"""Layer-wise adaptive self-distillation: every layer of the student learns from the same layer of a frozen teacher."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uniflow_kernels import cpu_kernels, cuda_kernels, triton_kernels
from uniflow_kernels.ops.pieces import chunk, part
from uniflow_kernels.ops.registration import is_left_to_torch, is_watched, kernels_for, register
from uniflow_kernels.ops.scaling import scaled

LAYER_WEIGHTS = ("adaptive", "uniform")
EPS = 1e-8  # the least norm, as in F.cosine_similarity


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
    shape = student[0].shape
    for layer, (s, t) in enumerate(zip(student, teacher, strict=True), start=1):
        if s.shape != shape:
            raise ValueError(f"student: layer {layer} has shape {tuple(s.shape)}, expected layer 1's {tuple(shape)}")
        _check_layer(layer, s, t, skip_tokens)
    check_layer_weights(layer_weights)
    return _weigh(_alphas(list(student), list(teacher), skip_tokens), beta, detach_weights, layer_weights)


class LayerwiseDistillation:
    """`layerwise_distillation` layer by layer: push each as soon as both sides have it, and let the teacher's go.

    Every push computes the layer's cosines and their gradient while both are still in the cache; nothing of the
    teacher is kept. A teacher in a narrower dtype than the student's is kept in the place of the gradient, which would
    take more, until the backward pass makes that; the student's layer its own graph holds anyway.

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
        self._check(layer)
        _check_layer(layer, student, teacher, self.skip_tokens)
        self._alphas[layer - 1] = _alphas([student], [teacher], self.skip_tokens)

    def put(self, layer: int, distance: Tensor) -> None:
        """Take layer 1..L, in any order, of which the mean distance is known: `compared_residual_norm` gives it.

        Args:
            layer: which.
            distance: a scalar, float32.

        Raises:
            ValueError: if there is no such layer, or it has been pushed already.
        """
        self._check(layer)
        self._alphas[layer - 1] = distance.view(1)

    def _check(self, layer: int) -> None:
        if not 1 <= layer <= len(self._alphas):
            raise ValueError(f"layer: expected 1 to {len(self._alphas)}, got {layer}")
        if self._alphas[layer - 1] is not None:
            raise ValueError(f"layer: {layer} has been pushed already")

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
    shape = student.shape
    if len(shape) != 3:
        raise ValueError(f"student: layer {layer}: expected [B, S, D], got shape {tuple(shape)}")
    if teacher.shape != shape:
        raise ValueError(
            f"teacher: layer {layer} has shape {tuple(teacher.shape)}, expected the student's {tuple(shape)}"
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        name, side = ("teacher", teacher) if student.is_floating_point() else ("student", student)
        raise TypeError(f"{name}: layer {layer}: expected a floating point dtype, got {side.dtype}")
    if not 0 <= skip_tokens <= shape[1]:
        raise ValueError(f"skip_tokens: expected 0 to {shape[1]} tokens, got {skip_tokens}")


def _alphas(student: list[Tensor], teacher: list[Tensor], skip_tokens: int) -> Tensor:
    """The mean cosine distance of each layer, [L] in float32, differentiable in the student."""
    if is_left_to_torch("layerwise_distillation", student[0].device):
        return defined_distances(student, [t.detach() for t in teacher], skip_tokens)
    constants = [t.detach() if t.requires_grad else t for t in teacher]
    with_gradient = torch.is_grad_enabled() and any(s.requires_grad for s in student)
    makes_now = with_gradient and not all(map(is_narrower, constants, student))
    return cosine_distances_op(student, constants, skip_tokens, makes_now)


def is_narrower(teacher: Tensor, student: Tensor) -> bool:
    """Whether the teacher's layer takes less memory than a gradient of the student's, whose dtype holds it exactly."""
    wide = torch.promote_types(teacher.dtype, student.dtype)
    return teacher.dtype.itemsize < student.dtype.itemsize and wide == student.dtype


def as_compared(teacher: Tensor, student: Tensor) -> Tensor:
    """A teacher's layer in the dtype in which it is compared with the student's: its own where that is narrower."""
    return teacher if is_narrower(teacher, student) else teacher.to(student.dtype)


def mean_distance(student: Tensor, teacher: Tensor, skip_tokens: int) -> Tensor:
    """Mean of 1 - cosine over the tokens of one layer [B, S, D], a scalar in float32, differentiable in the student."""
    return _alphas([student], [teacher], skip_tokens)[0]


def check_layer_weights(name: str) -> str:
    """`name`, or a ValueError that lists the choices if it is none of them."""
    if name not in LAYER_WEIGHTS:
        raise ValueError(f"layer_weights: expected one of {', '.join(LAYER_WEIGHTS)}, got {name!r}")
    return name


def _weigh(alpha: Tensor, beta: float, detach_weights: bool, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    constant = alpha.detach()
    if kind == "uniform":
        return alpha.mean(), constant, torch.full_like(constant, 1 / alpha.numel())
    # (l/L) exp(beta*alpha), normalised, is a softmax with the depth as log-prior: no overflow for any beta, and no L
    # kept on a CPU alone: what is made while a CUDA graph is captured holds nothing before the graph is replayed
    is_kept = alpha.is_cpu and not is_watched(alpha)
    prior = _kept_log_depths(alpha.numel()) if is_kept else _log_depths(alpha.numel(), alpha.device)
    weights = torch.softmax(torch.add(prior, constant if detach_weights else alpha, alpha=beta), dim=0)
    return torch.dot(weights, alpha), constant, weights.detach()


def _log_depths(layers: int, device: torch.device) -> Tensor:
    return torch.arange(1, layers + 1, device=device, dtype=torch.float32).log_()


@functools.lru_cache(64)
def _kept_log_depths(layers: int) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in that mode could not be used outside it
        return _log_depths(layers, torch.device("cpu"))


# --- in plain PyTorch ---


def defined_distances(student: list[Tensor], teacher: list[Tensor], skip_tokens: int) -> Tensor:
    """The mean cosine distance of each layer, [L] in float32: where PyTorch must see each operation."""

    def counted(side: Tensor) -> Tensor:
        return side[:, skip_tokens:].to(torch.promote_types(side.dtype, torch.float32))

    pairs = ((counted(s), counted(t)) for s, t in zip(student, teacher, strict=True))
    distances = [1 - F.cosine_similarity(s, t, dim=-1, eps=EPS) for s, t in pairs]
    return torch.stack([layer.sum() / max(1, layer.numel()) for layer in distances]).float()


def plain_cosine_distances(
    student: list[Tensor],
    teacher: list[Tensor],
    skip_tokens: int,
    gradients: list[Tensor],
    powers: Tensor | None,
    distances: Tensor,
) -> None:
    """Write 1 - cosine of every token of every layer, and its gradient, a piece at a time.

    Args:
        student, teacher: L tensors [B, S, D].
        skip_tokens: how many at the front do not count.
        gradients: none, or L tensors [B, S, D]; each token's gradient of its own distance.
        powers: None, or [L, B, S] in float32: what a token's gradient is multiplied by, a power of two near the norm of
            the student. What float16 holds of the gradient of a long token would be little.
        distances: [L, B, S - skip_tokens], float32.
    """
    limit = chunk(distances.device)
    batch, length, width = student[0].shape
    at_once = max(1, limit // max(1, student[0].numel()))  # a piece is of several layers, or of a part of one
    images, tokens = max(1, limit // max(1, (length - skip_tokens) * width)), max(1, limit // max(1, width))
    starts = range(0, len(student), at_once), range(0, batch, images), range(skip_tokens, length, tokens)
    for layer, image, token in itertools.product(*starts):
        layers, here = slice(layer, layer + at_once), (slice(image, image + images), slice(token, token + tokens))
        place = None if skip_tokens == 0 and images >= batch and tokens >= length else here
        sides = [
            (part(s, place).float(), part(t, place).float())
            for s, t in zip(student[layers], teacher[layers], strict=True)
        ]
        written = [part(gradient, place) for gradient in gradients[layers]]
        # what will be the gradient holds the products first, unless it is in another dtype
        memory = [w if w.dtype == torch.float32 else None for w in written] or [None] * len(sides)
        s_norm, t_norm, product = sums = distances.new_empty(3, len(sides), *sides[0][0].shape[:2], 1)
        for (s, t), own, *of_layer in zip(sides, memory, *sums, strict=True):
            torch.linalg.vector_norm(s, dim=-1, keepdim=True, out=of_layer[0])
            torch.linalg.vector_norm(t, dim=-1, keepdim=True, out=of_layer[1])
            torch.sum(torch.mul(s, t, out=own), -1, keepdim=True, out=of_layer[2])
        s_least, t_least = s_norm.clamp(min=EPS), t_norm.clamp_(min=EPS)
        # two divisions: the product of two least norms is not far from the smallest float
        cosine = product.div_(s_least).div_(t_least)
        distances[layers, here[0], token - skip_tokens : token - skip_tokens + tokens] = 1 - cosine[..., 0]
        if written:
            # below the least norm the denominator is a constant
            along = (cosine / s_least).div_(s_least).mul_(s_norm > EPS)
            if powers is not None:
                power = (s_least.view(torch.int32) & 0x7F800000).view(torch.float32).mul_(1024)
                powers[layers, here[0], here[1]] = power[..., 0]
            across = s_least.reciprocal_().div_(t_least)
            factors = [None] * len(sides) if powers is None else power.unbind()
            for (s, t), own, to, a, b, by in zip(sides, memory, written, along, across, factors, strict=True):
                value = torch.mul(s, a, out=own).addcmul_(t, b, value=-1)
                if own is None:
                    largest = min(torch.finfo(to.dtype).max, torch.finfo(value.dtype).max)
                    value.clamp_(-largest, largest)
                if by is not None:
                    value.mul_(by)
                if own is None:
                    to.copy_(value)
    for gradient in gradients if skip_tokens else ():
        gradient[:, :skip_tokens] = 0


# --- the registered op ---


def _kernels(student: list[Tensor], teacher: list[Tensor]) -> Any:
    """The module whose kernels serve such layers, or None for plain PyTorch."""

    def why_not(name: str) -> str | None:
        sides = *student, *teacher
        module = {"triton": triton_kernels, "cuda": cuda_kernels, "cpu": cpu_kernels}[name]
        if reason := module.why_not(*sides):
            return reason
        for side in sides:
            if side.stride(-1) != 1 and side.shape[-1] > 1:
                return "the elements of a token are not neighbours in memory"
        of_student, of_teacher = ({layer.dtype for layer in side} for side in (student, teacher))
        fits = of_student == of_teacher or is_narrower(teacher[0], student[0])
        if not fits or len(of_student) > 1 or len(of_teacher) > 1:
            return "the layers differ in dtype"
        if name == "triton" and student[0].shape[-1] > triton_kernels.MOST_DISTILLED_COLUMNS:
            return f"it keeps at most {triton_kernels.MOST_DISTILLED_COLUMNS} columns in registers"
        return None

    return kernels_for("layerwise_distillation", "distillation", student[0].device, why_not)


def _cosine_distances(
    student: list[Tensor], teacher: list[Tensor], skip_tokens: int, with_gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    batch, length, _ = student[0].shape
    made = _gradients(student, with_gradient)
    gradients, powers = made[: len(student)], made[len(student)].fill_(1) if len(made) > len(student) else None
    distances = student[0].new_empty(len(student), batch, length - skip_tokens, dtype=torch.float32)
    kernels = _kernels(student, teacher)
    compute = plain_cosine_distances if kernels is None else kernels.cosine_distances
    compute(student, teacher, skip_tokens, gradients, powers, distances)
    # the mean over the tokens of each layer; 0 where there is none
    return distances.sum((1, 2)).div_(max(1, distances[0].numel())), made


def _cosine_distances_fake(
    student: list[Tensor], teacher: list[Tensor], skip_tokens: int, with_gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    return student[0].new_empty(len(student), dtype=torch.float32), _gradients(student, with_gradient)


def _gradients(student: list[Tensor], with_gradient: bool) -> list[Tensor]:
    """Where the gradients go, and behind them, if float16 is among them, what each token's is multiplied by."""
    if not with_gradient:
        return []
    gradients = [torch.empty_like(s, memory_format=torch.contiguous_format) for s in student]
    if any(s.dtype == torch.float16 for s in student):
        gradients.append(student[0].new_empty(len(student), *student[0].shape[:2], dtype=torch.float32))
    return gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    student, teacher, skip_tokens, with_gradient = inputs
    ctx.save_for_backward(*(output[1] if with_gradient else (*student, *teacher)))
    ctx.layers, ctx.is_made, ctx.skip_tokens = len(student), with_gradient, skip_tokens
    ctx.wanted = [s.requires_grad for s in student]
    ctx.tokens = student[0].shape[0] * (student[0].shape[1] - skip_tokens)


def _backward(ctx: Any, incoming: Tensor, *_: None) -> dict[str, Any]:
    factors, saved = incoming / max(1, ctx.tokens), ctx.saved_tensors
    if not ctx.is_made:
        student, teacher = list(saved[: ctx.layers]), list(saved[ctx.layers :])
        _, saved = torch.ops.uniflow_kernels.cosine_distances(student, teacher, ctx.skip_tokens, True)
    made, powers = saved[: ctx.layers], saved[ctx.layers :]
    if powers:
        factors = factors[:, None, None] / powers[0]
    triples = zip(made, factors.unbind(), ctx.wanted, strict=True)
    gradients, own = zip(*[(gradient, factor) for gradient, factor, wanted in triples if wanted], strict=True)
    found = iter(scaled(list(gradients), own))
    return {"student": [next(found) if wanted else None for wanted in ctx.wanted], "teacher": [None] * ctx.layers}


cosine_distances_op = register(
    "cosine_distances(Tensor[] student, Tensor[] teacher, SymInt skip_tokens, bool with_gradient) "
    "-> (Tensor, Tensor[])",
    _cosine_distances,
    _cosine_distances_fake,
    _setup,
    _backward,
)
