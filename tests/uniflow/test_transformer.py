"""The transformer layer in all its variants, against the release's plain form in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import randomize
from uniflow.encoder import LayerStack
from uniflow.transformer import DropPath, RMSNorm, TransformerLayer, kernel_states
from uniflow_kernels import backend
from uniflow_kernels.modules.fp8_linear import Fp8Linear


def plain_layer(p, x, heads, norm_type, eps, act):
    def norm(name, x):
        if norm_type == "rms_norm":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * p[f"{name}.weight"]
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)

    def linear(name, x):
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def rms(name, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * p[name] if name in p else x

    b, s, w = x.shape
    q, k, v = linear("attn.qkv", norm("norm1", x)).view(b, s, 3, w).unbind(2)
    q, k = rms("attn.q_norm.weight", q), rms("attn.k_norm.weight", k)
    q, k, v = (part.view(b, s, heads, w // heads).transpose(1, 2) for part in (q, k, v))
    scores = (q * (w // heads) ** -0.5) @ k.transpose(-2, -1)
    h = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, w)
    x = x + linear("attn.proj", h) * p.get("ls1", 1.0)
    return x + linear("mlp.fc2", act(linear("mlp.fc1", norm("norm2", x)))) * p.get("ls2", 1.0)


VARIANTS = {
    "encoder": {"eps": 1e-6, "layer_scale": 0.1},
    "global block": {},
    "rms": {"norm_type": "rms_norm", "eps": 1e-6, "layer_scale": 1.0},
    "qk norm": {"qk_normalization": True, "layer_scale": 1.0},
    "no qkv bias": {"qkv_bias": False},
    "rms, qk norm, no bias": {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False, "layer_scale": 1.0},
    "silu": {"act": "silu"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_against_the_plain_form(within_twice, name, dtype):
    options = VARIANTS[name]
    layer = randomize(TransformerLayer(32, 4, 48, **options)).to(dtype)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    act = F.silu if options.get("act") == "silu" else F.gelu

    def plain(to):
        p = {key: value.detach().to(to) for key, value in layer.state_dict().items()}
        return plain_layer(p, x.to(to), 4, options.get("norm_type"), options.get("eps", 1e-5), act)

    within_twice(layer(x), plain(dtype), plain(torch.float64))


def test_variants_have_the_parameters_of_the_release():
    names = dict(TransformerLayer(32, 4, 48, qk_normalization=True, qkv_bias=False, layer_scale=1.0).named_parameters())
    assert {"attn.q_norm.weight", "attn.k_norm.weight", "ls1", "ls2"} <= names.keys()
    assert names["attn.q_norm.weight"].shape == (32,)
    assert "attn.qkv.bias" not in names
    assert "ls1" not in dict(TransformerLayer(32, 4, 48).named_parameters())


def test_rms_norm_rounds_before_the_weight():
    norm = randomize(RMSNorm(16)).to(torch.bfloat16)
    x = torch.randn(5, 16).to(torch.bfloat16)
    quotient = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), norm.weight * quotient.to(torch.bfloat16))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 3, 2))
    per_sample = out[:, 0, 0]
    assert torch.equal(out, per_sample[:, None, None].expand_as(out))
    assert per_sample.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert abs(out.mean() - 1) < 0.03
    x = torch.randn(4, 3, 2)
    assert drop.eval()(x) is x


def layer_of(**options):
    return randomize(TransformerLayer(32, 4, 48, **options))


@pytest.mark.parametrize("scale", [None, 0.1])
def test_samples_that_are_dropped_are_left_out_with_the_same_numbers_and_gradients(within_twice, scale):
    """As many as are drawn: all, some or none, of which every parameter has a gradient nevertheless."""
    layer = layer_of(layer_scale=scale, drop_path=0.5).train()
    x = torch.randn(5, 9, 32, generator=torch.Generator().manual_seed(1))
    seen: dict[str, list[int]] = {"attn": [], "mlp": []}
    for name, counts in seen.items():
        getattr(layer, name).register_forward_hook(lambda _, given, __, counts=counts: counts.append(len(given[0])))
    wide = layer_of(layer_scale=scale).double()
    wide.load_state_dict(layer.state_dict())

    def masked(layer, x, masks):
        x = x + masks[0] * layer.attn(layer.norm1(x)) * (1 if layer.ls1 is None else layer.ls1)
        return x + masks[1] * layer.mlp(layer.norm2(x)) * (1 if layer.ls2 is None else layer.ls2)

    def results(run, layer, x):
        x = x.detach().requires_grad_()
        out = run(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]

    kept = set()
    for seed in range(40):
        torch.manual_seed(seed)
        drawn = [torch.rand(5) >= 0.5 for _ in range(2)]
        numbers = [int(each.sum()) for each in drawn]
        if numbers[0] in kept:
            continue
        kept.add(numbers[0])
        masks = [(each.float() / 0.5)[:, None, None] for each in drawn]
        exact = results(lambda x: masked(wide, x, [mask.double() for mask in masks]), wide, x.double())  # noqa: B023
        for counts in seen.values():
            counts.clear()
        plain = results(lambda x: masked(layer, x, masks), layer, x)  # noqa: B023
        assert seen == {"attn": [5], "mlp": [5]}
        torch.manual_seed(seed)
        for mine, theirs, truth in zip(results(layer, layer, x), plain, exact, strict=True):
            within_twice(mine, theirs, truth)
        assert seen == {"attn": [5, max(1, numbers[0])], "mlp": [5, max(1, numbers[1])]}
    assert kept == {0, 1, 2, 3, 4, 5}
    assert layer(x[:0]).shape == (0, 9, 32)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["encoder", "global block", "rms"])
def test_residual_and_norm_are_one_kernel_where_there_are_any(within_twice, name, autocast):
    """Of a norm that somebody hooks they are not, nor is the MLP; where kernels cannot serve, nothing is raised."""
    pytest.importorskip("triton")
    layer, options = layer_of(**VARIANTS[name]), VARIANTS[name]
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))

    def results(layer, x, served):
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, autocast and x.dtype == torch.float32):
            calls = []
            hooks = [
                part.register_forward_hook(lambda *_: calls.append(1))
                for part in (() if served else (layer.norm2, layer.mlp.fc1))
            ]
            out = layer(x)
            for hook in hooks:
                hook.remove()
            assert len(calls) == len(hooks)
        assert out.dtype == x.dtype
        assert ("_ModulatedNorm" in graph(out)) == served
        return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]

    plain = results(layer, x, False)
    with backend("triton"):
        hooked = results(layer, x, False)
        found = results(layer, x, True)
        wide = layer_of(**options).double()
        wide.load_state_dict(layer.state_dict())
        exact = results(wide, x.double(), False)
    assert all(map(torch.equal, hooked, plain))
    for mine, theirs, truth in zip(found, plain, exact, strict=True):
        within_twice(mine, theirs, truth)


PATHS = ("rows", "products", "small products")


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", VARIANTS)
def test_layers_run_by_kernels_as_their_forwards_do(within_twice, name, path):
    """Through both layers and what is handed from one to the next, in every variant."""
    pytest.importorskip("triton")
    layers = nn.ModuleList(layer_of(**VARIANTS[name]).eval() for _ in range(2))
    wide = copy.deepcopy(layers).double()
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    with backend("triton"):
        found = list(kernel_states(layers, x, path))
    with backend("eager"):
        plain, exact = (list(LayerStack(stack).states(to)) for stack, to in ((layers, x), (wide, x.double())))
    assert len(found) == 2
    for mine, theirs, truth in zip(found, plain, exact, strict=True):
        within_twice(mine, theirs, truth)


@torch.no_grad()
def test_what_keeps_layers_from_running_by_kernels(monkeypatch):
    pytest.importorskip("triton")
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))

    def served(*layers):
        with backend("triton"):
            return kernel_states(nn.ModuleList(layers), x) is not None

    layer = layer_of().eval()
    assert served(layer, layer_of(drop_path=0.1).eval(), layer_of(layer_scale=0.1).train())
    assert kernel_states(nn.ModuleList([layer]), x.double()) is None  # on a CPU, where no kernels are asked for
    assert not served()
    assert not served(layer, nn.Identity())
    assert not served(layer, layer_of(drop_path=0.1).train())
    assert not served(layer, layer_of(dropout=0.1).train())
    assert not served(layer, layer_of(eps=1e-3))
    assert not served(layer, layer_of(act="silu"))
    hooked = layer_of().eval()
    hooked.mlp.fc1.register_forward_hook(lambda *_: None)
    assert not served(hooked)
    lowered = layer_of().eval()
    lowered.mlp.fc1 = Fp8Linear.of(lowered.mlp.fc1)
    assert not served(lowered)
    compiled = layer_of().eval()
    compiled.compile(backend="eager")
    assert not served(compiled)
    with torch.enable_grad():
        assert not served(layer)


@torch.no_grad()
def test_a_stack_runs_its_layers_by_kernels(within_twice, monkeypatch):
    pytest.importorskip("triton")
    stack = LayerStack(layer_of(layer_scale=0.5).eval() for _ in range(2))
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    with backend("eager"):
        plain, exact = stack(x), copy.deepcopy(stack).double()(x.double())
    for layer in stack.layers:
        monkeypatch.setattr(type(layer), "forward", None)  # whoever calls it fails
    with backend("triton"):
        states, last = stack(x), stack.last(x)
    assert torch.equal(states[-1], last)
    for mine, theirs, truth in zip(states, plain, exact, strict=True):
        within_twice(mine, theirs, truth)


def graph(out):
    """The names of all that is recorded for its gradient."""
    found, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [before for before, _ in node.next_functions]
    return " ".join(node.name() for node in found)


def test_dropouts_act_in_training_only():
    layer = randomize(TransformerLayer(32, 4, 48, dropout=0.5, attention_dropout=0.5))
    x = torch.randn(2, 9, 32)
    assert torch.equal(layer.eval()(x), layer.eval()(x))
    assert not torch.equal(layer.train()(x), layer.eval()(x))
