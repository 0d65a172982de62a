"""Attention that writes its scores: what `patch` puts in its place, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import randomize
from tests.dropin.stand_ins import close, rows
from uniflow_kernels import patch


class NaiveAttention(nn.Module):
    """timm's and InternViT's attention as they write it without a fused kernel."""

    def __init__(self, width=32, heads=4, norm=None, dropout=0.0):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.proj_drop = nn.Dropout(dropout), nn.Dropout(0.0)
        if norm:
            self.q_norm, self.k_norm = (nn.LayerNorm(width if norm == "all" else width // heads) for _ in range(2))
        self.norm = norm

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        if self.norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores = scores if mask is None else scores + mask
        out = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class FusedAttention(NaiveAttention):
    def forward(self, x):
        q, k, v = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CausalAttention(NaiveAttention):
    def forward(self, x):
        return super().forward(x, torch.full((x.shape[1],) * 2, float("-inf")).triu(1))


class EncoderLayer(nn.Module):
    """InternViT's and UniFlow's: LayerScale on both branches."""

    def __init__(self, width=32):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = NaiveAttention(width, norm="all")
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.ls1, self.ls2 = (nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))

    def forward(self, x):
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


@pytest.mark.parametrize("norm", [None, "head", "all"])
def test_attention(norm, within_twice):
    layer = randomize(NaiveAttention(norm=norm))
    x = rows(2, 9, 32)

    def run(layer, x):
        x = x.clone().requires_grad_()
        out = layer(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]

    exact, before = run(copy.deepcopy(layer).double(), x.double()), run(layer, x)
    report = patch(layer)
    assert "attention of 4 heads" in report.patched[""]
    for results in zip(run(layer, x), before, exact, strict=True):
        within_twice(*results, floor=2e-6)


def test_attention_inside_an_encoder_layer():
    model = nn.ModuleList(randomize(EncoderLayer()) for _ in range(2))
    x = rows(2, 9, 32)
    expected = model[0](x)
    report = patch(model)
    assert set(report.patched) == {"0", "0.attn", "1", "1.attn"}
    close(model[0](x), expected)


def test_attention_that_is_left_alone():
    model = nn.ModuleDict({"fused": FusedAttention(), "causal": CausalAttention()})
    report = patch(model)
    assert report.patched == {}
    assert "nothing to gain" in report.left_alone["fused"]
    assert "a mask" in report.left_alone["causal"]


def test_attention_keeps_its_own_forward_where_scores_are_wanted():
    layer, x, mask = randomize(NaiveAttention(dropout=0.5)), rows(2, 9, 32), rows(9, 9)
    torch.manual_seed(1)
    dropped, masked = layer(x), layer.eval()(x, mask)
    patch(layer, strict=True)
    assert torch.equal(layer(x, mask), masked)
    torch.manual_seed(1)
    assert torch.equal(layer.train()(x), dropped)
    scores = []
    layer.eval().attn_drop.register_forward_hook(lambda *args: scores.append(args[2]))
    layer(x)
    assert scores[0].shape == (2, 4, 9, 9)
