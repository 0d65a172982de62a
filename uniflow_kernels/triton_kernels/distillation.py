"""Cosine distances of all layers in one launch, each token's gradient written on the way."""

from collections.abc import Sequence
from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.triton_kernels import unit_of
from uniflow_kernels.triton_kernels.launch import Launch, cdiv

_MOST_LAYERS = 32  # a launch
_WARPS = 4
_ELEMENTS = 4096  # of a program's tile


@triton.jit
def _of_layer(tensors, layer, LAYERS: tl.constexpr):
    """One of a tuple of pointers."""
    pointer = tensors[0]
    for other in tl.static_range(1, LAYERS):
        pointer = tl.where(layer == other, tensors[other], pointer)
    return pointer


@triton.jit
def cosine_kernel(
    students, teachers, gradients, powers, distances, tokens_in_all, length, width, skip,
    student_batch, student_token, teacher_batch, teacher_token,
    LARGEST: tl.constexpr, LAYERS: tl.constexpr, GRADIENT: tl.constexpr, POWERS: tl.constexpr, UNIT: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Distances and gradients of TOKENS tokens of one layer a program; a row is in registers whole."""
    width *= UNIT
    layer = tl.program_id(1)
    student = _of_layer(students, layer, LAYERS)
    teacher = _of_layer(teachers, layer, LAYERS)
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [G]
    image = tokens // length
    token = tokens - image * length
    exists = tokens < tokens_in_all
    counts = exists & (token >= skip)
    column = tl.arange(0, COLUMNS)  # [C]
    inside = (column < width)[None, :]
    read = counts[:, None] & inside
    from_student = (image * student_batch + token * student_token) * UNIT
    from_teacher = (image * teacher_batch + token * teacher_token) * UNIT
    s = tl.load(student + from_student[:, None] + column[None, :], read, other=0).to(tl.float32)  # [G, C]
    t = tl.load(teacher + from_teacher[:, None] + column[None, :], read, other=0).to(tl.float32)
    s_norm = tl.sqrt(tl.sum(s * s, 1))  # [G]
    s_least = tl.maximum(s_norm, 1e-8)
    t_least = tl.maximum(tl.sqrt(tl.sum(t * t, 1)), 1e-8)
    # two divisions: the product of two least norms is not far from the smallest float
    cosine = tl.sum(s * t, 1) / s_least / t_least
    counted = length - skip
    place = layer.to(tl.int64) * (tokens_in_all // length * counted) + image * counted + token - skip
    tl.store(distances + place, 1.0 - cosine, counts)
    if GRADIENT:
        gradient = _of_layer(gradients, layer, LAYERS)
        along = tl.where(s_norm > 1e-8, cosine / s_least / s_least, 0.0)
        across = -1.0 / s_least / t_least
        value = along[:, None] * s + across[:, None] * t
        value = tl.where(value > LARGEST, LARGEST, tl.where(value < -LARGEST, -LARGEST, value))  # NaN stays NaN
        if POWERS:
            power = (s_least.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 1024.0
            tl.store(powers + layer.to(tl.int64) * tokens_in_all + tokens, power, counts)
            value *= power[:, None]
        to = tokens[:, None] * width + column[None, :]
        tl.store(gradient + to, value.to(gradient.dtype.element_ty), exists[:, None] & inside)


_launch_cosine = Launch(cosine_kernel)


def cosine_distances(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    skip_tokens: int,
    gradients: Sequence[Tensor],
    powers: Tensor | None,
    distances: Tensor,
) -> None:
    """Write the distances [L, B, S - skip_tokens] of all layers, and their gradients unless there are none.

    With `powers` [L, B, S] each token's gradient is multiplied by a power of two, which is written there.
    """
    if not student[0].numel():
        return
    contiguous = Tensor.is_contiguous
    if len(student) <= _MOST_LAYERS and all(map(contiguous, student)) and all(map(contiguous, teacher)):
        _launch(student, teacher, gradients, skip_tokens, powers, distances)
        return
    start = 0  # layers of other strides cannot share a launch
    for _, alike in groupby(zip(map(Tensor.stride, student), map(Tensor.stride, teacher), strict=True)):
        end = start + len(list(alike))
        while start < end:
            some = slice(start, min(end, start + _MOST_LAYERS))
            of_some = None if powers is None else powers[some]
            _launch(student[some], teacher[some], gradients[some], skip_tokens, of_some, distances[some])
            start = some.stop


def _launch(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    gradients: Sequence[Tensor],
    skip_tokens: int,
    powers: Tensor | None,
    distances: Tensor,
) -> None:
    """Layers of the same strides."""
    batch, length, width = student[0].shape
    of_student, of_teacher = student[0].stride(), teacher[0].stride()
    unit = unit_of(width, *of_student[:2], *of_teacher[:2])
    columns = 1 << (width - 1).bit_length()
    tokens = max(1, _ELEMENTS // columns)
    with torch.cuda.device_of(student[0]):
        _launch_cosine(
            (cdiv(batch * length, tokens), len(student)),
            students=tuple(student),
            teachers=tuple(teacher),
            gradients=tuple(gradients or student),
            powers=powers,
            distances=distances,
            tokens_in_all=batch * length,
            length=length,
            width=width // unit,
            skip=skip_tokens,
            student_batch=of_student[0] // unit,
            student_token=of_student[1] // unit,
            teacher_batch=of_teacher[0] // unit,
            teacher_token=of_teacher[1] // unit,
            LARGEST=torch.finfo(student[0].dtype).max,
            LAYERS=len(student),
            GRADIENT=bool(gradients),
            POWERS=powers is not None,
            UNIT=unit,
            TOKENS=tokens,
            COLUMNS=columns,
            num_warps=_WARPS,
        )


@triton.jit
def scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    """Multiply in place by a number that only the device knows."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        some = tl.load(values + place, place < count, other=0).to(tl.float32) * by
        tl.store(values + place, some.to(values.dtype.element_ty), place < count)


_launch_scale = Launch(scale_kernel)


def scale(values: Tensor, factor: Tensor) -> None:
    """Multiply contiguous `values` by a scalar tensor, in place; nothing is written where it is 1."""
    block = 8192
    if values.numel():
        with torch.cuda.device_of(values):
            _launch_scale(
                (cdiv(values.numel(), block),),
                values=values,
                factor=factor,
                count=values.numel(),
                BLOCK=block,
                num_warps=8,
            )
