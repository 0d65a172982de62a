import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import randomize
from uniflow import CheckpointError, UniFlow, denormalize, normalize
from uniflow.latents import fingerprint
from uniflow.unifluid.objective import check_tokenizer
from uniflow.unifluid.tokens import AutoencoderTokens, UniFlowTokens, read_image_tokenizer


def autoencoder(seed=0, **changes):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    fields = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
    return randomize(diffusers.AutoencoderKL(**{**blocks, **fields, **changes}), seed)


def deep_autoencoder(seed=0):
    """An AutoencoderDC of a stride of 32 pixels, whose config says nothing of the size of pictures."""
    diffusers = pytest.importorskip("diffusers")
    halves = {f"{part}_block_out_channels": (8,) * 6 for part in ("encoder", "decoder")}
    layers = {f"{part}_layers_per_block": (0, 1, 1, 1, 1, 1) for part in ("encoder", "decoder")}
    return randomize(diffusers.AutoencoderDC(latent_channels=4, scaling_factor=0.4, **halves, **layers), seed)


def autoencoder_of_mar(**changes):
    """Of a stride of 16 pixels and 16 channels, as MAR's KL-16."""
    five = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
    return autoencoder(block_out_channels=(4,) * 5, norm_num_groups=2, latent_channels=16, **five, **changes)


def pictures(size, count=2):
    return normalize(torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0)))


# UniFlow


def test_uniflows_latents_are_tokens(tiny):
    model = tiny()
    tokenizer = UniFlowTokens(model, steps=3)
    assert (tokenizer.channels, tokenizer.grid, tokenizer.image_size) == (8, (4, 4), (16, 16))
    images = pictures((16, 16))
    tokens = tokenizer.encode(images)
    with torch.no_grad():
        assert torch.equal(tokens, model.encode(images))
    drawn = tokenizer.decode(tokens, torch.Generator().manual_seed(1))
    with torch.no_grad():  # as tokenizers work: layers without gradients may have products of their own
        assert torch.equal(drawn, model.decode(tokens, steps=3, generator=torch.Generator().manual_seed(1)))


def test_uniflow_at_another_size(tiny):
    tokenizer = UniFlowTokens(tiny(), image_size=(8, 20))
    assert tokenizer.grid == (2, 5)
    tokens = tokenizer.encode(pictures((8, 20)))
    assert tokens.shape == (2, 10, 8)
    assert tokenizer.decode(tokens).shape == (2, 3, 8, 20)
    with pytest.raises(ValueError, match="image_size: expected multiples of 4 pixels, the side of a token, got 8x18"):
        UniFlowTokens(tiny(), image_size=(8, 18))


# autoencoders


@pytest.mark.parametrize("changes", [{}, {"scaling_factor": 0.5, "shift_factor": 0.25}])
def test_an_autoencoders_latents_are_tokens(changes):
    model = autoencoder(**changes)
    tokenizer = AutoencoderTokens(model, (16, 24))
    assert (tokenizer.channels, tokenizer.grid, tokenizer.image_size) == (4, (8, 12), (16, 24))
    images = pictures((16, 24))
    with torch.no_grad():
        mean = model.encode(denormalize(images) * 2 - 1).latent_dist.mean
        expected = (mean - changes.get("shift_factor", 0)) * changes.get("scaling_factor", 0.18215)
        reconstructed = normalize(model.decode(mean).sample / 2 + 0.5)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, 96, 4)
    for line, column in ((0, 0), (2, 7), (7, 11)):
        assert torch.allclose(tokens[:, 12 * line + column], expected[:, :, line, column], atol=1e-6)
    assert torch.allclose(tokenizer.decode(tokens), reconstructed, atol=1e-4)


