"""Which heads are recognised and which are left alone; and that all around their blocks stays their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import randomize
from tests.dropin.stand_ins import (
    COND,
    PROJECTS,
    TARGET,
    WIDTH,
    Canonical,
    DeCoNet,
    FlowBlock,
    JvpLayerNorm,
    Last,
    TimeEmbedding,
    canonical_inputs,
    close,
    linears,
    only_ours,
    rows,
    with_blocks,
)
from uniflow_kernels import patch

pytestmark = pytest.mark.usefixtures("served")

INPUTS = PROJECTS["MAR"].inputs


# ------------------------------------------------------------------------------------------------------- look-alikes


class ScaledFirst(FlowBlock):
    """The gate lies first."""

    def forward(self, x, y):
        gate, shift, scale = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class NormLast(FlowBlock):
    """The norm comes after the MLP."""

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * (self.in_ln(self.mlp(x)) * (1 + scale) + shift)


class NOVABlock(FlowBlock):
    """A second norm, after the MLP."""

    def __init__(self):
        super().__init__()
        self.norm2 = nn.LayerNorm(WIDTH)

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.norm2(self.mlp(self.in_ln(x) * (1 + scale) + shift))


class ScaleOnly(nn.Module):
    """lucidrains': scale without shift, gates of 1 + gamma, SiLU of the condition once for all blocks."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH, elementwise_affine=False), linears(WIDTH, 2 * WIDTH, nn.SiLU())
        self.to_scale_and_gate = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x, y):
        scale, gate = self.to_scale_and_gate(y).chunk(2, dim=-1)
        return x + self.mlp(self.norm(x) * (1 + scale)) * (1 + gate)


class NoiseConditioned(nn.Module):
    """A score head's: the condition is added, and nothing is modulated."""

    def __init__(self):
        super().__init__()
        self.norm, self.dense, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), linears(WIDTH, WIDTH, nn.SiLU())

    def forward(self, x, y):
        return x + self.mlp(self.norm(x) + self.dense(y))


class FurtherTerm(FlowBlock):
    def forward(self, x, y):
        return super().forward(x, y) + 0.01 * y


class Temperature(FlowBlock):
    """As in EAR: another formula in eval mode."""

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        shift = shift if self.training else 0.7 * shift
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class Gelu(FlowBlock):
    def make_mlp(self, width, hidden):
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class UnknownNorm(FlowBlock):
    make_norm = nn.BatchNorm1d


class OtherLast(Last):
    """Scale before shift, other than in the blocks."""

    def forward(self, x, y):
        scale, shift = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class OtherName(Last):
    """DeTok's."""

    def __init__(self, width, out):
        super().__init__(width, out)
        self.norm = self.norm_final
        del self.norm_final

    def forward(self, x, y):
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


class SecondBlockDiffers(Canonical):
    def __init__(self):
        super().__init__()
        self.res_blocks[1].__class__ = ScaledFirst


class SecondCondition(Canonical):
    """The last layer is given another condition than the blocks."""

    def run(self, x, y):
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, 2 * y)


class AddsBetween(Canonical):
    def run(self, x, y):
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y) + 0.1 * y
        return self.final_layer(x, y)


class LooksAtPosition(FlowBlock):
    def forward(self, x, y, pos):
        return super().forward(x, y) if pos is None or pos.sum() == 0 else x


class GivesPosition(DeCoNet):
    make_block = LooksAtPosition


class Drops(FlowBlock):
    def make_mlp(self, width, hidden):
        return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width), nn.Dropout(0.5))


class OtherLinear(nn.Linear):
    pass


class WithOtherLinear(FlowBlock):
    def make_mlp(self, width, hidden):
        return nn.Sequential(OtherLinear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))


class WeightedLast(Last):
    make_norm = JvpLayerNorm


class Keeps(Canonical):
    def run(self, x, y):
        x = self.input_proj(x)
        self.kept = []
        for block in self.res_blocks:
            x = block(x, y)
            self.kept.append(x)
        return self.final_layer(x, y)


