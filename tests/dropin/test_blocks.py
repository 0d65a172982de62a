"""Blocks of diffusion transformers: stand-ins of DiT, SiT and LightningDiT, and diffusers' own code."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from tests.conftest import randomize
from tests.dropin.stand_ins import linears, rows
from tests.dropin.test_attentions import NaiveAttention
from tests.dropin.test_heads import compare, outputs_and_gradients
from uniflow_kernels import backend, patch, unpatch
from uniflow_kernels.dropin import blocks

WIDTH = 32
INPUTS = (rows(2, 5, WIDTH), rows(2, WIDTH, seed=1))


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """Of DiT, and of SiT, which took it over."""

    make_norm = functools.partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = type(self).make_norm(WIDTH), type(self).make_norm(WIDTH)
        self.attn, self.mlp = NaiveAttention(), linears(WIDTH, 2 * WIDTH, nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, c):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift, scale))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class Rotated(NaiveAttention):
    def forward(self, x, rope=None):
        return super().forward(x if rope is None else x * rope)


class LightningBlock(DiTBlock):
    """RMS norms with a weight, and an argument that is handed on."""

    make_norm = functools.partial(nn.RMSNorm, eps=1e-6)

    def __init__(self):
        super().__init__()
        self.attn = Rotated()

    def forward(self, x, c, feat_rope=None):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift, scale), rope=feat_rope)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class Halved(NaiveAttention):
    def forward(self, x, factor=1.0):
        return super().forward(factor * x)


class WithDefault(DiTBlock):
    """An argument that is handed on, and is not None where it is left out."""

    def __init__(self):
        super().__init__()
        self.attn = Halved()

    def forward(self, x, c, factor=0.5):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift, scale), factor)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


BLOCKS = {
    "with a default": (WithDefault, {}),
    "DiT": (DiTBlock, {}),
    "LightningDiT": (LightningBlock, {"feat_rope": rows(WIDTH, seed=2)}),
    "LightningDiT without": (LightningBlock, {}),
}


@pytest.fixture
def only_ours(monkeypatch):
    """That the blocks' norms are not called."""

    def check(block):
        def unused(*_):
            raise AssertionError("its own forward ran")

        for part in (block.norm1, block.norm2):
            monkeypatch.setattr(type(part), "forward", unused)

    return check


@pytest.mark.parametrize("name", BLOCKS)
def test_numbers_and_gradients(name, within_twice, only_ours):
    make, kwargs = BLOCKS[name]
    block = randomize(make())
    exact = outputs_and_gradients(copy.deepcopy(block).double(), INPUTS, kwargs, torch.float64)
    before = outputs_and_gradients(block, INPUTS, kwargs, torch.float32)
    report = patch(block, strict=True)
    assert "transformer block" in report.patched[""]
    assert "attention" in report.patched["attn"] or name != "DiT"  # what is inside is served too
    same = outputs_and_gradients(block, INPUTS, kwargs, torch.float32)
    assert torch.equal(same["out"], before["out"]) or name == "DiT"
    only_ours(block)
    with backend("triton"):
        after = outputs_and_gradients(block, INPUTS, kwargs, torch.float32)
    compare(after, before, exact, within_twice, floor=2e-6)
    assert list(patch(copy.deepcopy(block)).patched) == list(report.patched)


def diffusers_model():
    transformer = pytest.importorskip("diffusers").DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        norm_num_groups=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return randomize(transformer).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transformer_of_diffusers(dtype, within_twice):
    model = diffusers_model().to(dtype)
    inputs = rows(2, 4, 8, 8).to(dtype), torch.tensor([3, 7]), torch.tensor([1, 2])

    def found(model, inputs):
        out = model(*inputs).sample
        weight = rows(*out.shape, seed=5).to(out)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), list(model.parameters()))]

    exact = found(copy.deepcopy(model).double(), (inputs[0].double(), *inputs[1:]))
    before = found(model, inputs)
    report = patch(model)
    assert list(report.patched) == ["transformer_blocks.0", "transformer_blocks.1"]
    assert report.left_alone == {}
    assert all(map(torch.equal, found(model, inputs), before))  # no kernel serves here
    calls = []
    for block in model.transformer_blocks:
        block.attn1.register_forward_hook(lambda *_: calls.append("attention"))
    with backend("triton"):
        after = found(model, inputs)
    assert calls == ["attention"] * 2
    if dtype == torch.float32:
        for ours, theirs, truth in zip(after, before, exact, strict=True):
            if truth.abs().max() > 1e-9:  # a bias of all keys changes nothing
                within_twice(ours, theirs, truth, floor=2e-6)
    else:  # all together: the largest error of few rows is a matter of luck

        def error(found):
            pairs = [(a, e) for a, e in zip(found, exact, strict=True) if e.abs().max() > 1e-9]
            apart = [(a.double() - e).flatten() / e.abs().max() for a, e in pairs]
            return torch.cat(apart).square().mean().sqrt()

        assert error(after) <= 2 * error(before)
        assert not torch.equal(after[0], before[0])


