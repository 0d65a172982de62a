"""Flow matching on patches: the noisy input x_t and the velocity loss, straight from images."""

from __future__ import annotations

import torch
from torch import Tensor

from uniflow_kernels.ops.patches import patchify


def interpolate(images: Tensor, t: Tensor, patch_size: int, noise: Tensor) -> Tensor:
    """The point x_t = t*x1 + (1-t)*x0 on the straight path from noise x0 to the patches x1 of the images.

    Args:
        images: [B, C, H, W], float.
        t: [B] or [B, N], in [0, 1]; 0 is noise, 1 the image.
        patch_size: P, in pixels.
        noise: x0, [B, N, C*P*P].

    Returns:
        [B, N, C*P*P] in the dtype of `images`; computed in float32.

    Raises:
        ValueError: if the shapes do not fit together.

    Source: rectified flow (Liu et al. 2022) in the release's direction of time.
    """
    patches = patchify(images, patch_size)
    _check_rows("noise", noise, patches)
    if t.shape not in (patches.shape[:1], patches.shape[:2]):
        raise ValueError(
            f"t: expected shape {tuple(patches.shape[:1])} or {tuple(patches.shape[:2])}, got {tuple(t.shape)}"
        )
    t = t.float().reshape(*t.shape, *(1,) * (3 - t.ndim))
    return torch.lerp(noise.float(), patches.float(), t).to(images.dtype)


def velocity_loss(velocity: Tensor, images: Tensor, patch_size: int, noise: Tensor) -> Tensor:
    """Mean squared error of a predicted velocity against the true one, x1 - x0.

    Args:
        velocity: [B, N, C*P*P], the prediction.
        images: [B, C, H, W], float.
        patch_size: P, in pixels.
        noise: x0, [B, N, C*P*P]: the noise given to `interpolate`.

    Returns:
        A scalar in float32.

    Raises:
        ValueError: if the shapes do not fit together.

    Source: the flow matching objective of the UniFlow paper.
    """
    patches = patchify(images, patch_size)
    _check_rows("noise", noise, patches)
    _check_rows("velocity", velocity, patches)
    return (velocity.float() - (patches.float() - noise.float())).square().mean()


def _check_rows(name: str, rows: Tensor, patches: Tensor) -> None:
    if rows.shape != patches.shape:
        raise ValueError(f"{name}: expected shape {tuple(patches.shape)}, one row a patch, got {tuple(rows.shape)}")
