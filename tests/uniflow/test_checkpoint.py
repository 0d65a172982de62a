import json
import os
import pickle
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from uniflow import CheckpointError, UniFlow
from uniflow.atomic import replacing
from uniflow.latents import EncodedPicture, write_latents
from uniflow.pictures import save_picture

PICTURE = EncodedPicture("a.png", 56, 56)


def save(tmp_path, golden_folder, state, name="model.safetensors"):
    (tmp_path / "config.json").write_text((golden_folder / "config.json").read_text())
    if name.endswith(".bin"):
        torch.save(state, tmp_path / name)
    else:
        save_file(state, tmp_path / name, metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def state(golden_folder):
    return load_file(golden_folder / "model.safetensors")


def assert_same(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], tensor) and own[name].dtype == tensor.dtype for name, tensor in state.items())


def test_round_trip_writes_what_the_official_code_reads(golden_model, golden_folder, state, tmp_path):
    golden_model.save_pretrained(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "new" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    official = json.loads((golden_folder / "config.json").read_text())
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == official
    assert_same(UniFlow.from_pretrained(tmp_path / "new"), state)


def test_loaded_models_evaluate_and_can_be_trained(golden_model):
    assert not golden_model.training
    assert all(p.requires_grad and not p.is_meta for p in golden_model.parameters())


def test_the_files_dtype_is_kept_or_changed_on_wish(golden_folder, state, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    folder = save(tmp_path, golden_folder, half)
    assert_same(UniFlow.from_pretrained(folder), half)
    assert UniFlow.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32
    UniFlow.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_shards(golden_folder, state, tmp_path):
    names = list(state)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, keys in halves.items():
        save(tmp_path, golden_folder, {name: state[name] for name in keys}, shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, keys in halves.items() for name in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(UniFlow.from_pretrained(tmp_path), state)

    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-2\.safetensors, which is not there"):
        UniFlow.from_pretrained(tmp_path)
    index["weight_map"][names[0]] = "../model-1.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the folder"):
        UniFlow.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="no index of shards"):
        UniFlow.from_pretrained(tmp_path)


def test_pickled_tensors(golden_folder, state, tmp_path):
    assert_same(UniFlow.from_pretrained(save(tmp_path, golden_folder, state, "pytorch_model.bin")), state)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickled_code_is_never_executed(golden_folder, state, tmp_path, writer):
    folder = save(tmp_path, golden_folder, state)
    (folder / "model.safetensors").unlink()
    writer({**state, "chal_proj.c_fc.bias": Bomb(tmp_path / "boom")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        UniFlow.from_pretrained(folder)
    assert not (tmp_path / "boom").exists()


def test_every_wrong_key_is_named_in_one_error(golden_folder, state, tmp_path):
    del state["chal_proj.c_fc.bias"], state["encoder.layers.2.ls1"]
    state["chal_unproj.c_fc.weight"] = torch.zeros(64, 9)
    state["head.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        UniFlow.from_pretrained(save(tmp_path, golden_folder, state))
    message = str(caught.value)
    assert "missing (2): encoder.layers.2.ls1, chal_proj.c_fc.bias" in message
    assert "unexpected (1): head.weight" in message
    assert "of another shape (1): chal_unproj.c_fc.weight ([64, 9], expected [64, 8])" in message


def test_damaged_and_missing_files(golden_folder, state, tmp_path):
    folder = save(tmp_path, golden_folder, state)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged"):
        UniFlow.from_pretrained(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no weights in"):
        UniFlow.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        UniFlow.from_pretrained(tmp_path / "nowhere")
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors"):
        UniFlow.from_pretrained(folder)


def test_a_failed_write_leaves_the_old_checkpoint(golden_model, tmp_path, monkeypatch):
    golden_model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("uniflow.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        golden_model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_non_contiguous_parameters_are_written(golden_model, tmp_path):
    golden_model.to(memory_format=torch.channels_last)
    golden_model.save_pretrained(tmp_path)
    assert_same(UniFlow.from_pretrained(tmp_path), golden_model.state_dict())


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_mode_that_the_umask_leaves(tmp_path, golden_model, umask):
    """Of every writer: safetensors' own files can be read by their owner alone."""
    before = os.umask(umask)
    try:
        golden_model.save_pretrained(tmp_path)
        write_latents(tmp_path / "latents.safetensors", [torch.zeros(16, 8)], [PICTURE], golden_model)
        save_picture(torch.zeros(3, 8, 8, dtype=torch.uint8), tmp_path / "a.png")
    finally:
        os.umask(before)
    assert len(list(tmp_path.iterdir())) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_what_cannot_be_written_is_named(tmp_path, golden_model):
    with pytest.raises(OSError, match="No such file or directory") as caught, replacing(tmp_path / "none" / "a.png"):
        pass
    assert caught.value.filename == str(tmp_path / "none" / "a.png")
    long = tmp_path / ("n" * 240 + ".png")
    save_picture(torch.zeros(3, 8, 8, dtype=torch.uint8), long)
    assert list(tmp_path.iterdir()) == [long]
