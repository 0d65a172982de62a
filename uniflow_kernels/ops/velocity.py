"""Flow matching on patches: the noisy input x_t and the velocity loss, straight from images.

Both read the images as they are and make patches, normalisation and seeded noise on the way; the loss makes its
gradient in the same pass, so that nothing of the size of the prediction is stored but that gradient.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from uniflow_kernels import cuda_kernels, triton_kernels
from uniflow_kernels.ops.noise import plain_seeded_noise, seed_of
from uniflow_kernels.ops.patches import check_patch_size, patches_into, unpatchify
from uniflow_kernels.ops.pieces import Place, chunk, head, part
from uniflow_kernels.ops.registration import is_watched, kernels_for, register
from uniflow_kernels.ops.scaling import scaled

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
    rows = check_rows(images, patch_size, noise, seed, mean, std, repeats)
    number, held = seed_of(seed, offset, images.device, first_row)
    if t.shape not in (rows[:1], rows[:2]):
        raise ValueError(f"t: expected shape {rows[:1]} or {rows[:2]}, got {tuple(t.shape)}")
    if dtype is None:
        dtype = images.dtype if images.is_floating_point() else torch.float32 if noise is None else noise.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating point dtype, got {dtype}")
    columns = _check_columns(columns, rows)
    return interpolate_op(
        images, t, noise, held, mean, std, number, offset, first_row, patch_size, repeats, columns, dtype
    )


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
    rows = check_rows(images, patch_size, noise, seed, mean, std, repeats)
    number, held = seed_of(seed, offset, images.device, first_row)
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
    return velocity_loss_op(
        velocity, images, noise, held, weights, mask, mean, std,
        number, offset, first_row, patch_size, repeats, reduction, with_gradient,
    )  # fmt: skip


def check_rows(
    images: Tensor,
    patch_size: int,
    noise: Tensor | None,
    seed: int | Tensor | torch.Generator | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    repeats: int,
) -> tuple[int, int, int]:
    """Check what both functions take; the shape [k*B, N, C*P*P] that rows have."""
    if images.ndim != 4:
        raise ValueError(f"images: expected 4 dimensions [B, C, H, W], got shape {tuple(images.shape)}")
    batch, channels, height, width = images.shape
    check_patch_size(patch_size)
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
    if (noise is None) == (seed is None):
        raise ValueError("noise, seed: expected exactly one of them")
    if noise is not None:
        if noise.shape != rows:
            raise ValueError(f"noise: expected shape {rows}, one row a patch, got {tuple(noise.shape)}")
        if not noise.is_floating_point():
            raise TypeError(f"noise: expected a floating point dtype, got {noise.dtype}")
    check_normalization(mean, std, channels)
    return rows


def check_normalization(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> None:
    """Raise a ValueError unless there are both, with a number for each channel, or neither."""
    if (mean is None) != (std is None):
        raise ValueError("mean, std: expected both or neither")
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and len(value) != channels:
            raise ValueError(f"{name}: expected {channels} numbers, one a channel, got {len(value)}")


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
    normalization = zip(mean or [0.0] * channels, std or [1.0] * channels, strict=True)
    return per_channel(tuple((1 / (unit * s), -m / s) for m, s in normalization), images)


def per_channel(pairs: tuple[tuple[float, float], ...], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[C, 2], on the device of `like`."""
    if is_watched(like):  # what a compiler traces with must not be kept; a copy of a list would wait for the device
        numbers = like.new_empty(2 * len(pairs), dtype=dtype)
        for place, number in enumerate(itertools.chain(*pairs)):
            numbers[place].fill_(number)
        return numbers.view(-1, 2)
    return _per_channel(pairs, like.device, dtype)


