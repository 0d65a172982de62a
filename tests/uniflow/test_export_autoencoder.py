"""A UniFlow where diffusers expects an autoencoder: in its DiT pipeline, and as generator codes call one."""

import importlib
import shutil
import sys

import pytest
import torch
from einops import rearrange

from tests.conftest import randomize, smooth_picture
from tests.uniflow.test_cli import ok
from uniflow import denormalize, normalize
from uniflow.latent_set import STATISTICS, ChannelStatistics, LatentSet
from uniflow.latents import LatentsError
from uniflow.pictures import to_tensor

diffusers = pytest.importorskip("diffusers")

from uniflow.export.autoencoder import DiffusersAutoencoder  # noqa: E402


@pytest.fixture
def model(tiny):
    return tiny(latent_ch=4)


@pytest.fixture
def folder(model, capsys, tmp_path):
    """A set of the latents of six pictures."""
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        smooth_picture((20, 20), i).save(tmp_path / "pictures" / f"{i}.png")
    model.save_pretrained(tmp_path / "checkpoint")
    ok(capsys, "encode", tmp_path / "pictures", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "latents")
    return tmp_path / "latents"


def pictures(count=3, size=(16, 24)):
    return torch.stack([to_tensor(smooth_picture(size[::-1], i)) for i in range(count)]).float() / 127.5 - 1


def test_the_dit_pipeline_of_diffusers(model, folder, tmp_path):
    """Classes to pictures: what the pipeline makes of the same noise by itself, decoded by hand."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4
    )
    randomize(transformer)
    seen = []
    vae = DiffusersAutoencoder(model, folder, seed=3, steps=2)
    whole = vae.decode
    vae.decode = lambda z, *rest, **named: seen.append(z) or whole(z, *rest, **named)
    pipeline = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline([207, 999], generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="pt")
    assert made.images.shape == (2, 3, 16, 16)
    (latents,) = seen
    assert not torch.equal(latents[0], latents[1])
    of_set = LatentSet(folder)
    tokens = latents.flatten(2).transpose(1, 2) * of_set.std + of_set.mean
    with torch.no_grad():
        by_hand = denormalize(model.decode(tokens, steps=2, seed=3)).clamp(0, 1)
    assert torch.allclose(made.images, by_hand, atol=1e-6)
    assert made.images.std() > 0.05  # not all of it is clamped
    pipeline.save_pretrained(tmp_path / "pipeline")  # which leaves out what is no model of diffusers
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "pipeline", vae=vae)
    again.set_progress_bar_config(disable=True)
    remade = again([207, 999], generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="pt")
    assert torch.equal(remade.images, made.images)


def test_latents_have_a_variance_of_one_and_come_back(model, folder):
    vae = DiffusersAutoencoder(model, LatentSet(folder))
    of_set = LatentSet(folder)
    straight = torch.stack([of_set.latent(i) for i in range(6)])
    crops = torch.stack([to_tensor(smooth_picture((20, 20), i).resize((16, 16), 3)) for i in range(6)])
    with torch.no_grad():
        found = vae.encode(crops.float() / 127.5 - 1).latent_dist
    assert torch.allclose(found.mode().mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(found.mode().std((0, 2, 3), correction=0), torch.ones(4), atol=1e-4)
    assert torch.equal(found.sample(), found.mode())  # and not noise of a variance
    restored = vae.statistics.restored(rearrange(found.mode(), "b c h w -> b (h w) c"))
    assert torch.allclose(restored, straight, atol=1e-4)


def test_pictures_that_are_no_squares(model, folder):
    """Lines and columns stay what they are, in the model's own encoding and decoding."""
    vae, of_set = DiffusersAutoencoder(model, folder), LatentSet(folder)
    with torch.no_grad():
        z = vae.encode(pictures()).latent_dist.mode()
        tokens = model.encode(normalize((pictures() + 1) / 2))
        assert z.shape == (3, 4, 4, 6)
        assert torch.allclose(z[:, :, 1, 2], of_set.standardised(tokens[:, 8]), atol=1e-5)
        by_hand = denormalize(model.decode(tokens, seed=0, size=(16, 24))) * 2 - 1
        assert torch.allclose(vae.decode(z).sample, by_hand, atol=1e-4)
        assert torch.equal(vae(pictures()).sample, vae.decode(z, return_dict=False)[0])
        assert vae.encode(pictures(), return_dict=False)[0].mode().equal(z)


