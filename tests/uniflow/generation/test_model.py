"""The transformer against what it is defined as, its sizes, its statistics, its folders."""

import copy
import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tests.conftest import check_reset, randomize
from tests.uniflow.generation.conftest import tiny
from uniflow import CheckpointError, UniFlow
from uniflow.generation import FlowTransformer, FlowTransformerConfig
from uniflow.generation.config import HEADS, PRESETS, shift_of
from uniflow.generation.layers import Rotation
from uniflow.latent_set import ChannelStatistics
from uniflow.latents import LatentsError, fingerprint, meaning

SHAPES = [{"head": head} for head in HEADS] + [
    {"mlp": "gelu", "positions": "learned"},
    {"head": "wide", "positions": "learned"},
    {"classes": None},
]


def inputs(batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 16, 6, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % 3


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x):
    """Rotary positions of a 4x4 grid by complex numbers; x [B, 16, H, 8]."""
    lines, columns = torch.arange(16).double() // 4, torch.arange(16).double() % 4
    frequencies = torch.tensor([1.0, 0.1], dtype=torch.float64)  # 100^-(0/2), 100^-(1/2)
    angles = torch.cat([lines[:, None] * frequencies, columns[:, None] * frequencies], 1)[:, None]
    rotated = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([rotated.real, rotated.imag], -1)


