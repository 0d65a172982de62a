"""Flow matching on patches: the noisy input x_t and the velocity loss, straight from images.

Both read the images as they are and make patches, normalisation and seeded noise on the way; the loss makes its
gradient in the same pass, so that nothing of the size of the prediction is stored but that gradient.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from uniflow_kernels import cuda_kernels, triton_kernels
from uniflow_kernels.choice import choose
from uniflow_kernels.ops.noise import check_seed, seeded_noise
from uniflow_kernels.ops.patches import patchify, unpatchify
from uniflow_kernels.ops.scaling import scaled

REDUCTIONS = ("mean", "sum", "none")
_CPU_CHUNK = 1 << 20  # elements at a time on a CPU: the temporaries stay small
_GPU_CHUNK = 1 << 27


def interpolate(
    images: Tensor,
    t: Tensor,
    patch_size: int,
    noise: Tensor | None = None,
    seed: int | None = None,
    *,
    offset: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    repeats: int = 1,
    columns: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The point x_t = t*x1 + (1-t)*x0 on the straight path from noise x0 to the patches x1 of the images.

    Args:
        images: [B, C, H, W], float, or uint8, which stands for its value / 255. Any strides.
        t: [k*B] or [k*B, N], in [0, 1]; 0 is noise, 1 the image.
        patch_size: P, in pixels.
        noise: x0, [k*B, N, C*P*P].
        seed: instead of `noise`: x0 is `seeded_noise(k*B*N, C*P*P, seed, offset)` and is never stored. `noise_seed`
            draws one.
        offset: which part of the seed's numbers.
        mean, std: C numbers each: pixels become (pixel - mean) / std, uint8 after the division by 255.
        repeats: k, how often every token is used, each time with its own t and noise: as if the images were
            `images.repeat(k, 1, 1, 1)`, without the copy.
        columns: length of a row of the result, at least C*P*P; what is beyond the patch is zero. For a product that
            wants padded rows.
        dtype: of the result.

    Returns:
        [k*B, N, columns or C*P*P] in `dtype`, else in the dtype of `images`, of `noise` for uint8 images, or float32;
        computed in float32. Differentiable in images, t and noise.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if the shapes do not fit together, or not exactly one of `noise` and `seed` is given.

    Source: rectified flow (Liu et al. 2022) in the release's direction of time.
    """
    rows = check_rows(images, patch_size, noise, seed, offset, mean, std, repeats)
    if t.shape not in (rows[:1], rows[:2]):
        raise ValueError(f"t: expected shape {rows[:1]} or {rows[:2]}, got {tuple(t.shape)}")
    if dtype is None:
        dtype = images.dtype if images.is_floating_point() else torch.float32 if noise is None else noise.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating point dtype, got {dtype}")
    columns = _check_columns(columns, rows)
    return torch.ops.uniflow_kernels.interpolate(
        images, t, noise, mean, std, seed or 0, offset, patch_size, repeats, columns, dtype
    )