@functools.lru_cache(64)  # to copy it to a GPU takes longer than to use it
def _per_channel(pairs: tuple[tuple[float, float], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in that mode could not be used outside it
        return torch.tensor(pairs, dtype=dtype, device=device).reshape(-1, 2)


def plain_interpolate(
    images: Tensor, t: Tensor, noise: Tensor | None, mean: Any, std: Any, seed: int | Tensor, offset: int,
    first_row: int, patch_size: int, repeats: int, x_t: Tensor,
) -> None:  # fmt: skip
    """`interpolate` in plain PyTorch: write x_t, a piece at a time."""
    times = (t if t.ndim == 2 else t[:, None]).float().expand(x_t.shape[:2])
    for place, x1, x0 in _pieces(images, noise, mean, std, seed, offset, first_row, patch_size, repeats, x_t):
        torch.lerp(x0, x1, part(times, place)[..., None], out=x1)
        _store(x1, part(x_t, place))


def plain_velocity_loss(
    velocity: Tensor, images: Tensor, noise: Tensor | None, coefficients: Tensor | float, mean: Any, std: Any,
    seed: int | Tensor, offset: int, first_row: int, patch_size: int, repeats: int, gradient: Tensor | None,
    losses: Tensor,
) -> None:  # fmt: skip
    """Write each token's coefficient * sum of squared errors, and the gradient of their sum unless it is None.

    A coefficient of 0 leaves a token out.
    """
    for place, x1, x0 in _pieces(images, noise, mean, std, seed, offset, first_row, patch_size, repeats, gradient):
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


def _pieces(
    images: Tensor, noise: Tensor | None, mean: Any, std: Any, seed: int | Tensor, offset: int, first_row: int,
    patch_size: int, repeats: int, into: Tensor | None = None,
) -> Iterator[tuple[Place, Tensor, Tensor]]:  # fmt: skip
    """Which rows and tokens a piece holds, and its patches x1 and noise x0 [rows, tokens, C*P*P] in float32.

    x1 may be overwritten: it lies in `into` [k*B, N, columns] where that is in float32, else in memory that every piece
    uses again.
    """
    batch, channels, height, width = images.shape
    across, down = width // patch_size, height // patch_size
    length = channels * patch_size * patch_size
    in_line = max(1, across * length)
    limit = chunk(images.device)
    at_once = max(1, min(batch, limit // max(1, down * in_line)))
    lines = max(1, min(down, limit // in_line))
    if into is None or into.dtype != torch.float32:
        scratch, into = torch.empty(at_once, lines * across, length, device=images.device), None
    affine = pixel_scale_and_shift(images, mean, std)
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
                first = first_row + rows.start * down * across + band.start
                count = (stop - start) * tokens
                x0 = plain_seeded_noise(count, length, seed, offset, images.device, first).view(x1.shape)
            yield place, x1, x0


def _store(values: Tensor, rows: Tensor) -> None:
    """Write float32 `values` and then zeros into `rows`, unless that is where they are."""
    length = values.shape[-1]
    if rows.dtype != values.dtype:
        rows[..., :length] = values
    if rows.shape[-1] > length:
        rows[..., length:] = 0


# --- registered ops ---

# `held` is the tensor that holds the seed, or None: then `number` is the seed


def _kernels(op: str, images: Tensor, patch_size: int, columns: int, *rows: Tensor | None) -> Any:
    """The module whose kernels serve such an input, or None for plain PyTorch."""

    def why_not() -> tuple[str | None, str | None]:
        # of images in uint8 only the device counts
        pixels = images.new_empty(0, dtype=torch.float32) if images.dtype == torch.uint8 else images
        apart = any(x is not None and x.stride(-1) != 1 and x.shape[-1] > 1 for x in rows)
        layout = "the elements of a row are not neighbours in memory" if apart else None
        triton = triton_kernels.why_not(pixels, *rows) or layout
        cuda = cuda_kernels.why_not(pixels, *rows) or layout
        return triton, cuda or cuda_kernels.why_not_patch(images.shape[1], patch_size, columns)

    return kernels_for(op, "velocity", images.device, why_not)


def _interpolate(
    images: Tensor, t: Tensor, noise: Tensor | None, held: Tensor | None, mean: Any, std: Any, number: int,
    offset: int, first_row: int, patch_size: int, repeats: int, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    x_t = _interpolate_fake(
        images, t, noise, held, mean, std, number, offset, first_row, patch_size, repeats, columns, dtype
    )
    seed = number if held is None else held
    kernels = _kernels("interpolate", images, patch_size, columns, x_t, noise)
    if kernels is None:
        plain_interpolate(images, t, noise, mean, std, seed, offset, first_row, patch_size, repeats, x_t)
    else:
        affine = pixel_scale_and_shift(images, mean, std)
        kernels.interpolate(images, t, noise, affine, seed, offset, first_row, patch_size, repeats, columns, x_t)
    return x_t


def _interpolate_fake(
    images: Tensor, t: Tensor, noise: Tensor | None, held: Tensor | None, mean: Any, std: Any, number: int,
    offset: int, first_row: int, patch_size: int, repeats: int, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    tokens = (images.shape[2] // patch_size) * (images.shape[3] // patch_size)
    return images.new_empty(repeats * images.shape[0], tokens, columns, dtype=dtype)


def _interpolate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, t, noise, held, *ctx.options = inputs
    # only the gradient of t needs the noise once more
    ctx.save_for_backward(images, t, noise, held if t.requires_grad else None)
    ctx.wanted = [x is not None and x.requires_grad for x in (images, t, noise)]


def _interpolate_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    images, t, noise, held = ctx.saved_tensors
    mean, std, number, offset, first_row, patch_size, repeats, *_ = ctx.options
    length = images.shape[1] * patch_size * patch_size
    gradient = gradient[..., :length].float()
    times = t.float().reshape(*t.shape, *(1,) * (3 - t.ndim))
    for_images = for_t = for_noise = None
    if ctx.wanted[0]:
        for_images = _into_images(gradient * times, images, mean, std, patch_size, repeats)
    if ctx.wanted[1]:
        for_t = gradient.new_empty(gradient.shape[:2])
        seed = number if held is None else held
        for place, x1, x0 in _pieces(images, noise, mean, std, seed, offset, first_row, patch_size, repeats):
            torch.sum(x1.sub_(x0).mul_(part(gradient, place)), -1, out=part(for_t, place))
        for_t = (for_t if t.ndim == 2 else for_t.sum(1)).to(t.dtype)
    if ctx.wanted[2]:
        for_noise = (gradient * (1 - times)).to(noise.dtype)
    return for_images, for_t, for_noise, None, *[None] * len(ctx.options)


interpolate_op = register(
    "interpolate(Tensor images, Tensor t, Tensor? noise, Tensor? held, float[]? mean, float[]? std, SymInt number, "
    "SymInt offset, SymInt first_row, SymInt patch_size, SymInt repeats, SymInt columns, ScalarType dtype) -> Tensor",
    _interpolate,
    _interpolate_fake,
    _interpolate_setup,
    _interpolate_backward,
)


def _velocity_loss(
    velocity: Tensor, images: Tensor, noise: Tensor | None, held: Tensor | None, weights: Tensor | None,
    mask: Tensor | None, mean: Any, std: Any, number: int, offset: int, first_row: int, patch_size: int, repeats: int,
    reduction: str, with_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    seed = number if held is None else held
    coefficients = _coefficients(velocity, images, patch_size, weights, mask, reduction)
    losses = velocity.new_empty(velocity.shape[:2], dtype=torch.float32)
    gradient = velocity.new_empty(velocity.shape if with_gradient else 0)
    given = gradient if with_gradient else None
    kernels = _kernels("velocity_loss", images, patch_size, velocity.shape[-1], velocity, noise)
    if kernels is None:
        plain_velocity_loss(
            velocity, images, noise, coefficients, mean, std,
            seed, offset, first_row, patch_size, repeats, given, losses,
        )  # fmt: skip
    else:
        affine = pixel_scale_and_shift(images, mean, std)
        kernels.velocity_loss(
            velocity, images, noise, coefficients, affine, seed, offset, first_row, patch_size, repeats, given, losses
        )
    return losses if reduction == "none" else losses.sum(), gradient


def _coefficients(
    velocity: Tensor, images: Tensor, patch_size: int, weights: Tensor | None, mask: Tensor | None, reduction: str
) -> Tensor | float:
    """What each token's sum of squared errors is multiplied by: [k*B, N] in float32, or one number for all."""
    each = 1 / max(1, images.shape[1] * patch_size * patch_size)
    if weights is None and mask is None:
        over = velocity.shape[0] * velocity.shape[1] if reduction == "mean" else 1
        return each / max(1, over)
    if mask is None:
        assert weights is not None
        over = max(1, weights.numel()) if reduction == "mean" else 1
        return weights.float() * (each / over)
    coefficients = mask.float() if weights is None else weights.float() * mask
    coefficients = coefficients * each
    return coefficients / mask.sum().clamp(min=1) if reduction == "mean" else coefficients


def _velocity_loss_fake(
    velocity: Tensor, images: Tensor, noise: Tensor | None, held: Tensor | None, weights: Tensor | None,
    mask: Tensor | None, mean: Any, std: Any, number: int, offset: int, first_row: int, patch_size: int, repeats: int,
    reduction: str, with_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    losses = velocity.new_empty(velocity.shape[:2] if reduction == "none" else (), dtype=torch.float32)
    return losses, velocity.new_empty(velocity.shape if with_gradient else 0)


def _velocity_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, images, noise, _, _, _, mean, std, _, _, _, patch_size, repeats, *_ = inputs
    # of the images only shape, dtype and device are needed, and those only for their gradient
    ctx.save_for_backward(output[1], images if images.requires_grad else None)
    ctx.normalization, ctx.patch_size, ctx.repeats = (mean, std), patch_size, repeats
    ctx.length = images.shape[1] * patch_size**2
    ctx.noise_dtype = noise.dtype if noise is not None and noise.requires_grad else None


def _velocity_loss_backward(ctx: Any, incoming: Tensor, *_: None) -> tuple[Any, ...]:
    gradient, images = ctx.saved_tensors
    gradient = scaled(gradient, incoming)
    for_images = for_noise = None
    if images is not None:
        rows, (mean, std) = head(gradient, ctx.length), ctx.normalization
        for_images = -_into_images(rows, images, mean, std, ctx.patch_size, ctx.repeats)
    if ctx.noise_dtype is not None:
        for_noise = head(gradient, ctx.length).to(ctx.noise_dtype)
    return gradient, for_images, for_noise, *[None] * 12


velocity_loss_op = register(
    "velocity_loss(Tensor velocity, Tensor images, Tensor? noise, Tensor? held, Tensor? weights, Tensor? mask, "
    "float[]? mean, float[]? std, SymInt number, SymInt offset, SymInt first_row, SymInt patch_size, SymInt repeats, "
    "str reduction, bool with_gradient) -> (Tensor, Tensor)",
    _velocity_loss,
    _velocity_loss_fake,
    _velocity_loss_setup,
    _velocity_loss_backward,
)


def _into_images(rows: Tensor, images: Tensor, mean: Any, std: Any, patch_size: int, repeats: int) -> Tensor:
    """The gradient of the patches, [k*B, N, C*P*P], as that of the images."""
    summed = rows.unflatten(0, (repeats, images.shape[0])).sum(0, dtype=torch.float32) if repeats > 1 else rows
    pixels = unpatchify(summed, patch_size, (images.shape[2], images.shape[3])).float()
    affine = pixel_scale_and_shift(images, mean, std)
    if affine is not None:
        pixels = pixels * affine[:, :1, None]
    return pixels.to(images.dtype)
