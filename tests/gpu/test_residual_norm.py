"""The residual and norm of layers that are not adaptive, on a GPU: whole rows of the base preset, and odd widths."""

import pytest
import torch

from tests.uniflow_kernels import test_modulated_norm as on_cpu
from uniflow_kernels import backend, residual_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("exact_float32"),
]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("shape", "dtype"), [((2, 1025, 1024), torch.bfloat16), ((3, 17, 387), torch.float32)])
def test_numbers_and_gradients(within_twice, shape, dtype, norm, gated):
    sizes = {"x": shape, "gate": shape[-1:], "q": shape, "weight": shape[-1:], "bias": shape[-1:]}
    given = {name: torch.randn(size, device="cuda").to(dtype) for name, size in sizes.items()}
    given |= dict.fromkeys(("shift", "scale")) | ({} if gated else {"gate": None})
    if norm == "rms":
        given["bias"] = None
    exact = on_cpu.results(on_cpu.definition, given, torch.float64, norm=norm)
    plain = on_cpu.results(on_cpu.definition, given, dtype, norm=norm)
    with backend("triton"):
        first, second = (on_cpu.results(on_cpu.ours, given, dtype, norm=norm) for _ in range(2))
    assert all(map(torch.equal, first, second))
    for mine, theirs, truth in zip(first, plain, exact, strict=True):
        within_twice(mine, theirs, truth)


def test_memory_checker_finds_nothing(sanitized):
    sanitized(
        "import torch\nfrom uniflow_kernels import residual_norm\n"
        "for rows, width in ((130, 1024), (5, 387)):\n"
        "    x, q = torch.randn(2, rows, width, device='cuda').bfloat16().requires_grad_()\n"
        "    gate = torch.randn(width, device='cuda').bfloat16().requires_grad_()\n"
        "    sum(part.sum() for part in residual_norm(x, q, gate, weight=gate, bias=gate)).backward()\n"
    )


def test_a_float32_residual_gives_a_norm_in_bfloat16():
    x, q = torch.randn(2, 300, 1024, device="cuda")
    total, h = residual_norm(x, q.bfloat16(), dtype=torch.bfloat16)
    exact = on_cpu.definition(x.double(), None, q.bfloat16().double(), None, None, None, None)
    assert (total.dtype, h.dtype) == (torch.float32, torch.bfloat16)
    for found, true in zip((total, h), exact, strict=True):
        assert (found - true).abs().max() <= (2**-8 if found.dtype == torch.bfloat16 else 1e-5) * true.abs().max()
