"""The transformer layer in all its variants, against the release's plain form in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import randomize
from uniflow.transformer import DropPath, RMSNorm, TransformerLayer


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


def test_dropouts_act_in_training_only():
    layer = randomize(TransformerLayer(32, 4, 48, dropout=0.5, attention_dropout=0.5))
    x = torch.randn(2, 9, 32)
    assert torch.equal(layer.eval()(x), layer.eval()(x))
    assert not torch.equal(layer.train()(x), layer.eval()(x))