def velocity_loss(
    velocity: Tensor,
    images: Tensor,
    patch_size: int,
    noise: Tensor | None = None,
    seed: int | None = None,
    *,
    offset: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    repeats: int = 1,
    columns: int | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Squared error of a predicted velocity against the true one, x1 - x0.

    The loss of a token is weight * mean over its C*P*P elements of (velocity - (x1 - x0))^2.

    Args:
        velocity: [k*B, N, columns or C*P*P], the prediction, float.
        images, patch_size, noise, seed, offset, mean, std, repeats: as given to `interpolate`.
        columns: length of a row of `velocity`; what is beyond the patch does not count and gets a zero gradient.
        weights: [k*B, N], float, constants; 1 if not given. To learn weights, multiply the losses of
            reduction="none" with them.
        mask: [k*B, N], bool: which tokens count; all if not given. The others get a zero gradient, whatever they hold.
        reduction: "mean" over the tokens that count (0 where none does), "sum" over them, or "none".

    Returns:
        In float32: a scalar, or [k*B, N] without a reduction. Differentiable in velocity, images and noise.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if the shapes do not fit together, not exactly one of `noise` and `seed` is given, the reduction is
            unknown, or `weights` wants a gradient.

    Source: the flow matching objective of the UniFlow paper; weights, masks and repeats as in MAR's diffusion loss.
    """
    rows = check_rows(images, patch_size, noise, seed, offset, mean, std, repeats)
    row_length = _check_columns(columns, rows)
    if velocity.shape != (*rows[:2], row_length):
        raise ValueError(
            f"velocity: expected shape {(*rows[:2], row_length)}, one row a patch, got {tuple(velocity.shape)}"
        )
    if not velocity.is_floating_point():
        raise TypeError(f"velocity: expected a floating point dtype, got {velocity.dtype}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    for name, value in (("weights", weights), ("mask", mask)):
        if value is not None and value.shape != rows[:2]:
            raise ValueError(f"{name}: expected shape {rows[:2]}, one value a token, got {tuple(value.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
    if weights is not None and weights.requires_grad:
        raise ValueError(
            'weights: expected constants; to learn them, multiply the losses of reduction="none" with them'
        )
    wanted = (velocity, images) if noise is None else (velocity, images, noise)
    with_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted)
    return torch.ops.uniflow_kernels.velocity_loss(
        velocity, images, noise, weights, mask, mean, std,
        seed or 0, offset, patch_size, repeats, reduction, with_gradient,
    )[0]  # fmt: skip


def check_rows(
    images: Tensor,
    patch_size: int,
    noise: Tensor | None,
    seed: int | None,
    offset: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    repeats: int,
) -> tuple[int, int, int]:
    """Check what both functions take; the shape [k*B, N, C*P*P] that rows have."""
    if images.ndim != 4:
        raise ValueError(f"images: expected 4 dimensions [B, C, H, W], got shape {tuple(images.shape)}")
    batch, channels, height, width = images.shape
    if patch_size < 1:
        raise ValueError(f"patch_size: expected a positive number of pixels, got {patch_size}")
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"images: height and width must be multiples of the patch ({patch_size}), got {height}x{width}"
        )
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images: expected a floating point dtype or torch.uint8, got {images.dtype}")
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    rows = (
        repeats * batch,
        (height // patch_size) * (width // patch_size),
        channels * patch_size * patch_size,
    )
    _check_noise(noise, seed, offset, rows)
    if (mean is None) != (std is None):
        raise ValueError("mean, std: expected both or neither")
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and len(value) != channels:
            raise ValueError(f"{name}: expected {channels} numbers, one a channel, got {len(value)}")
    return rows


def _check_noise(noise: Tensor | None, seed: int | None, offset: int, rows: tuple[int, int, int]) -> None:
    if (noise is None) == (seed is None):
        raise ValueError("noise, seed: expected exactly one of them")
    if noise is not None:
        if noise.shape != rows:
            raise ValueError(f"noise: expected shape {rows}, one row a patch, got {tuple(noise.shape)}")
        if not noise.is_floating_point():
            raise TypeError(f"noise: expected a floating point dtype, got {noise.dtype}")
    if isinstance(seed, torch.Generator):
        raise TypeError("seed: expected an integer; draw one with noise_seed(generator) and give it to both functions")
    if seed is not None:
        check_seed(seed, offset)


def _check_columns(columns: int | None, rows: tuple[int, int, int]) -> int:
    if columns is None:
        return rows[2]
    if columns < rows[2]:
        raise ValueError(f"columns: expected at least C*P*P = {rows[2]}, got {columns}")
    return columns


# --- in plain PyTorch ---


def pixel_scale_and_shift(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor | None:
    """[C, 2] in float32, on the device of `images`: a pixel p becomes scale*p + shift. None where nothing is to do."""
    if mean is None and images.dtype != torch.uint8:
        return None
    channels = images.shape[1]
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    return _scale_and_shift(
        tuple(mean or [0.0] * channels), tuple(std or [1.0] * channels), unit, images.device.type, images.device.index
    )


@functools.lru_cache(64)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], unit: float, device: str, index: int | None
) -> Tensor:
    pairs = [(1 / (unit * s), -m / s) for m, s in zip(mean, std, strict=True)]
    return torch.tensor(pairs).reshape(-1, 2).to(torch.device(device, index) if index is not None else device)


def plain_interpolate(
    images: Tensor,
    t: Tensor,
    noise: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    seed: int,
    offset: int,
    patch_size: int,
    repeats: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """`interpolate` in plain PyTorch, a piece at a time."""
    tokens = (images.shape[2] // patch_size) * (images.shape[3] // patch_size)
    x_t = torch.empty(repeats * images.shape[0], tokens, columns, dtype=dtype, device=images.device)
    for piece in _pieces(images, patch_size, repeats, noise, mean, std, seed, offset):
        rows, band, x1, x0 = piece
        times = t[rows, band] if t.ndim == 2 else t[rows, None]
        times = times.float()[..., None]
        part = x_t[rows, band, : x1.shape[-1]]
        if dtype == torch.float32:
            torch.lerp(x0, x1, times, out=part)
        else:
            part.copy_(torch.lerp(x0, x1, times))
        x_t[rows, band, x1.shape[-1] :] = 0
    return x_t


def plain_velocity_loss(
    velocity: Tensor,
    images: Tensor,
    noise: Tensor | None,
    coefficients: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    seed: int,
    offset: int,
    patch_size: int,
    repeats: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Each token's coefficient * sum of squared errors, and the gradient of their sum, in plain PyTorch.

    A coefficient of 0 leaves a token out.
    """
    losses = torch.empty(velocity.shape[:2], device=velocity.device)
    gradient = velocity.new_empty(velocity.shape if with_gradient else 0)
    same_for_all = coefficients.numel() == 1
    coefficients = coefficients.expand(losses.shape)
    for rows, band, x1, x0 in _pieces(images, patch_size, repeats, noise, mean, std, seed, offset):
        length = x1.shape[-1]
        # in float32 the errors become the gradient where they stand
        in_place = with_gradient and gradient.dtype == torch.float32
        difference = torch.sub(x0, x1, out=gradient[rows, band, :length] if in_place else None)
        difference.add_(velocity[rows, band, :length])
        coefficient = coefficients[rows, band]
        if not same_for_all:
            difference.masked_fill_((coefficient == 0)[..., None], 0)
        losses[rows, band] = torch.linalg.vector_norm(difference, dim=-1).square_().mul_(coefficient)
        if with_gradient:
            torch.mul(difference, 2 * coefficient[..., None], out=gradient[rows, band, :length])
            gradient[rows, band, length:] = 0
    return losses, gradient


def _pieces(
    images: Tensor,
    patch_size: int,
    repeats: int,
    noise: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    seed: int,
    offset: int,
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Which rows and tokens a piece holds, and its patches x1 and noise x0 [rows, tokens, C*P*P] in float32."""
    batch, channels, height, width = images.shape
    across, down = width // patch_size, height // patch_size
    length = channels * patch_size * patch_size
    limit = _CPU_CHUNK if images.device.type == "cpu" else _GPU_CHUNK
    at_once = max(1, limit // max(1, down * across * length))
    lines = min(down, max(1, limit // max(1, across * length)))
    affine = pixel_scale_and_shift(images, mean, std)
    for start in range(0, batch, at_once):
        for top in range(0, down, lines):
            stop, bottom = min(batch, start + at_once), min(down, top + lines)
            pixels = images[start:stop, :, top * patch_size : bottom * patch_size].float()
            if affine is not None:
                pixels = pixels * affine[:, 0, None, None] + affine[:, 1, None, None]
            x1 = patchify(pixels, patch_size)
            band = slice(top * across, bottom * across)
            for repeat in range(repeats):
                rows = slice(repeat * batch + start, repeat * batch + stop)
                if noise is not None:
                    x0 = noise[rows, band].float()
                else:
                    # whole images follow each other, a band is one image's: the rows are consecutive either way
                    count, first = (stop - start) * (band.stop - band.start), rows.start * down * across + band.start
                    x0 = seeded_noise(count, length, seed, offset, images.device, first_row=first)
                    x0 = x0.view(stop - start, band.stop - band.start, length)
                yield rows, band, x1, x0


# --- registered ops ---

_LIBRARY = torch.library.Library("uniflow_kernels", "FRAGMENT")
_LIBRARY.define(
    "interpolate(Tensor images, Tensor t, Tensor? noise, float[]? mean, float[]? std, SymInt seed, SymInt offset, "
    "SymInt patch_size, SymInt repeats, SymInt columns, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "velocity_loss(Tensor velocity, Tensor images, Tensor? noise, Tensor? weights, Tensor? mask, float[]? mean, "
    "float[]? std, SymInt seed, SymInt offset, SymInt patch_size, SymInt repeats, str reduction, bool with_gradient) "
    "-> (Tensor, Tensor)"
)


def _choose(op: str, images: Tensor, patch_size: int, columns: int, rows: tuple[Tensor | None, ...]) -> Any:
    """The module whose kernels serve such an input, or None for plain PyTorch."""
    # of images in uint8 only the device counts
    pixels = images.new_empty(0, dtype=torch.float32) if images.dtype == torch.uint8 else images
    apart = next((x for x in rows if x is not None and x.stride(-1) != 1 and x.shape[-1] > 1), None)
    layout = None if apart is None else "the elements of a row are not neighbours in memory"
    triton = triton_kernels.why_not(pixels, *rows) or layout
    cuda = cuda_kernels.why_not(pixels, *rows) or layout
    cuda = cuda or cuda_kernels.why_not_patch(images.shape[1], patch_size, columns)
    chosen = choose(op, {"triton": triton, "cuda": cuda})
    if chosen == "triton":
        return importlib.import_module("uniflow_kernels.triton_kernels.velocity")
    return cuda_kernels if chosen == "cuda" else None


@torch.library.impl(_LIBRARY, "interpolate", "CompositeExplicitAutograd")
def _interpolate(
    images: Tensor, t: Tensor, noise: Tensor | None, mean: Any, std: Any, seed: int, offset: int,
    patch_size: int, repeats: int, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    x_t = _interpolate_fake(images, t, noise, mean, std, seed, offset, patch_size, repeats, columns, dtype)
    kernels = _choose("interpolate", images, patch_size, columns, (x_t, noise))
    if kernels is None:
        return plain_interpolate(images, t, noise, mean, std, seed, offset, patch_size, repeats, columns, dtype)
    affine = pixel_scale_and_shift(images, mean, std)
    kernels.interpolate(images, t, noise, affine, seed, offset, patch_size, repeats, columns, x_t)
    return x_t


@torch.library.register_fake("uniflow_kernels::interpolate", lib=_LIBRARY)
def _interpolate_fake(
    images: Tensor, t: Tensor, noise: Tensor | None, mean: Any, std: Any, seed: int, offset: int,
    patch_size: int, repeats: int, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    tokens = (images.shape[2] // patch_size) * (images.shape[3] // patch_size)
    return images.new_empty(repeats * images.shape[0], tokens, columns, dtype=dtype)


def _interpolate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, t, noise, *ctx.options = inputs
    ctx.save_for_backward(images, t, noise)


def _interpolate_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    images, t, noise = ctx.saved_tensors
    mean, std, seed, offset, patch_size, repeats = ctx.options[:6]
    length = images.shape[1] * patch_size * patch_size
    gradient = gradient[..., :length].float()
    times = t.float().reshape(*t.shape, *(1,) * (3 - t.ndim))
    for_images = for_t = for_noise = None
    if ctx.needs_input_grad[0]:
        for_images = _into_images(gradient * times, images, std, patch_size, repeats)
    if ctx.needs_input_grad[1]:
        shape, columns = (t.shape if t.ndim == 2 else gradient.shape[:2]), length
        ends = [
            plain_interpolate(images, gradient.new_full(shape[:1], end), noise, mean, std, seed, offset, patch_size,
                              repeats, columns, torch.float32)
            for end in (1.0, 0.0)
        ]  # fmt: skip
        for_t = (gradient * (ends[0] - ends[1])).sum(-1)
        for_t = (for_t if t.ndim == 2 else for_t.sum(1)).to(t.dtype)
    if noise is not None and ctx.needs_input_grad[2]:
        for_noise = (gradient * (1 - times)).to(noise.dtype)
    return for_images, for_t, for_noise, *[None] * len(ctx.options)


torch.library.register_autograd(
    "uniflow_kernels::interpolate", _interpolate_backward, setup_context=_interpolate_setup, lib=_LIBRARY
)


@torch.library.impl(_LIBRARY, "velocity_loss", "CompositeExplicitAutograd")
def _velocity_loss(
    velocity: Tensor, images: Tensor, noise: Tensor | None, weights: Tensor | None, mask: Tensor | None,
    mean: Any, std: Any, seed: int, offset: int, patch_size: int, repeats: int, reduction: str, with_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    coefficients = _coefficients(velocity, images, patch_size, weights, mask, reduction)
    kernels = _choose("velocity_loss", images, patch_size, velocity.shape[-1], (velocity, noise))
    if kernels is None:
        losses, gradient = plain_velocity_loss(
            velocity, images, noise, coefficients, mean, std, seed, offset, patch_size, repeats, with_gradient
        )
    else:
        losses = velocity.new_empty(velocity.shape[:2], dtype=torch.float32)
        gradient = velocity.new_empty(velocity.shape if with_gradient else 0)
        affine = pixel_scale_and_shift(images, mean, std)
        kernels.velocity_loss(
            velocity, images, noise, coefficients, affine, seed, offset, patch_size, repeats,
            gradient if with_gradient else None, losses,
        )  # fmt: skip
    return losses if reduction == "none" else losses.sum(), gradient


def _coefficients(
    velocity: Tensor, images: Tensor, patch_size: int, weights: Tensor | None, mask: Tensor | None, reduction: str
) -> Tensor:
    """What each token's sum of squared errors is multiplied by, in float32: [k*B, N], or one value for all, [1, 1]."""
    each = 1 / max(1, images.shape[1] * patch_size * patch_size)
    if weights is None and mask is None:
        over = velocity.shape[0] * velocity.shape[1] if reduction == "mean" else 1
        return torch.full((1, 1), each / max(1, over), device=velocity.device)
    if mask is None:
        assert weights is not None
        over = max(1, weights.numel()) if reduction == "mean" else 1
        return weights.float() * (each / over)
    coefficients = mask.float() if weights is None else weights.float() * mask
    coefficients = coefficients * each
    return coefficients / mask.sum().clamp(min=1) if reduction == "mean" else coefficients


@torch.library.register_fake("uniflow_kernels::velocity_loss", lib=_LIBRARY)
def _velocity_loss_fake(
    velocity: Tensor, images: Tensor, noise: Tensor | None, weights: Tensor | None, mask: Tensor | None,
    mean: Any, std: Any, seed: int, offset: int, patch_size: int, repeats: int, reduction: str, with_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    losses = velocity.new_empty(velocity.shape[:2] if reduction == "none" else (), dtype=torch.float32)
    return losses, velocity.new_empty(velocity.shape if with_gradient else 0)


def _velocity_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, images, noise, _, _, _, std, _, _, patch_size, repeats, *_ = inputs
    ctx.save_for_backward(output[1], images if images.requires_grad else None)
    ctx.std, ctx.patch_size, ctx.repeats = std, patch_size, repeats
    ctx.image_like = images.shape[1]
    ctx.noise_dtype = None if noise is None else noise.dtype


def _velocity_loss_backward(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Any, ...]:
    gradient, images = ctx.saved_tensors
    gradient = scaled(gradient, incoming)
    for_images = for_noise = None
    rows = gradient[..., : ctx.image_like * ctx.patch_size**2]
    if ctx.needs_input_grad[1]:
        for_images = _into_images(-rows.float(), images, ctx.std, ctx.patch_size, ctx.repeats)
    if ctx.needs_input_grad[2]:
        for_noise = rows.to(ctx.noise_dtype)
    return gradient, for_images, for_noise, *[None] * 10


torch.library.register_autograd(
    "uniflow_kernels::velocity_loss", _velocity_loss_backward, setup_context=_velocity_loss_setup, lib=_LIBRARY
)


def _into_images(rows: Tensor, images: Tensor, std: Sequence[float] | None, patch_size: int, repeats: int) -> Tensor:
    """The gradient of the patches, [k*B, N, C*P*P], as that of the images."""
    summed = rows.unflatten(0, (repeats, images.shape[0])).sum(0)
    pixels = unpatchify(summed, patch_size, (images.shape[2], images.shape[3]))
    if std is not None:
        pixels = pixels / torch.tensor(std, device=pixels.device)[:, None, None]
    return pixels.to(images.dtype)
