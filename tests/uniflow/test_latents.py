import pytest
import torch
from safetensors.torch import save_file

from uniflow.latents import EncodedPicture, LatentsError, fingerprint, read_latents, write_latents
from uniflow.model import UniFlow


@pytest.fixture
def written(tiny, tmp_path):
    model = tiny()
    latents = [torch.randn(16, 8), torch.randn(6, 8).bfloat16()]
    pictures = [EncodedPicture("a.png", 16, 16), EncodedPicture("more/b.png", 8, 12)]
    path = tmp_path / "latents.safetensors"
    write_latents(path, latents, pictures, model)
    return path, latents, pictures, model


def test_round_trip(written):
    path, latents, pictures, model = written
    read, names = read_latents(path, model)
    assert names == pictures
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(read, latents, strict=True))


def test_another_model_is_refused(written, tiny):
    path, _, _, model = written
    with pytest.raises(LatentsError, match=r"another model: num_decoder_layers 2 not 3"):
        read_latents(path, tiny(num_decoder_layers=3))
    with torch.no_grad():
        model.chal_unproj.c_fc.bias[0] += 1
    with pytest.raises(LatentsError, match="same shape with other weights"):
        read_latents(path, model)


def test_the_same_model_in_another_dtype_or_with_other_defaults_is_not_refused(written, tiny):
    path, _, pictures, model = written
    assert fingerprint(model) == fingerprint(model.bfloat16())
    model.config.num_sampling_steps = 50
    assert read_latents(path, model)[1] == pictures


def test_other_files_are_refused(written, tmp_path):
    path, _, _, model = written
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(LatentsError, match="holds no UniFlow latents"):
        read_latents(tmp_path / "other.safetensors", model)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LatentsError, match="is damaged"):
        read_latents(path, model)
    with pytest.raises(FileNotFoundError):
        read_latents(tmp_path / "none", model)


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png"])
def test_names_outside_the_output_folder_are_refused(tiny, tmp_path, name):
    model = tiny()
    write_latents(tmp_path / "l", [torch.zeros(16, 8)], [EncodedPicture(name, 16, 16)], model)
    with pytest.raises(LatentsError, match="outside the output folder"):
        read_latents(tmp_path / "l", model)


@pytest.mark.parametrize(
    ("latent", "size"),
    [
        (torch.zeros(16, 8), (16, 20)),
        (torch.zeros(16, 8), (15, 16)),
        (torch.zeros(16, 8), (16, None)),
        (torch.zeros(16, 9), (16, 16)),
        (torch.zeros(16, 8, dtype=torch.int32), (16, 16)),
    ],
)
def test_sizes_and_latents_that_do_not_fit_are_refused(tiny, tmp_path, latent, size):
    model = tiny()
    write_latents(tmp_path / "l", [latent], [EncodedPicture("x.png", *size)], model)
    with pytest.raises(LatentsError, match=r"is damaged: x\.png"):
        read_latents(tmp_path / "l", model)


def test_golden_fingerprint_is_stable(golden_folder):
    one, two = (fingerprint(UniFlow.from_pretrained(golden_folder)) for _ in range(2))
    assert one == two
