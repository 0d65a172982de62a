"""What each function costs that launches a Triton kernel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.host import Timed
from uniflow_kernels.ops.velocity import source_of

ROWS, WIDTH, PATCH = 64, 128, 14


def launches(device: torch.device) -> Iterator[Timed]:
    """Each launch of the package, with bfloat16 where a head has it and float32 images."""
    yield from _rows(device)
    yield from _duals(device)
    yield from _products(device)
    yield from _pixels(device)


def _rows(device: torch.device) -> Iterator[Timed]:
    from uniflow_kernels.triton_kernels.activation import activation, activation_backward
    from uniflow_kernels.triton_kernels.flow_head import Rows, norm_modulate, norm_modulate_backward
    from uniflow_kernels.triton_kernels.quantization import quantize

    empty = partial(torch.zeros, dtype=torch.bfloat16, device=device)
    x, q, h, dh, total, du = (empty(ROWS, WIDTH) for _ in range(6))
    shift, scale, gate = empty(ROWS, 3 * WIDTH).split(WIDTH, 1)
    dshift, dscale, dgate = empty(ROWS, 3 * WIDTH).split(WIDTH, 1)
    norm = empty(WIDTH), empty(WIDTH)
    which = Rows(ROWS, ROWS, 1)
    yield Timed(
        "norm_modulate",
        partial(norm_modulate, x, (gate, q), norm, (shift, scale), total, h, which, rms=False, eps=1e-6),
    )
    yield Timed(
        "norm_modulate_backward",
        partial(
            norm_modulate_backward, dh, total, x, (gate, q), norm, scale, (dshift, dscale), dgate, which, False, 1e-6
        ),
    )
    of_layer, norm_and_scale = Rows(ROWS, 1, ROWS), (gate[:1], q)
    yield Timed(
        "norm_modulate, LayerScale",
        partial(norm_modulate, x, norm_and_scale, norm, None, total, h, of_layer, rms=False, eps=1e-6),
    )
    yield Timed(
        "norm_modulate_backward, LayerScale",
        partial(
            norm_modulate_backward, dh, total, x, norm_and_scale, norm, None, None, None, of_layer, False, 1e-6, dx=h
        ),
    )
    yield from _comparisons(device)
    yield Timed("quantize", partial(quantize, x, 448.0, 1e-38))
    yield Timed("activation", partial(activation, x, WIDTH))
    yield Timed("activation_backward", partial(activation_backward, du, x))


def _comparisons(device: torch.device) -> Iterator[Timed]:
    from uniflow_kernels.triton_kernels.compared_norm import compared_norm, compared_norm_backward

    empty = partial(torch.zeros, dtype=torch.bfloat16, device=device)
    x, q, h, dh, total, teacher, dx, dq = (empty(ROWS, WIDTH) for _ in range(8))
    scale, norm = empty(WIDTH), (empty(WIDTH), empty(WIDTH))
    distances, coefficients = torch.zeros(ROWS, device=device), torch.zeros(ROWS, 2, device=device)
    made = distances, coefficients
    yield Timed(
        "compared_norm", partial(compared_norm, x, scale, q, norm, teacher, ROWS, 1, total, h, *made, False, 1e-6)
    )
    arriving = dh, x, torch.zeros((), device=device), 1 / ROWS
    yield Timed(
        "compared_norm_backward",
        partial(compared_norm_backward, *arriving, total, scale, q, norm, teacher, coefficients, dx, dq, False, 1e-6),
    )


def _duals(device: torch.device) -> Iterator[Timed]:
    from uniflow_kernels.triton_kernels import dual_activation, dual_norm

    def pair(width: int = WIDTH) -> dual_norm.Pair:
        value, tangent = torch.zeros(2, ROWS, width, dtype=torch.bfloat16, device=device)
        return value, tangent

    x, q, h, total, dh, dx, dq, dgate, dscale = (pair() for _ in range(9))
    shift, scale, gate = zip(*(half.split(WIDTH, 1) for half in pair(3 * WIDTH)), strict=True)
    bias = torch.zeros(WIDTH, dtype=torch.bfloat16, device=device)
    vectors = dual_norm.Vectors(*[bias] * 6)
    yield Timed(
        "dual_norm",
        partial(dual_norm.dual_norm, x, (gate, q), (shift, scale), vectors, total, h, rms=False, eps=1e-6),
    )
    yield Timed(
        "dual_norm_backward",
        partial(
            dual_norm.dual_norm_backward,
            dh,
            total,
            x,
            (gate, q),
            scale,
            vectors,
            dx,
            (dgate, dq),
            dscale,
            rms=False,
            eps=1e-6,
        ),
    )
    yield Timed("dual_activation", partial(dual_activation.dual_activation, x, bias, h))
    yield Timed("dual_activation_backward", partial(dual_activation.dual_activation_backward, dh, x, bias, dx))


def _products(device: torch.device) -> Iterator[Timed]:
    from uniflow_kernels.triton_kernels import flow_products, layer_products, products

    empty = partial(torch.zeros, dtype=torch.bfloat16, device=device)
    x, a, h, scale, u, p, total, gate, q, dq = (empty(ROWS, WIDTH) for _ in range(10))
    layer = empty(3 * WIDTH, WIDTH), empty(3 * WIDTH)
    square = empty(WIDTH, WIDTH), empty(WIDTH)
    norm = empty(WIDTH), empty(WIDTH)
    of_x = products.moments(x, False)
    yield Timed("moments", partial(products.moments, x, False))
    yield Timed("modulated", partial(flow_products.modulated, x, of_x, a, layer, norm, h, None, False, False, 1e-6))
    yield Timed(
        "modulated, scale kept", partial(flow_products.modulated, x, of_x, a, layer, norm, h, scale, False, False, 1e-6)
    )
    yield Timed("up", partial(flow_products.up, h, square, u, None))
    yield Timed("up, p kept", partial(flow_products.up, h, square, u, p))
    made = flow_products.down(x, a, layer, u, square, total, None, None, False)
    yield Timed("down", partial(flow_products.down, x, a, layer, u, square, total, None, None, False, made))
    yield Timed(
        "down, gate and q kept", partial(flow_products.down, x, a, layer, u, square, total, gate, q, False, made)
    )
    yield Timed("down_backward", partial(flow_products.down_backward, dq, square[0], p))
    yield Timed("down_backward, GELU", partial(flow_products.down_backward, dq, square[0], p, activation="gelu"))
    yield Timed("fold_norm", partial(layer_products.fold_norm, norm, square))
    sums = torch.zeros(WIDTH, device=device)
    folded = partial(layer_products.folded_norm, x, made, square[0], sums, sums)
    yield Timed("folded_norm", partial(folded, "gelu", False, 1e-6))
    yield Timed("activated_product", partial(layer_products.activated_product, x, square, "gelu"))
    residual = partial(layer_products.residual_product, a, square, square[1], x, False)
    yield Timed("residual_product", partial(residual, made))


def _pixels(device: torch.device) -> Iterator[Timed]:
    from uniflow_kernels.triton_kernels import distillation, images, noise, patches, velocity

    pictures = torch.zeros(2, 3, 4 * PATCH, 4 * PATCH, device=device)
    rows, out = (torch.zeros(2, 16, 3 * PATCH**2, device=device) for _ in range(2))
    t, losses = torch.zeros(2, 16, device=device), torch.zeros(2, 16, device=device)
    affine = torch.zeros(3, 2, device=device)
    source = source_of(pictures, PATCH, None, 1, 0, 0, None, None, repeats=1)
    seeds = torch.zeros(2, dtype=torch.int64, device=device)
    yield Timed("patchify", partial(patches.patchify, pictures, rows, PATCH))
    yield Timed("seeded_noise", partial(noise.seeded_noise, seeds, 0, 0, rows.flatten(0, 1)))
    yield Timed("to_images", partial(images.to_images, rows, out, 0.5, affine, PATCH, True, pictures))
    yield Timed("interpolate", partial(velocity.interpolate, source, affine, t, out))
    yield Timed("velocity_loss", partial(velocity.velocity_loss, source, affine, rows, 0.5, out, losses))
    students, teachers, gradients = ([torch.zeros(2, 17, WIDTH, device=device) for _ in range(12)] for _ in range(3))
    distances = torch.zeros(12, 2, 16, device=device)
    cosine = partial(distillation.cosine_distances, students, teachers, 1, gradients, None, distances)
    yield Timed("cosine_distances", cosine)
    yield Timed("scale", partial(distillation.scale, rows, torch.ones((), device=device)))
