"""Rows of pixels to images: a program writes one channel of one line of patches, image row by image row.

What it reads of a token is one run of P*P values, so that a value that one row of the image leaves in a cache line is
the next row's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.triton_kernels.launch import Launch, cdiv

_BLOCK = 128  # pixels of an image's row: one a thread, so that neighbours load what lies together
# products and sums are rounded one after the other, as in the definition: fused, a tie becomes another byte
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_NEAREST = 12582912.0  # 1.5 * 2^23: added and taken away, it rounds a smaller number to the nearest even integer


@triton.jit
def to_images_kernel(
    rows, velocity, images, mean_and_std, dt, channels, down, width,
    rows_image, rows_token, velocity_image, velocity_token,
    PATCH: tl.constexpr, MOVES: tl.constexpr, AFFINE: tl.constexpr, CLAMP: tl.constexpr, BYTES: tl.constexpr,
    NEAREST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Images [B, C, H, W] of rows and velocity [B, N, C*P*P]."""
    program = tl.program_id(0).to(tl.int64)
    channel = program % channels
    line = program // channels % down  # of patches
    image = program // channels // down
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [W]
    inside = x < width
    left = x // PATCH
    token = line * (width // PATCH) + left
    column = channel * (PATCH * PATCH) + (x - left * PATCH)
    source = rows + image * rows_image + token * rows_token + column
    if MOVES:
        slope = velocity + image * velocity_image + token * velocity_token + column
    target = images + ((image * channels + channel) * down + line) * PATCH * width + x
    if AFFINE:
        mean = tl.load(mean_and_std + 2 * channel)
        std = tl.load(mean_and_std + 2 * channel + 1)
    for row in range(PATCH):
        value = tl.load(source + row * PATCH, inside, other=0).to(tl.float32)
        if MOVES:
            value += dt * tl.load(slope + row * PATCH, inside, other=0).to(tl.float32)
        if AFFINE:
            value = value * std + mean
        if CLAMP:
            value = tl.minimum(tl.maximum(value, 0.0), 1.0)
        if BYTES:
            value = ((value * 255.0 + NEAREST) - NEAREST).to(tl.int32)
        tl.store(target + row * width, value.to(images.dtype.element_ty), inside)


_launch = Launch(to_images_kernel)


def to_images(
    rows: Tensor,
    velocity: Tensor | None,
    dt: float,
    mean_and_std: Tensor | None,
    patch_size: int,
    clamp: bool,
    images: Tensor,
) -> None:
    """Write the images [B, C, H, W], contiguous."""
    if not images.numel():
        return
    batch, channels, height, width = images.shape
    down = height // patch_size
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    if velocity is not None and velocity.stride(-1) != 1:
        velocity = velocity.contiguous()
    of_velocity = (0, 0) if velocity is None else velocity.stride()
    with torch.cuda.device_of(rows):
        _launch(
            (batch * down * channels, cdiv(width, _BLOCK)),
            rows=rows,
            velocity=velocity,
            images=images,
            mean_and_std=mean_and_std,
            dt=float(dt),
            channels=channels,
            down=down,
            width=width,
            rows_image=rows.stride(0),
            rows_token=rows.stride(1),
            velocity_image=of_velocity[0],
            velocity_token=of_velocity[1],
            PATCH=patch_size,
            MOVES=velocity is not None,
            AFFINE=mean_and_std is not None,
            CLAMP=clamp,
            BYTES=images.dtype == torch.uint8,
            NEAREST=_NEAREST,
            BLOCK=_BLOCK,
            **OPTIONS,
        )