def by_hand(model, images, packing):
    """Tokens and their pictures by diffusers alone: token (i, j) has p x p latents, a channel's behind each other."""
    with torch.no_grad():
        encoded = model.encode(2 * denormalize(images) - 1)
        latents = encoded.latent_dist.mean if "latent_dist" in encoded else encoded.latent
        reconstructed = normalize(model.decode(latents).sample / 2 + 0.5)
    scaled = latents * model.config.scaling_factor
    rows, columns = (extent // packing for extent in latents.shape[2:])
    squares = [
        scaled[:, :, packing * row : packing * (row + 1), packing * column : packing * (column + 1)].flatten(1)
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.stack(squares, 1), reconstructed


@pytest.mark.parametrize(
    ("make", "packing", "side", "channels"),
    [
        (autoencoder, 2, 4, 16),
        (autoencoder_of_mar, 2, 32, 64),
        (deep_autoencoder, 1, 32, 4),
        (deep_autoencoder, 2, 64, 16),
    ],
)
def test_packed_latents_are_tokens(make, packing, side, channels):
    model, size = make(), (2 * side, 3 * side)
    tokenizer = AutoencoderTokens(model, size, packing)
    assert (tokenizer.channels, tokenizer.grid, tokenizer.packing) == (channels, (2, 3), packing)
    images = pictures(size)
    tokens = tokenizer.encode(images)
    expected, reconstructed = by_hand(model, images, packing)
    assert torch.allclose(tokens, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    scale = reconstructed.abs().max().item()
    assert torch.allclose(tokenizer.decode(tokens), reconstructed, rtol=1e-4, atol=1e-4 * scale)
    # packing itself changes no bit, there and back
    given = torch.randn(2, 6, channels, generator=torch.Generator().manual_seed(1))
    tokenizer._decode = lambda latents, _: latents
    tokenizer._encode = lambda _: tokenizer.decode(given)
    assert tokenizer.decode(given).shape == (2, channels // packing**2, 2 * packing, 3 * packing)
    assert torch.equal(tokenizer.encode(images), given)


def test_packed_latents_of_a_uniflow(tiny):
    model = tiny()
    plain, packed = UniFlowTokens(model, steps=2), UniFlowTokens(model, steps=2, packing=2)
    assert (packed.channels, packed.grid) == (32, (2, 2))
    images = pictures((16, 16))
    latents, tokens = plain.encode(images), packed.encode(images)
    assert torch.equal(tokens[:, 1].unflatten(1, (8, 4))[:, :, 2], latents[:, 4 + 2])  # the third of (0, 1): line 1
    decoded = [
        each.decode(given, torch.Generator().manual_seed(0)) for each, given in ((plain, latents), (packed, tokens))
    ]
    assert torch.equal(*decoded)


def test_statistics_are_those_of_each_packed_channel(make_model):
    """So that what an autoencoder is scaled by makes no difference: MAR's 0.2325, or none at all."""
    scaled, plain = (
        AutoencoderTokens(autoencoder_of_mar(scaling_factor=scale), (96, 64), 2) for scale in (0.2325, 1.0)
    )
    normalized = []
    for tokenizer in (scaled, plain):
        model = make_model(token_channels=64, grid=(3, 2), packing=2)
        tokens = tokenizer.encode(pictures((96, 64), 4))
        model.set_statistics(tokens)
        rows = tokens.flatten(0, 1).double()
        assert torch.allclose(model.token_mean.double(), rows.mean(0), rtol=1e-5, atol=1e-6)
        assert torch.allclose(model.token_std.double(), rows.std(0), rtol=1e-5)
        normalized.append(model.normalized(tokens))
    assert model.token_std.unique().numel() > 32  # not one for all places of a channel
    assert torch.allclose(*normalized, atol=1e-3)


def test_tokens_that_are_packed_otherwise_are_refused(make_model):
    packed, plain = (AutoencoderTokens(autoencoder(), (16, 16), packing) for packing in (2, 1))
    model = make_model(token_channels=16, grid=(4, 4), packing=2)
    check_tokenizer(model, packed)
    with pytest.raises(ValueError, match="tokenizer: gives 8x8 tokens of 4 channels, expected 4x4 of 16"):
        check_tokenizer(model, plain)
    with pytest.raises(ValueError, match="packing: expected 2x2 latents to have the token_channels, 5, together"):
        make_model(packing=2)
    with pytest.raises(ValueError, match="packing: expected an integer of at least 1, got 0"):
        AutoencoderTokens(autoencoder(), (16, 16), 0)
    with pytest.raises(ValueError, match="image_size: expected multiples of 4 pixels, the side of a token, got 16x18"):
        AutoencoderTokens(autoencoder(), (16, 18), 2)


def test_sizes_and_models_that_do_not_fit():
    with pytest.raises(ValueError, match="image_size: expected multiples of 2 pixels, the side of a token, got 16x17"):
        AutoencoderTokens(autoencoder(), (16, 17))
    with pytest.raises(ValueError, match="config of this Linear has no latent_channels"):
        AutoencoderTokens(nn.Linear(2, 2), (16, 16))


# both


@pytest.fixture(params=["uniflow", "autoencoder"])
def tokenizer(request, tiny):
    return UniFlowTokens(tiny()) if request.param == "uniflow" else AutoencoderTokens(autoencoder(), (16, 16))


def test_it_is_frozen(tokenizer):
    tokenizer.train()
    assert not any(module.training for module in tokenizer.modules())
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    images = pictures((16, 16)).requires_grad_()
    assert not tokenizer.encode(images).requires_grad
    assert not tokenizer.decode(tokenizer.encode(images).requires_grad_()).requires_grad


def test_tokens_are_float32_whatever_autocast_says(tokenizer):
    images = pictures((16, 16))
    plain = tokenizer.encode(images)
    decoded = tokenizer.decode(plain, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), plain)
        assert torch.equal(tokenizer.decode(plain, torch.Generator().manual_seed(0)), decoded)
    tokenizer.bfloat16()
    assert tokenizer.encode(images).dtype == tokenizer.decode(plain).dtype == torch.float32
    assert torch.allclose(tokenizer.encode(images), plain, atol=0.1 * plain.abs().max().item())


def test_other_shapes_are_refused_and_none_at_all_is_fine(tokenizer):
    count, channels = tokenizer.grid[0] * tokenizer.grid[1], tokenizer.channels
    with pytest.raises(ValueError, match=r"images: expected shape \['B', 3, 16, 16\], got \[2, 3, 16, 8\]"):
        tokenizer.encode(pictures((16, 8)))
    with pytest.raises(ValueError, match=rf"tokens: expected shape \['B', {count}, {channels}\], got \[2, 3, 8\]"):
        tokenizer.decode(torch.zeros(2, 3, 8))
    tokens = tokenizer.encode(pictures((16, 16), 0))
    assert tokens.shape == (0, count, channels)
    assert tokenizer.decode(tokens).shape == (0, 3, 16, 16)


def test_the_fingerprint_tells_weights_apart_but_not_dtypes(tiny):
    for one, same, other in (
        (UniFlowTokens(tiny()), UniFlowTokens(tiny().bfloat16()), UniFlowTokens(randomize(tiny(), 1))),
        [AutoencoderTokens(model, (16, 16)) for model in (autoencoder(), autoencoder().bfloat16(), autoencoder(1))],
    ):
        assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert UniFlowTokens(tiny()).fingerprint() == fingerprint(tiny())


# folders


def test_a_folder_of_either_kind(tiny, tmp_path):
    tiny().save_pretrained(tmp_path / "uniflow")
    autoencoder().save_pretrained(tmp_path / "autoencoder")
    for name, expected, kind in (
        ("uniflow", UniFlowTokens(tiny()), UniFlowTokens),
        ("autoencoder", AutoencoderTokens(autoencoder(), (16, 16)), AutoencoderTokens),
    ):
        found = read_image_tokenizer(tmp_path / name)
        assert isinstance(found, kind)
        assert found.image_size == (16, 16)
        assert torch.equal(found.encode(pictures((16, 16))), expected.encode(pictures((16, 16))))
        assert read_image_tokenizer(tmp_path / name, (8, 24)).image_size == (8, 24)
        side = 16 // expected.grid[0]
        assert read_image_tokenizer(tmp_path / name, packing=2, grid=(1, 3)).image_size == (2 * side, 6 * side)
    assert isinstance(read_image_tokenizer(tmp_path / "uniflow").model, UniFlow)


def test_a_folder_with_a_deep_autoencoder(tmp_path):
    deep_autoencoder().save_pretrained(tmp_path)
    found = read_image_tokenizer(tmp_path, (64, 32))
    expected = AutoencoderTokens(deep_autoencoder(), (64, 32))
    assert torch.equal(found.encode(pictures((64, 32))), expected.encode(pictures((64, 32))))
    assert (
        found.fingerprint() == expected.fingerprint() != AutoencoderTokens(deep_autoencoder(1), (64, 32)).fingerprint()
    )
    assert read_image_tokenizer(tmp_path, packing=2, grid=(2, 1)).image_size == (128, 64)
    with pytest.raises(ValueError, match=r"image_size: expected height and width, which .*config.json does not say"):
        read_image_tokenizer(tmp_path)


def test_weights_that_an_autoencoder_lacks_are_not_made_up(tmp_path):
    """diffusers gives them random numbers, with a warning."""
    autoencoder().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for change, message in (
        (lambda state: state.pop("encoder.conv_in.weight"), r"missing \(1\): encoder.conv_in.weight"),
        (lambda state: state.update({"more": torch.ones(1)}), r"unexpected \(1\): more"),
        (
            lambda state: state.update({"encoder.conv_in.bias": torch.ones(9)}),
            r"of another shape \(1\): encoder.conv_in",
        ),
    ):
        changed = dict(state)
        change(changed)
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=f"does not hold this model; keys {message}"):
            read_image_tokenizer(tmp_path)
    save_file({name: tensor.half() for name, tensor in state.items()}, path)
    assert {parameter.dtype for parameter in read_image_tokenizer(tmp_path).parameters()} == {torch.float32}


def test_an_autoencoder_with_the_names_of_older_ones(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state, old = load_file(path), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for now, then in old.items():
        state = {name.replace(f".attentions.0.{now}.", f".attentions.0.{then}."): x for name, x in state.items()}
    assert sum("proj_attn" in name for name in state) == 4
    save_file(state, path)
    images = pictures((16, 16))
    expected = AutoencoderTokens(autoencoder(), (16, 16)).encode(images)
    assert torch.equal(read_image_tokenizer(tmp_path).encode(images), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": 1000}, "its config.json is of a much larger one"),
        ({"layers_per_block": 10**9}, "'layers_per_block': expected at most 1024"),
        ({"block_out_channels": [2**20, 2**20]}, "its config.json is of one of"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'quantization_config' is not supported"),
        ({"sample_size": 10**9}, "sample_size: expected an integer of at most"),
        ({"down_block_types": 3}, "holds no AutoencoderKL that diffusers can read"),
    ],
)
def test_configurations_that_an_autoencoder_may_not_have(tmp_path, changes, message):
    autoencoder().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        read_image_tokenizer(tmp_path)


def test_folders_that_hold_neither(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        read_image_tokenizer(tmp_path)
    for config, message in (
        ("[", "is not JSON"),
        ("[]", "is no configuration"),
        ('{"model_type": "vit"}', "'vit'"),
    ):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ValueError, match=message):
            read_image_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="or an AutoencoderKL or AutoencoderDC of diffusers, got 'UNet2DModel'"):
        read_image_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="holds no AutoencoderKL that diffusers can read"):
        read_image_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'uniflow-kernels\[diffusers\]'"):
        read_image_tokenizer(tmp_path)