LOOK_ALIKES = {
    "order": (with_blocks(ScaledFirst), "res_blocks.0: computes something else"),
    "norm after": (with_blocks(NormLast), "res_blocks.0.in_ln: no part of the blocks that are served"),
    "second norm": (with_blocks(NOVABlock), "res_blocks.0.norm2: no part of the blocks that are served"),
    "scale only": (with_blocks(ScaleOnly), "makes 32 numbers of 16, which are not shift, scale, gate"),
    "added": (with_blocks(NoiseConditioned), "makes 16 numbers of 16, which are not shift, scale, gate"),
    "a term": (with_blocks(FurtherTerm), "res_blocks.0: computes something else"),
    "eval only": (with_blocks(Temperature), "res_blocks.0: computes something else"),
    "GELU": (with_blocks(Gelu), "res_blocks.0.mlp: its activation is not SiLU"),
    "batch norm": (with_blocks(UnknownNorm), "a BatchNorm1d, neither a layer norm nor an rms norm"),
    "order at last": (type("Own", (Canonical,), {"make_last": OtherLast}), "final_layer: computes something else"),
    "second block": (SecondBlockDiffers, "res_blocks.1: computes something else"),
    "second condition": (SecondCondition, "several conditions"),
    "between": (AddsBetween, "something more between its blocks"),
    "position": (GivesPosition, "res_blocks.0: looks at what it is given beside x and the condition"),
    "dropout": (with_blocks(Drops), "it has dropout inside"),
    "linear": (with_blocks(WithOtherLinear), "res_blocks.0.mlp.0: a linear layer of the class"),
    "weight at last": (type("Own", (Canonical,), {"make_last": WeightedLast}), "its last norm has a weight"),
    "keeps": (Keeps, "keeps what its blocks return"),
}


@pytest.mark.parametrize("fresh", [True, False], ids=["zero gates", "random"])
@pytest.mark.parametrize("which", LOOK_ALIKES)
def test_a_look_alike_is_left_alone(which, fresh):
    make, why = LOOK_ALIKES[which]
    head = make()
    if fresh:  # as such heads are initialised: their output is zero whatever they compute
        for layer in (*head.res_blocks.modules(), *head.final_layer.modules()):
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
    state = {name: value.clone() for name, value in head.state_dict().items()}
    report = patch(head)
    assert report.patched == {}
    assert why in report.left_alone[""]
    assert "forward" not in vars(head)
    assert all(torch.equal(value, state[name]) for name, value in head.state_dict().items())


def test_shapes_that_are_none_of_the_family():
    head = Canonical()
    head.cond_embed = nn.Linear(COND, WIDTH + 1)
    assert "no way was found to call its forward(x, t, c) (RuntimeError" in patch(head).left_alone[""]
    head = Canonical()
    head.res_blocks[1] = nn.Linear(WIDTH, WIDTH)
    assert patch(head).patched == {}
    assert patch(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))).left_alone == {}


def test_what_is_no_head_is_not_spoken_of():
    """An encoder, and a stack of residual blocks without a condition."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.out = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 6)
            self.blocks = nn.ModuleList(linears(WIDTH, WIDTH, nn.SiLU()) for _ in range(2))

        def forward(self, x):
            x = self.proj(x)
            for block in self.blocks:
                x = x + block(x)
            return self.out(x)

    model = nn.ModuleList(
        [Residual(), nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2), 2, enable_nested_tensor=False)]
    )
    report = patch(model)
    assert report.patched == {}
    assert report.left_alone == {}


def test_meta_and_foreign_parameters():
    assert "meta" in patch(Canonical().to("meta")).left_alone[""]
    head = Canonical()
    head.cond_embed.weight = nn.Parameter(torch.zeros(WIDTH, COND, dtype=torch.int8), requires_grad=False)
    assert "quantizing" in patch(head).left_alone[""]


# -------------------------------------------------------------------------------------------------- around the blocks


class OtherCondition(Canonical):
    def forward(self, x, t, c):
        return self.run(x, self.time_embed(t) * self.cond_embed(c))


class UsesPosition(DeCoNet):
    def forward(self, x, t, c, pos=None):
        return super().forward(x, t, c if pos is None else c + pos)


class Truncates(Canonical):
    """CALM's: whole steps of t in [0, 1]."""

    def forward(self, x, t, c):
        return super().forward(x, (1000 * t).long(), c)


