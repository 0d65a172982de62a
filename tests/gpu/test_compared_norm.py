"""Residual, norm and distance to a teacher on a GPU: whole rows of the base preset, and odd widths."""

import pytest
import torch

from tests.uniflow_kernels import test_compared_norm as on_cpu
from uniflow_kernels import backend, compared_residual_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("exact_float32"),
]


@pytest.mark.parametrize("form", on_cpu.FORMS)
@pytest.mark.parametrize(
    ("shape", "dtype", "teacher_dtype"),
    [
        ((2, 1025, 1024), torch.bfloat16, torch.bfloat16),
        ((2, 300, 1024), torch.float32, torch.bfloat16),
        ((3, 17, 387), torch.float32, torch.float32),
    ],
)
def test_numbers_and_gradients(within_twice, form, shape, dtype, teacher_dtype):
    with backend("triton"):
        first, second = (
            on_cpu.against_definition(within_twice, form, shape, dtype, teacher_dtype, device="cuda") for _ in range(2)
        )
    assert all(map(torch.equal, first, second))


def test_how_much_it_weighs_is_not_waited_for():
    """The gradient of the distance comes from the device; nothing is asked of it on the way."""
    x, q, teacher = (torch.randn(2, 300, 1024, device="cuda") for _ in range(3))
    weight = torch.ones(1024, device="cuda")
    for is_watched in (False, True):  # what is compiled is there in the second run
        torch.cuda.set_sync_debug_mode("error" if is_watched else "default")
        try:
            s, h, distance = compared_residual_norm(
                x.requires_grad_(), q, teacher=teacher, skip_tokens=1, weight=weight
            )
            (distance * distance.detach() + s.sum() + h.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_memory_checker_finds_nothing(sanitized):
    sanitized(
        "import torch\nfrom uniflow_kernels import compared_residual_norm\n"
        "for tokens, width in ((130, 1024), (5, 387)):\n"
        "    x, q, teacher = torch.randn(3, 2, tokens, width, device='cuda').bfloat16()\n"
        "    gate = torch.randn(width, device='cuda').bfloat16().requires_grad_()\n"
        "    how = {'teacher': teacher, 'skip_tokens': 1, 'weight': gate, 'bias': gate}\n"
        "    made = compared_residual_norm(x.requires_grad_(), q.requires_grad_(), gate, **how)\n"
        "    sum(part.sum() for part in made).backward()\n"
    )
