"""The noisy input and the velocity loss of flow matching as they are defined: whole, and out of place.

This serves where PyTorch must see each operation: in the transforms of torch.func and for forward-mode derivatives.
Elsewhere `velocity` has the same in pieces, with the gradient made on the way, and the kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uniflow_kernels.ops.noise import seeded_noise
from uniflow_kernels.ops.patches import plain_patchify
from uniflow_kernels.ops.pieces import head
from uniflow_kernels.ops.pixels import per_channel
from uniflow_kernels.source import Source


def defined_interpolate(source: Source, t: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """`interpolate`; computed in float64 where the images are in float64."""
    x1, x0 = ends(source)
    x_t = torch.lerp(x0, x1, t.to(x1.dtype).reshape(*t.shape, *(1,) * (3 - t.ndim)))
    return F.pad(x_t, (0, columns - source.length)).to(dtype)


def defined_velocity_loss(
    source: Source, velocity: Tensor, weights: Tensor | None, mask: Tensor | None, reduction: str
) -> Tensor:
    """`velocity_loss`; computed in float64 where the velocity is in float64."""
    x1, x0 = ends(source)
    error = head(velocity, source.length).to(torch.promote_types(velocity.dtype, x1.dtype)) - (x1 - x0)
    coefficients = coefficients_of(source.rows, weights, mask, reduction)
    if isinstance(coefficients, Tensor):
        error = error.masked_fill(coefficients[..., None] == 0, 0)
    losses = (error.square().sum(-1) * coefficients).float()
    return losses if reduction == "none" else losses.sum()


def ends(source: Source) -> tuple[Tensor, Tensor]:
    """The patches x1 and the noise x0, [k*B, N, C*P*P], whole, in float32 or float64."""
    images, (count, tokens, length) = source.images, source.rows
    pixels, affine = images.to(torch.promote_types(images.dtype, torch.float32)), pixel_scale_and_shift(source)
    if affine is not None:
        pixels = pixels * affine[:, :1, None] + affine[:, 1:, None]
    x1 = plain_patchify(pixels, source.patch_size).repeat(source.repeats, 1, 1)
    if source.noise is not None:
        return x1, source.noise.to(x1.dtype)
    x0 = seeded_noise(count * tokens, length, source.seed, source.offset, images.device, source.first_row)
    return x1, x0.view(x1.shape).to(x1.dtype)


def pixel_scale_and_shift(source: Source) -> Tensor | None:
    """[C, 2] in float32, on the images' device: a pixel p becomes scale*p + shift. None where nothing is to do."""
    images, mean, std = source.images, source.mean, source.std
    if mean is None and images.dtype != torch.uint8:
        return None
    channels = images.shape[1]
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    normalization = zip(mean or [0.0] * channels, std or [1.0] * channels, strict=True)
    return per_channel(tuple((1 / (unit * s), -m / s) for m, s in normalization), images)


def coefficients_of(
    rows: tuple[int, int, int], weights: Tensor | None, mask: Tensor | None, reduction: str
) -> Tensor | float:
    """What each token's sum of squared errors is multiplied by: [k*B, N] in float32, or one number for all."""
    batch, tokens, length = rows
    each = 1 / max(1, length)
    if weights is None and mask is None:
        over = batch * tokens if reduction == "mean" else 1
        return each / max(1, over)
    if mask is None:
        assert weights is not None
        over = max(1, weights.numel()) if reduction == "mean" else 1
        return weights.float() * (each / over)
    # where, since a token that does not count may have any weight
    coefficients = mask.float() if weights is None else weights.float().where(mask, 0)
    coefficients = coefficients * each
    return coefficients / mask.sum().clamp(min=1) if reduction == "mean" else coefficients