class Times(Canonical):
    """Any number of times, and names that say nothing."""

    def __init__(self):
        super().__init__()
        del self.time_embed
        self.embedders = nn.ModuleList(TimeEmbedding() for _ in range(2))

    def forward(self, hidden, signal, steps=None):
        y = self.cond_embed(signal)
        for embed, step in zip(self.embedders, steps or [], strict=False):
            y = y + embed(step) / len(steps)
        return self.run(hidden, y)


class Renamed(nn.Module):
    """Nothing is called as anywhere else; three layers up the MLP, the second of them the gate."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.e = nn.Linear(TARGET, WIDTH), nn.Linear(COND, WIDTH), TimeEmbedding()
        self.stack = nn.ModuleList(RenamedBlock() for _ in range(2))
        self.end = RenamedLast()

    def forward(self, c, x, t):
        y, c = self.b(x) + self.e(t), self.a(c)
        for part in self.stack:
            c = part(c, y=y)
        return self.end(c, y=y)


class RenamedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.pre, self.m = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, y):
        scale, shift, gate = self.m(F.silu(y)).chunk(3, dim=-1)
        h = self.pre(x) * (1 + scale) + shift
        return x + gate * self.three(self.one(h) * F.silu(self.two(h)))


class RenamedLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.m, self.out, self.small = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, TARGET), 1e-5

    def forward(self, x, y):
        scale, shift = self.m(F.silu(y)).chunk(2, dim=-1)
        return self.out(F.layer_norm(x, x.shape[-1:], eps=self.small) * (1 + scale) + shift)


class Squeezes(Canonical):
    """Groups of one token, and numbers in [-1, 1] (BitDance)."""

    def forward(self, x, t, c):
        grouped = x.ndim == 3
        out = super().forward(x[:, 0] if grouped else x, t, c[:, 0] if grouped else c).sigmoid() * 2 - 1
        return out[:, None] if grouped else out


class Guided(Canonical):
    """Two passes in one call."""

    def forward(self, x, t, c, guidance=None):
        out = super().forward(x, t, c)
        return out if guidance is None else guidance * out + (1 - guidance) * super().forward(x, t, 0 * c)


X, T, C = canonical_inputs(torch.rand(5))
AROUND = {
    "condition": (OtherCondition, [(X, T, C)]),
    "position": (UsesPosition, [(X, T, C), (X, T, C, rows(5, COND, seed=7))]),
    "truncated": (Truncates, [(X, T, C)]),
    "times": (Times, [(X, C), (X, C, [T, 0 * T]), (X, C, None)]),
    "renamed": (Renamed, [(X, C, T)]),
    "squeezes": (Squeezes, [(X, T, C), (X[:, None], T, C[:, None])]),
    "guided": (Guided, [(X, T, C), (X, T, C, 3.0)]),
    "norm's name": (type("DeTok", (Canonical,), {"make_last": OtherName}), [(X, T, C)]),
}


@pytest.mark.parametrize("which", AROUND)
def test_what_lies_around_the_blocks_is_the_heads_own(which, monkeypatch):
    make, calls = AROUND[which]
    head = randomize(make())
    expected = [head(*call) for call in calls]
    patch(head, strict=True)
    only_ours(head, monkeypatch)
    for call, out in zip(calls, expected, strict=True):
        close(head(*call), out)


class Cached(Canonical):
    """An argument whose value selects another path; `looks` is how it looks at it."""

    def forward(self, x, t, c, mode):
        y = self.time_embed(t) + self.cond_embed(c)
        return self.run(x, 1.2 * y if self.looks(mode) else y)


class CachedIfAsked(Cached):
    def forward(self, x, t, c, mode="plain"):
        return super().forward(x, t, c, mode)


LOOKS = {
    "comparison": (lambda mode: mode == "cached", "cached"),
    "order": (lambda mode: not isinstance(mode, str) and mode < 3, 2),
    "truth": (lambda mode: not mode, 0),
    "hash": (lambda mode: {"cached": True}.get(mode, False), "cached"),
    "arithmetic": (lambda mode: mode != "plain" and (mode + 1) % 2 == 0, 3),
    "formatting": (lambda mode: f"{mode}" == "cached", "cached"),
    "attribute": (lambda mode: hasattr(mode, "startswith") and mode.startswith("c"), "cached"),
    "class": (lambda mode: type(mode) is int, 5),
    "length": (lambda mode: len(mode) == 6, "cached"),
    "identity": (lambda mode: mode is LOOKS, {}),
}
LOOKS["identity"] = (LOOKS["identity"][0], LOOKS)


@pytest.mark.parametrize("make", [Cached, CachedIfAsked])
@pytest.mark.parametrize("how", LOOKS)
def test_an_argument_whose_value_is_looked_at(make, how, monkeypatch):
    looks, value = LOOKS[how]
    head = randomize(type("Own", (make,), {"looks": staticmethod(looks)})())
    before = head(*INPUTS, "plain"), head(*INPUTS, value)
    assert not torch.allclose(*before)
    patch(head, strict=True)
    only_ours(head, monkeypatch)
    close(head(*INPUTS, "plain"), before[0])
    close(head(*INPUTS, mode=value), before[1])


class Deviates(Canonical):
    """Does this and that with its blocks if it is told to."""

    def forward(self, x, t, c, how=None):
        x, y = self.input_proj(x), self.time_embed(t) + self.cond_embed(c)
        if how == "twice":
            x = self.res_blocks[0](x, y)
        features = []
        for i, block in enumerate(self.res_blocks):
            if how == "skips" and i == 1:
                continue
            x = block(x, 2 * y if how == "condition" and i else y)
            if how == "adds":
                x = x + 0.1
            if how == "casts":
                x = torch.as_tensor(x).sin()
            if how == "reads" and x.mean() > -100:
                x = torch.cat([x]) * 2
            features.append(x)
        if how == "returns":
            return features
        return [self.final_layer(x, y), *features] if how == "and features" else self.final_layer(x, y)


@pytest.mark.parametrize("how", ["twice", "skips", "condition", "adds", "casts", "reads", "returns", "and features"])
def test_a_call_that_does_more_with_its_blocks_runs_them(how):
    head = randomize(Deviates())
    expected, special = head(*INPUTS), head(*INPUTS, how)
    patch(head, strict=True)
    close(head(*INPUTS), expected)
    found = head(*INPUTS, how)
    assert all(map(torch.equal, *([out] if torch.is_tensor(out) else out for out in (found, special))))


@pytest.mark.parametrize(("weights", "inputs"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_head_that_casts_what_it_is_given(weights, inputs, monkeypatch):
    """A model in bfloat16 whose sampler draws float32 noise, and the reverse."""

    class Casts(Canonical):
        def forward(self, x, t, c):
            dtype = self.input_proj.weight.dtype
            return super().forward(x.to(dtype), t, c.to(dtype)).to(x.dtype)

    head = randomize(Casts()).to(weights)
    x, t, c = X.to(inputs), T, C.to(inputs)
    expected = head(x, t, c)
    patch(head, strict=True)
    only_ours(head, monkeypatch)
    ours = head(x, t, c)
    assert ours.dtype == expected.dtype == inputs
    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)


def test_a_head_that_casts_nothing_raises_what_it_raised():
    head = randomize(Canonical()).bfloat16()
    with pytest.raises(RuntimeError) as before:
        head(X, T, C)
    patch(head, strict=True)
    with pytest.raises(RuntimeError) as after:
        head(X, T, C)
    assert str(after.value) == str(before.value)