def block_of(block, x, y):
    """DiT's block in plain words."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(y).chunk(6, -1)
    h = rms(x) * (1 + scale1) + shift1
    q, k, v = (part.unflatten(-1, (2, 8)) for part in block.attn.qkv(h).chunk(3, -1))
    q, k = turned(block.attn.q_norm.weight * rms(q)), turned(block.attn.k_norm.weight * rms(k))
    heads = sdpa(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
    x = x + gate1 * block.attn.proj(heads.flatten(2))
    return x + gate2 * block.mlp(rms(x) * (1 + scale2) + shift2)


def test_it_is_dits_transformer_with_a_flow_head():
    """Only here: what the residual left from block to block, the rotation and the condition compute."""
    model = tiny().double()
    x, t, labels = inputs()
    x, t = x.double(), t.double()
    time = model.time_embed(1000 * t)
    y = torch.nn.functional.silu(time + model.label_embed.weight[labels])[:, None]
    state = model.latent_proj(x)
    for block in model.blocks:
        state = block_of(block, state, y)
    shift, scale = model.norm.modulation(y).chunk(2, -1)
    h = rms(state) * (1 + scale) + shift
    expected = model.head(x.flatten(0, 1), (1000 * t).repeat_interleave(16), h.flatten(0, 1)).view_as(x)
    assert torch.allclose(model(x, t, labels), expected, rtol=0, atol=1e-6)  # the angles are float32


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_pictures_do_not_see_each_other_and_places_count(shape):
    model = tiny(**shape)
    x, t, labels = inputs()
    labels = None if model.config.classes is None else labels
    together = model(x, t, labels)
    assert together.shape == x.shape
    for number in range(3):
        one = slice(number, number + 1)
        alone = model(x[one], t[number], None if labels is None else labels[one])
        assert torch.allclose(alone, together[one], atol=2e-5)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = model(x[:, order], t, labels)
    assert not torch.allclose(shuffled, together[:, order], atol=1e-3)  # as a model without positions would give
    moved = model(x + torch.eye(16)[3][:, None], t, labels) - together
    assert (moved.abs().amax((0, 2)) > 1e-4).all()  # every token sees every other


def test_labels_and_times_change_the_velocity():
    model = tiny()
    x, t, labels = inputs()
    with_labels = model(x, t, labels)
    assert not torch.allclose(model(x, t, (labels + 1) % 3), with_labels, atol=1e-3)
    assert not torch.allclose(model(x, 1 - t, labels), with_labels, atol=1e-3)
    assert torch.equal(model(x, t), model(x, t, torch.full((3,), 3)))


def test_rotations_tell_lines_from_columns():
    """Attention depends on how far tokens are from each other by line and by column, and on nothing else."""
    rotation = Rotation.of((3, 5), 8, torch.device("cpu"))
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = (rotation(q.expand(1, 15, 1, 8))[0, :, 0] @ rotation(k.expand(1, 15, 1, 8))[0, :, 0].T).view(3, 5, 3, 5)
    assert torch.allclose(scores[0, 0, 1, 3], scores[1, 1, 2, 4])
    assert not torch.allclose(scores[0, 0, 1, 3], scores[0, 0, 0, 3])
    assert not torch.allclose(scores[0, 0, 1, 3], scores[0, 0, 1, 2])


@pytest.mark.parametrize("head", HEADS)
def test_a_new_model_predicts_no_velocity_and_every_parameter_learns(head):
    torch.manual_seed(0)
    new = FlowTransformer(FlowTransformerConfig(6, (4, 4), 3, 16, 2, 2, head=head, head_width=24, head_depth=1))
    x, t, labels = inputs()
    assert not new(x, t, labels).any()
    check_reset(lambda: FlowTransformer(copy.deepcopy(new.config)))
    model = tiny(head=head)
    model(x, t, torch.tensor([0, 1, 3])).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_and_autocast_are_near(head):
    model = tiny(head=head)
    x, t, labels = inputs()
    expected = model(x, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, t, labels)
    low = copy.deepcopy(model).bfloat16()
    assert low.latent_std.dtype == torch.float32
    for found in (mixed, low(x, t, labels)):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 0.05 * expected.norm()


# DiT's table 1
@pytest.mark.parametrize(("name", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_presets_have_dits_sizes(name, millions):
    def counted(head):
        config = FlowTransformerConfig.preset(name, 64, (16, 16), 1000, head=head)
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in FlowTransformer(config).parameters())

    linear = counted("linear")
    assert linear / 1e6 == pytest.approx(millions, rel=0.005)
    width, depth = (PRESETS[name][part] for part in ("head_width", "head_depth"))
    # embeddings of time, state and token; blocks of a norm, an MLP and modulations; the last modulation
    of_head = 2 * width**2 + 3 * width + (256 + 64 + 1) * width + depth * (5 * width**2 + 7 * width)
    assert counted("flow") == linear + of_head + 2 * width**2 + 2 * width
    with pytest.raises(ValueError, match="preset: expected one of S, B, L, XL"):
        FlowTransformerConfig.preset("H", 64, (16, 16), 1000)


def test_the_shift_is_raes():
    assert shift_of(16 * 16, 768) == pytest.approx(6.93, abs=0.01)  # of a DINOv2 at 256 pixels, in its paper
    assert shift_of(16 * 16, 64) == 2


def test_folders(tmp_path, tokenizer):
    model = tiny(tokenizer=meaning(tokenizer), fingerprint=fingerprint(tokenizer), names=["ä", "b", "c"])
    model.set_statistics(ChannelStatistics(torch.arange(6.0), 1 + torch.arange(6.0)))
    model.save_pretrained(tmp_path)
    read = FlowTransformer.from_pretrained(tmp_path)
    assert read.config == model.config
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in model.state_dict().items())
    assert not read.training
    latents = torch.randn(2, 16, 6)
    assert torch.allclose(read.standardised(latents), (latents - torch.arange(6.0)) / (1 + torch.arange(6.0)))
    assert torch.allclose(read.restored(read.standardised(latents)), latents, atol=1e-6)
    low = FlowTransformer.from_pretrained(tmp_path, dtype="bfloat16")
    assert low.dtype == torch.bfloat16
    assert torch.equal(low.latent_std, model.latent_std)
    read.check_tokenizer(tokenizer)
    other = randomize(UniFlow(tokenizer.config), seed=1)
    with pytest.raises(LatentsError, match="latents of another tokenizer: one of the same shape with other weights"):
        read.check_tokenizer(other)
    wider = UniFlow(type(tokenizer.config)(**{**vars(tokenizer.config), "latent_ch": 8}))
    with pytest.raises(LatentsError, match="another tokenizer: latent_ch 6 not 8"):
        read.check_tokenizer(wider)
    with pytest.raises(LatentsError, match="draws latents of 6 channels, the tokenizer has 8"):
        tiny().check_tokenizer(wider)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_folders_of_every_kind(tmp_path, shape):
    """No parameter of a head has a name by which a model in a checkpoint is found."""
    model = tiny(**shape)
    model.save_pretrained(tmp_path)
    state = FlowTransformer.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_folders_of_others_are_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())

    def refused(match, **changes):
        (tmp_path / "config.json").write_text(json.dumps({**said, **changes}))
        with pytest.raises(ValueError, match=match):
            FlowTransformer.from_pretrained(tmp_path)

    refused("expected a JSON object with model_type 'uniflow_generator'", model_type="uniflow")
    refused("unknown field x", x=1)
    refused("grid: expected an integer of at least 1, got 0", grid=[0, 4])
    refused("grid: expected lines and tokens a line", grid=4)
    refused("heads: expected a divisor of the width 16, got 3", heads=3)
    refused("multiple of 4 channels, got 16 / 8 = 2", heads=8)
    refused("head: expected one of flow, wide, linear, got 'mlp'", head="mlp")
    refused("head_width: expected a multiple of 8", head="wide", head_width=20)
    refused("noise_shift: expected a positive number", noise_shift=0)
    refused("classes: expected an integer", classes="3")
    refused("names: expected a name for each of 3 classes", names=["a"])
    refused("fingerprint: expected beside tokenizer", fingerprint="ab")
    refused("does not hold this model", depth=300, width=1 << 12)  # of which nothing is made
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "width"}))
    with pytest.raises(ValueError, match="lacks width"):
        FlowTransformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**said, "classes": None}))
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): label_embed.weight"):
        FlowTransformer.from_pretrained(tmp_path)


def test_what_does_not_fit_is_refused():
    model = tiny()
    x, t, labels = inputs()
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 16, 6\], got \(3, 15, 6\)"):
        model(x[:, 1:], t, labels)
    with pytest.raises(ValueError, match=r"t: expected a scalar or shape \[3\], got \(2,\)"):
        model(x, t[:2], labels)
    with pytest.raises(ValueError, match=r"labels: expected shape \[3\], got \(2,\)"):
        model(x, t, labels[:2])
    with pytest.raises(ValueError, match="labels: the model was made without classes"):
        tiny(classes=None)(x, t, labels)
    with pytest.raises(ValueError, match="mean: expected 6 finite numbers"):
        model.set_statistics(ChannelStatistics(torch.zeros(5), torch.ones(6)))


def test_blocks_are_traced_whole_as_the_trainer_compiles_them():
    """Only here: the stream, without a branch at first, is handed from graph to graph."""
    model = tiny()
    x, t, labels = inputs()
    expected = model(x, t, labels)
    torch.compiler.reset()
    for block in model.layers():
        block.compile(fullgraph=True, backend="eager")
    assert torch.allclose(model(x, t, labels), expected, atol=1e-5)
