"""Sharded checkpoints from elsewhere: gathered or refused in a line, and nothing in them runs."""

import json
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from uniflow import UniFlow, UniFlowConfig
from uniflow.cli import run
from uniflow.training.checkpoints import MANIFEST, _digest, write_json
from uniflow.training.shards import ShardPlanner, ShardReader

SMALL = {"image_size": 16, "hidden_size": 48, "vit_hidden_size": 48, "num_hidden_layers": 1, "num_decoder_layers": 1}


class Command:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return UniFlow(UniFlowConfig.preset("tiny", **SMALL))


def write(folder, model, **more):
    model.save_config(folder)
    with warnings.catch_warnings(action="ignore"):
        dcp.save({"model": model.state_dict(), **more}, checkpoint_id=folder / "shards", no_dist=True)
    seal(folder)
    return folder


def seal(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    write_json(folder / MANIFEST, {str(path.relative_to(folder)): _digest(path) for path in files})


def forge(folder, change):
    """Change the metadata, and the manifest with them."""
    path = folder / "shards" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(metadata) or metadata))
    seal(folder)


def gather(folder, out, capsys):
    status = run(["gather", str(folder), "--out", str(out)])
    return status, capsys.readouterr().err


def test_a_model_is_gathered_as_it_was(model, tmp_path, capsys):
    write(tmp_path / "run", model)
    assert gather(tmp_path / "run", tmp_path / "out", capsys) == (0, "")
    for name, tensor in UniFlow.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def no_storage(metadata):
    metadata.storage_data = [1]


def outside(metadata):
    for place in metadata.storage_data.values():
        place.relative_path = "../config.json"


def huge(metadata):
    entry = metadata.state_dict_metadata["model.chal_proj.c_fc.weight"]
    entry.size = torch.Size([2**40, 2**10])


def other_shape(metadata):
    entry = metadata.state_dict_metadata["model.chal_proj.c_fc.weight"]
    entry.size = torch.Size([3, 3])


def missing(metadata):
    del metadata.state_dict_metadata["model.chal_proj.c_fc.weight"]


def bytes_for_tensor(metadata):
    metadata.state_dict_metadata["model.chal_proj.c_fc.weight"] = BytesStorageMetadata()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_storage, ".metadata is damaged"),
        (lambda _: [1], ".metadata is damaged"),
        (outside, ".metadata names a file outside the folder: '../config.json'"),
        (huge, ".metadata names more numbers than its"),
        (other_shape, "of another shape (1): chal_proj.c_fc.weight ([3, 3]"),
        (missing, "keys missing (1): chal_proj.c_fc.weight"),
        (bytes_for_tensor, "keys missing (1): chal_proj.c_fc.weight"),
    ],
)
def test_forged_metadata(model, tmp_path, capsys, change, message):
    folder = write(tmp_path / "run", model)
    forge(folder, change)
    status, error = gather(folder, tmp_path / "out", capsys)
    assert status == 2
    assert message in error
    assert "\n" not in error.strip()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1000}, {"hidden_size": 1 << 17, "vit_hidden_size": 1 << 17}])
def test_a_config_larger_than_its_shards(model, tmp_path, capsys, changes):
    folder = write(tmp_path / "run", model)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    seal(folder)
    status, error = gather(folder, tmp_path / "out", capsys)
    assert status == 2
    assert "does not hold this model: its config.json is of" in error


def test_code_in_metadata_and_in_settings_is_not_run(model, tmp_path, capsys):
    """torch unpickles both as they come."""
    folder = write(tmp_path / "run", model)
    forge(folder, lambda _: Command(tmp_path / "ran"))
    status, error = gather(folder, tmp_path / "out", capsys)
    assert status == 2
    assert ".metadata is damaged or holds more than sizes: it asks for 'io.open', and none of it was executed" in error
    state = {"lr": Command(tmp_path / "ran"), "betas": (0.9, 0.95), "x": torch.zeros(2)}
    write(tmp_path / "other", model, optimizer=state)
    for name, expected in (("betas", (0.9, 0.95)), ("lr", None)):
        wanted = {"optimizer": {name: 0}}
        reader, planner = ShardReader(tmp_path / "other" / "shards"), ShardPlanner()
        if expected is None:
            with pytest.raises(dcp.api.CheckpointException):
                dcp.load(wanted, storage_reader=reader, planner=planner, no_dist=True)
        else:
            dcp.load(wanted, storage_reader=reader, planner=planner, no_dist=True)
            assert wanted["optimizer"][name] == expected
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_finite_are_not_gathered(model, tmp_path, capsys):
    with torch.no_grad():
        model.decoder_pos_embed[0, 0, 0] = float("nan")
    folder = write(tmp_path / "run", model)
    status, error = gather(folder, tmp_path / "out", capsys)
    assert status == 2
    assert "holds weights that are not finite" in error
    assert "decoder_pos_embed" in error
