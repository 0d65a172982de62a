import json

import pytest
import torch

from tests.conftest import randomize
from uniflow import normalize
from uniflow.unifluid.features import VisionFeatures

SIGLIP = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def siglip(seed=0):
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(**SIGLIP, patch_size=4, image_size=16)
    return randomize(transformers.SiglipVisionModel(config).eval(), seed)


@pytest.fixture
def images():
    return normalize(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(params=["uniflow", "siglip"])
def features(request, tiny):
    return VisionFeatures(tiny() if request.param == "uniflow" else siglip())


def test_uniflows_hidden_states_without_the_class_token(tiny, images):
    model = tiny()
    features = VisionFeatures(model)
    assert (features.width, features.image_size, features.tokens) == (64, (16, 16), 16)
    assert torch.equal(features(images), model.hidden_states(images)[-1][:, 1:])


def test_squares_of_patches_make_one_feature(images):
    """Patches (line, column) of each square of 2 x 2, in raster order, one behind the other."""
    alone, merged = VisionFeatures(siglip()), VisionFeatures(siglip(), merge=2)
    assert (merged.width, merged.tokens) == (4 * 32, 4)
    patches, squares = alone(images).view(2, 4, 4, 32), merged(images)
    for number, (line, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        of_one = [patches[:, line + a, column + b] for a in (0, 1) for b in (0, 1)]
        assert torch.equal(squares[:, number], torch.cat(of_one, -1))
    assert merged(images[:0]).shape == (0, 4, 128)
    with pytest.raises(ValueError, match="merge: expected a divisor of the 4 patches of a side, got 3"):
        VisionFeatures(siglip(), merge=3)


def test_a_folders_own_statistics_are_used(images, tmp_path):
    half = [0.5, 0.5, 0.5]
    siglip().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": half, "image_std": half}))
    assert torch.equal(VisionFeatures(tmp_path)(images), VisionFeatures(siglip(), half, half)(images))


def test_siglips_last_hidden_states(images):
    model = siglip()
    pixels = (images * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)) + torch.tensor([0.485, 0.456, 0.406]).view(
        3, 1, 1
    )
    with torch.no_grad():
        expected = model(pixel_values=2 * pixels - 1, output_hidden_states=True).hidden_states[-1]
    features = VisionFeatures(model, mean=[0.5] * 3, std=[0.5] * 3)
    assert (features.width, features.image_size, features.tokens) == (32, (16, 16), 16)
    assert torch.allclose(features(images), expected, atol=1e-4)


def test_folders_of_both(tiny, tmp_path, images):
    for name, model in (("uniflow", tiny()), ("siglip", siglip())):
        model.save_pretrained(tmp_path / name)
        read, given = VisionFeatures(tmp_path / name), VisionFeatures(model)
        assert torch.equal(read(images), given(images))
        assert read.fingerprint() == given.fingerprint()


def test_they_are_frozen(features, images):
    features.train()
    assert not any(module.training for module in features.modules())
    assert not any(parameter.requires_grad for parameter in features.parameters())
    assert not features(images.requires_grad_()).requires_grad


def test_they_are_float32_whatever_autocast_says(features, images):
    plain = features(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(images), plain)
    features.bfloat16()
    assert features(images).dtype == torch.float32


def test_a_dtype_to_compute_in(images):
    features = VisionFeatures(siglip(), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in features.parameters()} == {torch.bfloat16}
    assert features(images).dtype == torch.float32


def test_other_shapes_are_refused_and_none_at_all_is_fine(features, images):
    with pytest.raises(ValueError, match=r"images: expected shape \['B', 3, 16, 16\], got \[2, 3, 16, 12\]"):
        features(images[..., :12])
    assert features(images[:0]).shape == (0, 16, features.width)


def test_the_fingerprint_tells_weights_apart():
    one, same, other = (VisionFeatures(siglip(seed)).fingerprint() for seed in (0, 0, 1))
    assert one == same != other