def test_arguments_that_are_looked_at_and_hooks(only_ours):
    """A block of diffusers with arguments for its attention, and one whose norm has a hook, run as they are."""
    model = diffusers_model()
    block, x = model.transformer_blocks[0], rows(2, 16, 16)
    given = {"timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}
    mask = torch.zeros(2, 1, 16)
    mask[..., 3] = -1e4
    expected = [block(x, **given), block(x, attention_mask=mask, **given)]
    patch(block, strict=True)
    calls = []
    with backend("triton"):
        torch.testing.assert_close(block(x, **given), expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(block(x, attention_mask=mask, **given), expected[1], rtol=1e-4, atol=1e-4)
        assert torch.equal(block(x, cross_attention_kwargs={}, **given), expected[0])
        block.norm3.register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(block(x, **given), expected[0])
    assert calls == [1]


def test_compiles_whole():
    block = randomize(DiTBlock())
    patch(block, strict=True)
    unpatch(block.attn)
    with backend("triton"):
        torch._dynamo.reset()
        out = torch.compile(block, fullgraph=True, backend="aot_eager")(*INPUTS)
        torch.testing.assert_close(out, block(*INPUTS), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- look-alikes


class OtherOrder(DiTBlock):
    def forward(self, x, c):
        scale, shift, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift, scale))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FurtherTerm(DiTBlock):
    def forward(self, x, c):
        return super().forward(x, c) + 0.01 * c.unsqueeze(1)


class TrainsOtherwise(DiTBlock):
    def forward(self, x, c):
        return super().forward(x, c if self.training else 0.9 * c)


class Parallel(DiTBlock):
    def forward(self, x, c):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        h = gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x + h + gate.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift, scale))


class Crossed(DiTBlock):
    def __init__(self):
        super().__init__()
        self.cross = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, c):
        return super().forward(x + self.cross(x), c)


class ThreeNorms(DiTBlock):
    def __init__(self):
        super().__init__()
        self.norm3 = nn.LayerNorm(WIDTH)

    def forward(self, x, c):
        return self.norm3(super().forward(x, c))


class TwoStreams(DiTBlock):
    def __init__(self):
        super().__init__()
        self.other_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))


LOOK_ALIKES = {
    "order": (OtherOrder, "computes something else"),
    "a term": (FurtherTerm, "computes something else"),
    "training": (TrainsOtherwise, "another way in training"),
    "parallel": (Parallel, "computes something else"),
    "crossed": (Crossed, "attn, mlp, cross between its norms"),
    "three norms": (ThreeNorms, "3 norms of x, not two"),
    "two streams": (TwoStreams, "2 layers of modulations"),
}


@pytest.mark.parametrize("which", LOOK_ALIKES)
def test_a_look_alike_is_left_alone(which):
    make, why = LOOK_ALIKES[which]
    block = make()
    report = patch(block)
    assert why in report.left_alone[""]
    assert "forward" not in vars(block)


def test_what_is_no_block_is_not_spoken_of():
    wide = nn.Sequential(linears(WIDTH, 6 * WIDTH, nn.SiLU()), nn.Linear(WIDTH, 6 * WIDTH))
    encoder = nn.TransformerEncoderLayer(WIDTH, 2, 6 * WIDTH)
    assert blocks.recognise(wide) is blocks.recognise(encoder) is None
