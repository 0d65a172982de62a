"""Layer-wise adaptive self-distillation: every layer of the student learns from the same layer of a frozen teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def layerwise_distillation(
    student: Sequence[Tensor] | Tensor,
    teacher: Sequence[Tensor] | Tensor,
    beta: float = 2.0,
    detach_weights: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine distance per layer, where deeper and worse-aligned layers weigh more.

    With alpha_l = 1 - mean cosine over all tokens of layer l = 1..L,
    w_l = (l/L) exp(beta*alpha_l) / sum_k (k/L) exp(beta*alpha_k) and loss = sum_l w_l alpha_l.

    Args:
        student: L tensors [B, S, D], or one [L, B, S, D]. Leave a class token out by a view (`h[:, 1:]`).
        teacher: same shapes; no gradient flows into it.
        beta: how strongly badly aligned layers are preferred (the paper's ablation finds 2 best).
        detach_weights: whether the weights are constants for the gradient. The paper does not say.

    Returns:
        (loss, alpha, weights): a scalar, [L] and [L], all float32; `alpha` and `weights` are detached.

    Raises:
        ValueError: if there is no layer, or the two sides differ in number of layers or in shape.

    Source: the UniFlow paper, layer-wise adaptive self-distillation.
    """
    if len(student) == 0 or len(student) != len(teacher):
        raise ValueError(
            f"student, teacher: expected as many layers in both, at least one, got {len(student)} and {len(teacher)}"
        )
    distances = []
    for layer, (s, t) in enumerate(zip(student, teacher, strict=True), start=1):
        if s.shape != t.shape:
            raise ValueError(
                f"teacher: layer {layer} has shape {tuple(t.shape)}, expected the student's {tuple(s.shape)}"
            )
        distances.append(1 - F.cosine_similarity(s.float(), t.detach().float(), dim=-1, eps=1e-8).mean())
    alpha = torch.stack(distances)
    depth = torch.arange(1, len(distances) + 1, device=alpha.device, dtype=alpha.dtype) / len(distances)
    # (l/L) exp(beta*alpha), normalised, is a softmax with the depth as log-prior: no overflow for any beta
    weights = torch.softmax(beta * (alpha.detach() if detach_weights else alpha) + depth.log(), dim=0)
    return (weights * alpha).sum(), alpha.detach(), weights.detach()
