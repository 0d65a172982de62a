import sys
import types
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import uniflow_kernels.ops.attention as module
from uniflow_kernels import attention
from uniflow_kernels.choice import in_graph
from uniflow_kernels.ops import flow_choice
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


CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MEASURED = {  # tokens, and which paths were the fastest: inference, training, and both in a CUDA graph
    257: (["cudnn", "own choice"], ["flash", "cudnn"], ["efficient"], ["math"]),
    1025: (["flash-attn 3", "flash-attn 2", "cudnn"], ["flash-attn 2", "flash"], ["flash-attn 3"], ["flash"]),
}


@pytest.fixture
def table(monkeypatch):
    """A GPU that is not there, on which heads of 64 in bfloat16 were measured; packages are there as `installed`."""
    orders = ("inference", "training", "graph_inference", "graph_training")
    entries = [
        {"arch": 90, "dtype": "bfloat16", "width": 64, "rows": rows, "gpu": "some H100"}
        | dict(zip(orders, paths, strict=True))
        for rows, paths in MEASURED.items()
    ]
    monkeypatch.setattr(flow_choice, "_table", lambda op: entries if op == "attention" else [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some H100")
    caches = (architecture, flow_choice.gpu_name, flow_choice.measured)
    for cache in caches:
        cache.cache_clear()
    installed = dict.fromkeys(module.PACKAGES, True)
    monkeypatch.setattr(module, "_INSTALLED", installed)
    yield installed
    for cache in caches:
        cache.cache_clear()


def test_the_path_is_the_fastest_that_was_measured(table):
    def choose(tokens, *more, dtype=torch.bfloat16, head_dim=64):
        return module.choose_attention(CUDA, dtype, head_dim, tokens, *more)

    assert choose(257) == choose(1024) == "cudnn"
    assert choose(257, True) == "flash"
    assert choose(1025) == choose(4097) == choose(None) == "flash-attn 3"
    assert choose(1025, True) == "flash-attn 2"
    with in_graph():
        assert (choose(300), choose(300, True), choose(2000, True)) == ("efficient", "math", "flash")
    # nothing was measured
    assert choose(256) == choose(1025, head_dim=72) == choose(1025, dtype=torch.float16) == "own choice"
    # what cannot serve is passed over
    assert choose(1025, False, True) == "flash-attn 2"
    assert choose(1025, False, False, False) == "cudnn"
    table["flash-attn 3"] = False
    assert choose(1025) == "flash-attn 2"
    table["flash-attn 2"] = False
    assert (choose(1025), choose(1025, True)) == ("cudnn", "flash")
    asked = torch.compile(lambda: module.choose_attention(CUDA, torch.bfloat16, 64, None), backend="eager")
    assert asked() == "cudnn"


def test_what_serves_is_explained(table):
    explain = partial(module.explain_attention, CUDA, torch.bfloat16)
    sdpa = "scaled_dot_product_attention"
    runs, why = explain(64)
    assert runs == (
        f"from 257 tokens {sdpa}, backend cudnn (training: {sdpa}, backend flash); "
        "from 1025 tokens flash-attn 3 (training: flash-attn 2)"
    )
    assert why == "measured on some H100"
    assert explain(64, allow_flash_attn=False)[1].endswith(
        "; flash-attn 3, the fastest: the config's use_flash_attn is false"
    )
    table["flash-attn 3"] = False
    assert explain(64)[1].endswith("; flash-attn 3, the fastest: the module flash_attn_interface is not installed")
    runs, why = explain(72)
    assert runs == f"{sdpa}, PyTorch's choice of backend"
    assert why == "its backends and flash-attn 2 are unmeasured on this GPU"
    assert module.explain_attention(CPU, torch.bfloat16, 64) == (
        sdpa,
        "its backends and flash-attn are for CUDA, not for cpu",
    )


@pytest.mark.parametrize(
    ("head_dim", "dtype", "serves"),
    [(64, torch.bfloat16, True), (320, torch.float16, False), (60, torch.float16, False), (64, torch.float32, False)],
)
def test_heads_that_the_packages_take(monkeypatch, head_dim, dtype, serves):
    monkeypatch.setattr(module, "_INSTALLED", dict.fromkeys(module.PACKAGES, True))
    for package in module.PACKAGES:
        assert (module._why_not(package, dtype, head_dim, False, True) is None) == serves


def test_the_table_is_asked_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(module, "choose_attention", lambda *_: pytest.fail("there is nothing to choose"))
    q = torch.randn(1, 3, 2, 8)
    attention(q, q, q)


@pytest.mark.parametrize("path", ["own choice", *module.BACKENDS, *module.PACKAGES])
def test_every_path_gives_the_same_of_packed_queries_without_a_copy(monkeypatch, path):
    """Stand-ins for the packages, which take and return [B, S, H, D]; of PyTorch's backends a CPU has but some."""
    given = []

    def flash_attn_func(q, k, v, *dropout):
        given.extend([q, k, v])
        made = plain(q, k, v)
        assert dropout == ((0.0,) if path == "flash-attn 2" else ())
        return (made, None) if path == "flash-attn 3" else made

    package = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    for name in module.PACKAGES.values():
        monkeypatch.setitem(sys.modules, name, package)
    qkv = torch.randn(2, 5, 3 * 4 * 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    q, k, v = (part.unflatten(-1, (4, 8)) for part in qkv.chunk(3, dim=-1))
    out = module.attend_on(path, q, k, v)
    expected = plain(q, k, v)
    assert torch.allclose(out, expected, atol=1e-6)
    for part, seen in zip((q, k, v), given, strict=False):
        assert (seen.data_ptr(), seen.stride()) == (part.data_ptr(), part.stride())
    assert len(given) == (3 if path in module.PACKAGES else 0)
    ours, exact = (torch.autograd.grad(made.square().sum(), qkv, retain_graph=True)[0] for made in (out, expected))
    assert torch.allclose(ours, exact, atol=1e-5)


def test_a_backend_is_asked_for_and_no_other_where_it_alone_may_serve():
    q = torch.randn(1, 3, 2, 8)
    seen = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    for path in ("flash", "math"):
        with Ops():
            module.attend_on(path, q, q, q, only=True)
        assert any("flash_attention_for_cpu" in op for op in seen) == (path == "flash")
        seen.clear()
    with pytest.raises(RuntimeError):
        module.attend_on("cudnn", q, q, q, only=True)
    compiled = torch.compile(partial(module.attend_on, "math"), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, q, q), module.attend_on("math", q, q, q))


def test_other_dtypes_are_refused():
    q = torch.randn(1, 2, 1, 8)
    for place, name in enumerate("qkv"):
        given = [q, q, q]
        given[place] = q + 0j
        with pytest.raises(TypeError, match=f"^{name}: expected a floating point dtype, got torch.complex64"):
            attention(*given)