def test_noise_is_seeded(model, folder):
    """Twice the same without a generator; with one it is its own; one picture at a time the same as together."""
    vae = DiffusersAutoencoder(model, folder, steps=1)
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def decoded(generator=None):
        with torch.no_grad():
            return vae.decode(z, generator=generator).sample

    first = decoded()
    assert torch.equal(decoded(), first)
    drawn = decoded(torch.Generator().manual_seed(5))
    assert not torch.allclose(drawn, first, atol=1e-2)
    assert torch.equal(decoded(torch.Generator().manual_seed(0)), first)
    each = decoded([torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)])
    assert torch.equal(each[0], drawn[0])
    assert not torch.allclose(each[1], drawn[1], atol=1e-2)
    vae.enable_slicing()
    assert torch.allclose(decoded(), first, atol=1e-5)
    assert torch.allclose(vae.encode(pictures()).latent_dist.mode()[2:], vae.encode(pictures()[2:]).latent_dist.mode())


def test_what_pipelines_read(model, tiny, folder):
    vae = DiffusersAutoencoder(model, folder)
    config = vae.config
    assert (config.scaling_factor, config["shift_factor"], config.latents_mean) == (1.0, 0.0, None)
    assert (config.latent_channels, config.sample_size) == (4, 16)
    assert 2 ** (len(config.block_out_channels) - 1) == 4  # as pipelines make the patch of it
    plain = ChannelStatistics(torch.zeros(8), torch.ones(8))
    seven = DiffusersAutoencoder(tiny(patch_size=7, image_size=14), plain)
    assert not hasattr(seven.config, "block_out_channels")  # which would tell of a patch of 4 or 8
    half = vae.to(torch.bfloat16)
    assert (half.dtype, half.device.type) == (torch.bfloat16, "cpu")
    with torch.no_grad():
        z = half.encode(pictures().bfloat16()).latent_dist.mode()
        assert z.dtype == half.decode(z).sample.dtype == torch.bfloat16
    assert half.statistics.mean.dtype == torch.float32  # rounded, it would move all latents


def test_gradients_reach_the_latents(model, folder):
    """Of losses on pictures, for whoever tunes a generator by them."""
    z = torch.randn(1, 4, 4, 4, requires_grad=True)
    DiffusersAutoencoder(model, folder).decode(z).sample.square().sum().backward()
    assert z.grad.abs().min() > 0


def test_statistics_need_no_latents(model, folder, tmp_path):
    """Two small files are enough where pictures are made."""
    (tmp_path / "small").mkdir()
    for path in folder.glob("*.json"):
        shutil.copy(path, tmp_path / "small")
    found = DiffusersAutoencoder(model, tmp_path / "small").statistics
    assert torch.equal(found.std, LatentSet(folder).std)


def test_bad_input(model, tiny, folder, tmp_path):
    vae = DiffusersAutoencoder(model, folder)
    for error, act, message in (
        (ValueError, lambda: vae.encode(torch.zeros(1, 1, 16, 16)), r"shape \[..., 3, H, W\]"),
        (ValueError, lambda: vae.encode(torch.zeros(1, 3, 16, 18)), r"multiples of the patch \(4\), got 16x18"),
        (TypeError, lambda: vae.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), "floating point pictures"),
        (ValueError, lambda: vae.decode(torch.zeros(1, 8, 4, 4)), r"\[B, 4, h, w\], got \[1, 8, 4, 4\]"),
        (ValueError, lambda: vae.decode(torch.zeros(1, 16, 4)), r"\[B, 4, h, w\], got \[1, 16, 4\]"),
        (ValueError, lambda: vae.decode(torch.zeros(2, 4, 4, 4), generator=[torch.Generator()]), "expected 2, one a"),
        (NotImplementedError, vae.enable_tiling, "max_memory=BYTES"),
        (ValueError, lambda: DiffusersAutoencoder(model, folder, steps=0), "steps"),
        (ValueError, lambda: DiffusersAutoencoder(model, folder, seed=-1), "seed"),
        (FileNotFoundError, lambda: DiffusersAutoencoder(model, tmp_path / "none"), "none"),
        (LatentsError, lambda: DiffusersAutoencoder(tiny(), folder), "written by another model: latent_ch 4 not 8"),
        (LatentsError, lambda: DiffusersAutoencoder(tiny(), LatentSet(folder)), "latent_ch 4 not 8"),
        (ValueError, lambda: DiffusersAutoencoder(tiny(), vae.statistics), r"8 channels, got \[4\] and \[4\]"),
    ):
        with pytest.raises(error, match=message):
            act()
    (folder / STATISTICS).unlink()
    with pytest.raises(LatentsError, match=r"not finished: there is no statistics\.json"):
        DiffusersAutoencoder(model, folder)


def test_without_diffusers_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "uniflow.export.autoencoder")
    monkeypatch.setitem(sys.modules, "diffusers.configuration_utils", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'uniflow-kernels\[diffusers\]'"):
        importlib.import_module("uniflow.export.autoencoder")
