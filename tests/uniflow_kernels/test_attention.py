import sys
import types

import pytest
import torch

import uniflow_kernels.ops.attention as module
from uniflow_kernels import attention
from uniflow_kernels.triton_kernels import architecture


def plain(q, k, v):
    scores = torch.einsum("bshd,bthd->bhst", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 17])
def test_against_the_definition(within_twice, dtype, tokens):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, tokens, 3, 4, 8, generator=generator).to(dtype)
    q, k, v = qkv.unbind(2)
    within_twice(attention(q, k, v), plain(q, k, v), plain(q.double(), k.double(), v.double()))


@pytest.fixture
def gpu(monkeypatch):
    """Makes a GPU that is not there, of a compute capability."""

    def pretend(arch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(arch, 10))
        architecture.cache_clear()

    yield pretend
    architecture.cache_clear()


@pytest.mark.parametrize(
    ("arch", "serves"), [(80, True), (86, True), (89, True), (90, False), (100, False), (120, True)]
)
def test_flash_attn_gives_way_where_pytorch_has_cudnns(monkeypatch, gpu, arch, serves):
    gpu(arch)
    monkeypatch.setattr(module, "_FLASH_ATTN_INSTALLED", True)
    reason = module.why_not_flash_attn(torch.device("cuda"), torch.bfloat16, 64)
    assert reason is None if serves else "cuDNN" in reason and "unmeasured" in reason
    asked = torch.compile(lambda: module.why_not_flash_attn(torch.device("cuda"), torch.bfloat16, 64), backend="eager")
    assert asked() == reason


def test_reasons_not_to_use_flash_attn(monkeypatch, gpu):
    gpu(80)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(module, "_FLASH_ATTN_INSTALLED", False)
    assert "not installed" in module.why_not_flash_attn(cuda, torch.bfloat16, 64)
    monkeypatch.setattr(module, "_FLASH_ATTN_INSTALLED", True)
    assert module.why_not_flash_attn(cuda, torch.bfloat16, 64) is None
    assert "cpu" in module.why_not_flash_attn(cpu, torch.bfloat16, 64)
    assert "float32" in module.why_not_flash_attn(cuda, torch.float32, 64)
    assert "320" in module.why_not_flash_attn(cuda, torch.float16, 320)


def test_flash_attn_gets_the_same_layout(monkeypatch):
    """A stand-in for the package, which takes and returns [B, S, H, D]."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p):
        calls.append(dropout_p)
        return plain(q, k, v)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(module, "why_not_flash_attn", lambda *_: None)
    q, k, v = torch.randn(3, 2, 5, 4, 8).unbind(0)
    assert torch.allclose(attention(q, k, v, dropout=0.25), attention(q, k, v, allow_flash_attn=False), atol=1e-5)
    assert calls == [0.25]


def test_other_dtypes_are_refused():
    q = torch.randn(1, 2, 1, 8)
    for place, name in enumerate("qkv"):
        given = [q, q, q]
        given[place] = q + 0j
        with pytest.raises(TypeError, match=f"^{name}: expected a floating point dtype, got torch.complex64"):
            attention(*given)
