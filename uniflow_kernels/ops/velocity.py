"""Flow matching on patches: the noisy input x_t and the velocity loss, straight from images.

Both read the images as they are and make patches, normalisation and seeded noise on the way; the loss makes its
gradient in the same pass, so that nothing of the size of the prediction is stored but that gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from uniflow_kernels import cpu_kernels, cuda_kernels, triton_kernels
from uniflow_kernels.ops.noise import plain_seeded_noise, seed_of
from uniflow_kernels.ops.patches import check_patch_size, patches_into, unpatchify
from uniflow_kernels.ops.pieces import Place, chunk, head, part
from uniflow_kernels.ops.pixels import check_normalization
from uniflow_kernels.ops.registration import is_left_to_torch, kernels_for, register, wants_gradient
from uniflow_kernels.ops.scaling import power_of, scaled, split
from uniflow_kernels.ops.velocity_definition import (
    coefficients_of,
    defined_interpolate,
    defined_velocity_loss,
    pixel_scale_and_shift,
)
from uniflow_kernels.source import Source

REDUCTIONS = ("mean", "sum", "none")


def interpolate(
    images: Tensor,
    t: Tensor,
    patch_size: int,
    noise: Tensor | None = None,
    seed: int | Tensor | torch.Generator | None = None,
    *,
    offset: int = 0,
    first_row: int = 0,
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
        seed: instead of `noise`: x0 is `seeded_noise(k*B*N, C*P*P, seed, offset)` and is never stored. A number;
            `noise_seed` draws one. Or a tensor of int64 that holds it on the device of `images`: then nothing waits for
            the device, and a CUDA graph replays with what the tensor holds by then. Or a generator to draw it from,
            which advances: another call then has other noise, so for x_t and its loss draw one number and give it to
            both.
        offset: which part of the seed's numbers.
        first_row: the row of the seed's noise that the first token has, where a batch comes piece by piece: x0 is
            `seeded_noise(k*B*N, C*P*P, seed, offset, first_row=first_row)`.
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
    source = source_of(images, patch_size, noise, seed, offset, first_row, mean, std, repeats)
    return interpolate_from(source, t, columns, dtype)


def interpolate_from(source: Source, t: Tensor, columns: int | None, dtype: torch.dtype | None) -> Tensor:
    """`interpolate` of a source."""
    rows, images = source.rows, source.images
    if t.shape not in (rows[:1], rows[:2]):
        raise ValueError(f"t: expected shape {rows[:1]} or {rows[:2]}, got {tuple(t.shape)}")
    if t.is_complex():
        raise TypeError(f"t: expected real numbers, got {t.dtype}")
    if dtype is None:
        x0 = source.noise
        dtype = images.dtype if images.is_floating_point() else torch.float32 if x0 is None else x0.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating point dtype, got {dtype}")
    columns = _check_columns(columns, rows)
    if is_left_to_torch("interpolate", images.device):
        return defined_interpolate(source, t, columns, dtype)
    return interpolate_op(source, t, columns, dtype)


def velocity_loss(
    velocity: Tensor,
    images: Tensor,
    patch_size: int,
    noise: Tensor | None = None,
    seed: int | Tensor | torch.Generator | None = None,
    *,
    offset: int = 0,
    first_row: int = 0,
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
        images, patch_size, noise, seed, offset, first_row, mean, std, repeats: as given to `interpolate`.
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
    source = source_of(images, patch_size, noise, seed, offset, first_row, mean, std, repeats)
    return velocity_loss_from(source, velocity, columns, weights, mask, reduction)


def velocity_loss_from(
    source: Source,
    velocity: Tensor,
    columns: int | None,
    weights: Tensor | None,
    mask: Tensor | None,
    reduction: str,
) -> Tensor:
    """`velocity_loss` of a source."""
    rows = source.rows
    row_length = _check_columns(columns, rows)
    if velocity.shape != (*rows[:2], row_length):
        raise ValueError(
            f"velocity: expected shape {(*rows[:2], row_length)}, one row a patch, got {tuple(velocity.shape)}"
        )
    if not velocity.is_floating_point():
        raise TypeError(f"velocity: expected a floating point dtype, got {velocity.dtype}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    check_weights(weights, mask, rows[:2])
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
    if weights is not None and weights.is_complex():
        raise TypeError(f"weights: expected real numbers, got {weights.dtype}")
    if weights is not None and weights.requires_grad:
        raise ValueError(
            'weights: expected constants; to learn them, multiply the losses of reduction="none" with them'
        )
    if is_left_to_torch("velocity_loss", velocity.device):
        return defined_velocity_loss(source, velocity, weights, mask, reduction)
    with_gradient = wants_gradient((velocity, source.images, source.noise))
    return velocity_loss_op(source, velocity, weights, mask, reduction, with_gradient)


def check_weights(weights: Tensor | None, mask: Tensor | None, tokens: tuple[int, int]) -> None:
    """Raise a ValueError for a tensor that has not one value a token."""
    for name, value in (("weights", weights), ("mask", mask)):
        if value is not None and value.shape != tokens:
            raise ValueError(f"{name}: expected shape {tokens}, one value a token, got {tuple(value.shape)}")


def source_of(
    images: Tensor,
    patch_size: int,
    noise: Tensor | None,
    seed: int | Tensor | torch.Generator | None,
    offset: int,
    first_row: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    repeats: int,
) -> Source:
    """Check what the ops take of a source, and draw its seed if a generator is given."""
    if images.ndim != 4:
        raise ValueError(f"images: expected 4 dimensions [B, C, H, W], got shape {tuple(images.shape)}")
    check_patch_size(patch_size)
    _, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"images: height and width must be multiples of the patch ({patch_size}), got {height}x{width}"
        )
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images: expected a floating point dtype or torch.uint8, got {images.dtype}")
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    if (noise is None) == (seed is None):
        raise ValueError("noise, seed: expected exactly one of them")
    check_normalization(mean, std, channels)
    number, held = seed_of(seed, offset, images.device, first_row)
    source = Source(images, noise, held, mean, std, number, offset, first_row, patch_size, repeats)
    if noise is not None:
        rows = source.rows
        if noise.shape != rows:
            raise ValueError(f"noise: expected shape {rows}, one row a patch, got {tuple(noise.shape)}")
        if not noise.is_floating_point():
            raise TypeError(f"noise: expected a floating point dtype, got {noise.dtype}")
    return source


def _check_columns(columns: int | None, rows: tuple[int, int, int]) -> int:
    if columns is None:
        return rows[2]
    if columns < rows[2]:
        raise ValueError(f"columns: expected at least C*P*P = {rows[2]}, got {columns}")
    return columns


# --- in plain PyTorch ---


def plain_interpolate(source: Source, t: Tensor, x_t: Tensor) -> None:
    """`interpolate` in plain PyTorch: write x_t, a piece at a time."""
    times = (t if t.ndim == 2 else t[:, None]).float().expand(x_t.shape[:2])
    for place, x1, x0 in _pieces(source, x_t):
        torch.lerp(x0, x1, part(times, place)[..., None], out=x1)
        _store(x1, part(x_t, place))


def plain_velocity_loss(
    source: Source, velocity: Tensor, coefficients: Tensor | float, gradient: Tensor | None, losses: Tensor
) -> None:
    """Write each token's coefficient * sum of squared errors, and the gradient of their sum unless it is None.

    A coefficient of 0 leaves a token out.
    """
    for place, x1, x0 in _pieces(source, gradient):
        # the error stands where x1 stood
        error = torch.sub(x0, x1, out=x1).add_(head(part(velocity, place), x1.shape[-1]))
        here = coefficients
        if isinstance(coefficients, Tensor):
            here = part(coefficients, place)[..., None]
            error.masked_fill_(here == 0, 0)
        torch.linalg.vector_norm(error, dim=-1, out=part(losses, place))
        if gradient is not None:
            _store(error.mul_(2 * here), part(gradient, place))
    losses.square_().mul_(coefficients)


def _pieces(source: Source, into: Tensor | None = None) -> Iterator[tuple[Place, Tensor, Tensor]]:
    """Which rows and tokens a piece holds, and its patches x1 and noise x0 [rows, tokens, C*P*P] in float32.

    x1 may be overwritten: it lies in `into` [k*B, N, columns] where that is in float32, else in memory that every piece
    uses again.
    """
    images, noise, patch_size, repeats = source.images, source.noise, source.patch_size, source.repeats
    batch, channels, height, width = images.shape
    down, across, length = height // patch_size, width // patch_size, channels * patch_size * patch_size
    in_line = max(1, across * length)
    limit = chunk(images.device)
    at_once = max(1, min(batch, limit // max(1, down * in_line)))
    lines = max(1, min(down, limit // in_line))
    if into is None or into.dtype != torch.float32:
        scratch, into = images.new_empty(at_once, lines * across, length, dtype=torch.float32), None
    affine = pixel_scale_and_shift(source)
    for start, top in itertools.product(range(0, batch, at_once), range(0, down, lines)):
        stop, bottom = min(batch, start + at_once), min(down, top + lines)
        pixels, tokens = images, (bottom - top) * across
        if (stop - start, bottom - top) != (batch, down):
            pixels = images[start:stop, :, top * patch_size : bottom * patch_size]
        for repeat in range(repeats):
            rows, band = slice(repeat * batch + start, repeat * batch + stop), slice(top * across, bottom * across)
            place = None if pixels is images and repeats == 1 else (rows, band)
            x1 = scratch[: stop - start, :tokens] if into is None else head(part(into, place), length)
            patches_into(x1, pixels, patch_size)
            if affine is not None:
                x1.unflatten(-1, (channels, -1)).mul_(affine[:, :1]).add_(affine[:, 1:])
            if noise is not None:
                x0 = part(noise, place).float()
            else:
                # whole images follow each other, a band is one image's: the rows are consecutive either way
                first = source.first_row + rows.start * down * across + band.start
                count = (stop - start) * tokens
                x0 = plain_seeded_noise(count, length, source.seed, source.offset, images.device, first).view(x1.shape)
            yield place, x1, x0


def _store(values: Tensor, rows: Tensor) -> None:
    """Write float32 `values` and then zeros into `rows`, unless that is where they are."""
    length = values.shape[-1]
    if rows.dtype != values.dtype:
        rows[..., :length] = values
    if rows.shape[-1] > length:
        rows[..., length:] = 0


# --- registered ops ---


def _kernels(op: str, source: Source, columns: int, *rows: Tensor) -> Any:
    """The module whose kernels serve such an input, or None for plain PyTorch."""
    images = source.images

    def why_not(name: str) -> str | None:
        # of images in uint8 only the device counts
        pixels = images.new_empty(0, dtype=torch.float32) if images.dtype == torch.uint8 else images
        read = (*rows, source.noise)
        apart = any(x is not None and x.stride(-1) != 1 and x.shape[-1] > 1 for x in read)
        layout = "the elements of a row are not neighbours in memory" if apart else None
        if name == "cpu":
            return cpu_kernels.why_not(pixels, *read) or layout
        if name == "triton":
            return triton_kernels.why_not(pixels, *read) or layout
        reason = cuda_kernels.why_not(pixels, *read) or layout
        return reason or cuda_kernels.why_not_patch(images.shape[1], source.patch_size, columns)

    return kernels_for(op, "velocity", images.device, why_not)


def _interpolate(source: Source, t: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    x_t = _interpolate_fake(source, t, columns, dtype)
    kernels = _kernels("interpolate", source, columns, x_t)
    if kernels is None:
        plain_interpolate(source, t, x_t)
    else:
        kernels.interpolate(source, pixel_scale_and_shift(source), t, x_t)
    return x_t


def _interpolate_fake(source: Source, t: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return source.images.new_empty(*source.rows[:2], columns, dtype=dtype)


def _interpolate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, t, _, _ = inputs
    # only the gradient of t needs the noise once more
    ctx.save_for_backward(source.images, t, source.noise, source.held if t.requires_grad else None)
    ctx.source = source.without_tensors()
    ctx.wanted = [x is not None and x.requires_grad for x in (source.images, t, source.noise)]


def _interpolate_backward(ctx: Any, gradient: Tensor) -> dict[str, Any]:
    images, t, noise, held = ctx.saved_tensors
    source = ctx.source._replace(images=images, noise=noise, held=held)
    gradient = gradient[..., : source.length].float()
    times = t.float().reshape(*t.shape, *(1,) * (3 - t.ndim))
    found = {}
    if ctx.wanted[0]:
        found["images"] = _into_images(source, gradient * times)
    if ctx.wanted[1]:
        for_t = gradient.new_empty(gradient.shape[:2])
        for place, x1, x0 in _pieces(source):
            torch.sum(x1.sub_(x0).mul_(part(gradient, place)), -1, out=part(for_t, place))
        found["t"] = (for_t if t.ndim == 2 else for_t.sum(1)).to(t.dtype)
    if ctx.wanted[2]:
        found["noise"] = (gradient * (1 - times)).to(noise.dtype)
    return found


interpolate_op = register(
    "interpolate(Tensor images, Tensor t, Tensor? noise, Tensor? held, float[]? mean, float[]? std, SymInt number, "
    "SymInt offset, SymInt first_row, SymInt patch_size, SymInt repeats, SymInt columns, ScalarType dtype) -> Tensor",
    _interpolate,
    _interpolate_fake,
    _interpolate_setup,
    _interpolate_backward,
    group=Source,
)


def _velocity_loss(
    source: Source, velocity: Tensor, weights: Tensor | None, mask: Tensor | None, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    coefficients = coefficients_of(source.rows, weights, mask, reduction)
    kept_small = with_gradient and velocity.dtype == torch.float16
    if kept_small:
        coefficients, power = split(coefficients)
    losses = velocity.new_empty(velocity.shape[:2], dtype=torch.float32)
    gradient = velocity.new_empty(velocity.shape if with_gradient else 0)
    given = gradient if with_gradient else None
    kernels = _kernels("velocity_loss", source, velocity.shape[-1], velocity)
    if kernels is None:
        plain_velocity_loss(source, velocity, coefficients, given, losses)
    else:
        kernels.velocity_loss(source, pixel_scale_and_shift(source), velocity, coefficients, given, losses)
    if kept_small:
        losses.mul_(power)
    return losses if reduction == "none" else losses.sum(), gradient


def _velocity_loss_fake(
    source: Source, velocity: Tensor, weights: Tensor | None, mask: Tensor | None, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    losses = velocity.new_empty(velocity.shape[:2] if reduction == "none" else (), dtype=torch.float32)
    return losses, velocity.new_empty(velocity.shape if with_gradient else 0)


def _velocity_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    source, velocity, weights, mask, ctx.reduction, _ = inputs
    images, noise = source.images, source.noise
    ctx.in_float16 = velocity.dtype == torch.float16
    # of the images only shape, dtype and device are needed, and those only for their gradient
    tensors = (weights, mask) if ctx.in_float16 else (None, None)
    ctx.save_for_backward(output[1], images if images.requires_grad else None, *tensors)
    ctx.source, ctx.rows = source.without_tensors(), source.rows
    ctx.noise_dtype = noise.dtype if noise is not None and noise.requires_grad else None


def _velocity_loss_backward(ctx: Any, incoming: Tensor, *_: None) -> dict[str, Any]:
    gradient, images, weights, mask = ctx.saved_tensors
    if ctx.in_float16:
        coefficients = coefficients_of(ctx.rows, weights, mask, ctx.reduction)
        if not isinstance(coefficients, Tensor):
            coefficients = incoming.new_full((), coefficients)
        incoming = incoming * power_of(coefficients)
    (gradient,), length = scaled([gradient], [incoming]), ctx.rows[2]
    found = {"velocity": gradient}
    if images is not None:
        found["images"] = -_into_images(ctx.source._replace(images=images), head(gradient, length))
    if ctx.noise_dtype is not None:
        found["noise"] = head(gradient, length).to(ctx.noise_dtype)
    return found


velocity_loss_op = register(
    "velocity_loss(Tensor velocity, Tensor images, Tensor? noise, Tensor? held, Tensor? weights, Tensor? mask, "
    "float[]? mean, float[]? std, SymInt number, SymInt offset, SymInt first_row, SymInt patch_size, SymInt repeats, "
    "str reduction, bool with_gradient) -> (Tensor, Tensor)",
    _velocity_loss,
    _velocity_loss_fake,
    _velocity_loss_setup,
    _velocity_loss_backward,
    group=Source,
)


def _into_images(source: Source, rows: Tensor) -> Tensor:
    """The gradient of the patches, [k*B, N, C*P*P], as that of the images."""
    images, repeats = source.images, source.repeats
    summed = rows.unflatten(0, (repeats, images.shape[0])).sum(0, dtype=torch.float32) if repeats > 1 else rows
    pixels = unpatchify(summed, source.patch_size, (images.shape[2], images.shape[3])).float()
    affine = pixel_scale_and_shift(source)
    if affine is not None:
        pixels = pixels * affine[:, :1, None]
    return pixels.to(images.dtype)
