import json
import os
import pickle
import re
import resource
import shutil
import stat
import time
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import smooth_picture
from uniflow import CheckpointError, UniFlow
from uniflow.atomic import replacing
from uniflow.checkpoint import NotFiniteWarning
from uniflow.cli import run
from uniflow.latents import EncodedPicture, write_latents
from uniflow.normalization import normalize
from uniflow.pictures import save_picture, to_tensor

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
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
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
    with pytest.raises(CheckpointError, match="holds more than tensors") as caught:
        UniFlow.from_pretrained(folder)
    assert not (tmp_path / "boom").exists()
    assert "weights_only" not in str(caught.value)  # torch's own line advises to execute it
    assert "none of it was executed" in str(caught.value)
    if writer is torch.save:
        assert re.search(r"it asks for _?io\.open", str(caught.value))  # by the version of Python


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
    assert len(list(tmp_path.iterdir())) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_what_cannot_be_written_is_named(tmp_path, golden_model):
    with pytest.raises(OSError, match="No such file or directory") as caught, replacing(tmp_path / "none" / "a.png"):
        pass
    assert caught.value.filename == str(tmp_path / "none" / "a.png")
    long = tmp_path / ("n" * 240 + ".png")
    save_picture(torch.zeros(3, 8, 8, dtype=torch.uint8), long)
    assert list(tmp_path.iterdir()) == [long]


# what is hostile, damaged or only forgotten


def index(folder, **places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (lambda x: x.to_sparse(), "got sparse_coo, float32, on cpu"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "got strided, qint8, on cpu"),
        (lambda x: x.to("meta"), "got strided, float32, on meta"),
        (lambda x: x[:1, :1].clone().expand_as(x), "got strided, float32, on cpu"),
        (lambda x: x.to(torch.complex64), "got strided, complex64, on cpu"),
        (lambda x: x.to(torch.float8_e4m3fn), "got strided, float8_e4m3fn, on cpu"),
        (lambda x: x.long(), r"of another dtype \(1\): chal_proj.c_fc.weight \(torch.int64, expected torch.float32\)"),
        (lambda x: x.half(), r"several dtypes, .*float16 \(chal_proj.c_fc.weight\); choose one dtype for all"),
        (lambda x: [x], "expected a dictionary of tensors"),
    ],
)
def test_pickles_of_odd_tensors_are_refused(golden_folder, state, tmp_path, odd, message):
    name = "chal_proj.c_fc.weight"
    folder = save(tmp_path, golden_folder, {**state, name: odd(state[name])}, "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message) as caught:
        UniFlow.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_weights_of_several_dtypes_are_brought_to_one_on_wish(golden_folder, state, tmp_path):
    folder = save(tmp_path, golden_folder, {**state, "chal_proj.c_fc.weight": state["chal_proj.c_fc.weight"].half()})
    assert {p.dtype for p in UniFlow.from_pretrained(folder, dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_a_pickle_that_unfolds_is_not_unfolded(golden_folder, state, tmp_path):
    folder = save(tmp_path, golden_folder, {"zeros": torch.zeros(10**6)}, "pytorch_model.bin")
    with zipfile.ZipFile(folder / "pytorch_model.bin") as plain:
        parts = {entry.filename: plain.read(entry) for entry in plain.infolist()}
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in parts.items():
            packed.writestr(name, data)
    assert (folder / "pytorch_model.bin").stat().st_size < 10**5
    with pytest.raises(CheckpointError, match=r"its parts are compressed, which torch\.save never does"):
        UniFlow.from_pretrained(folder)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": 3}, "is no index of shards: expected a weight_map from keys to files"),
        ({"a": None}, "is no index of shards"),
        ({"a": [["x"]]}, "is no index of shards"),
        ({"a": "../model.safetensors"}, "names a file outside the folder"),
        ({"a": "/etc/passwd"}, "names a file outside the folder"),
        ({"a": ".."}, "expected a file, got a folder"),
        ({"a": "pipe"}, "pipe: expected a file, got a pipe or device"),
    ],
)
def test_indexes_that_lead_nowhere(golden_folder, tmp_path, places, message):
    shutil.copy(golden_folder / "config.json", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    index(tmp_path, **places)
    with pytest.raises(CheckpointError, match=message):
        UniFlow.from_pretrained(tmp_path)


def test_shards_of_pickles(golden_folder, state, tmp_path):
    save(tmp_path, golden_folder, state, "a.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(state, "a.bin")}))
    assert_same(UniFlow.from_pretrained(tmp_path), state)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_pipes_and_pointers_are_named(golden_folder, state, tmp_path, name):
    folder = save(tmp_path, golden_folder, state, name.replace("config.json", "model.safetensors"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=rf"{name}: expected a file, got a pipe or device"):
        UniFlow.from_pretrained(folder)
    (folder / name).unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer, .*`git lfs pull`"):
        UniFlow.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1024},
        {"global_blocks_depth": 1024},
        {"num_decoder_layers": 1024},
        {"hidden_size": 1 << 17, "vit_hidden_size": 1 << 17},
        {"image_size": 1 << 15, "patch_size": 1},
        {"patch_size": 1024, "image_size": 1024},
        {"num_hidden_layers": 10**9},
    ],
)
def test_a_config_larger_than_its_weights_costs_nothing(golden_folder, state, tmp_path, changes):
    """Be it possible or not: the weights are read first, and what they cannot fill is not built."""
    folder = save(tmp_path, golden_folder, state)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"does not hold this model|expected an integer of at most 1024"):
        UniFlow.from_pretrained(folder)
    assert time.perf_counter() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_weights_that_are_not_finite_are_named(golden_folder, state, tmp_path, capsys):
    state["chal_proj.c_fc.weight"][1, 2] = float("nan")
    state["decoder_pos_embed"][0, 0, 0] = float("-inf")
    folder = save(tmp_path, golden_folder, state)
    with pytest.warns(NotFiniteWarning, match=r"not finite, .*keys \(2\): chal_proj.c_fc.weight, decoder_pos_embed$"):
        UniFlow.from_pretrained(folder)
    smooth_picture((56, 56), 0).save(tmp_path / "a.png")
    arguments = ["reconstruct", tmp_path / "a.png", "--checkpoint", folder, "--out", tmp_path / "out"]
    assert run([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("uniflow: ")
    assert "decoder_pos_embed" in error
    assert "\n" not in error


def test_a_long_mismatch_says_all_kinds_in_one_line(golden_folder, state, tmp_path, capsys):
    renamed = {"module_" + name: tensor for name, tensor in state.items()}
    folder = save(tmp_path, golden_folder, {**renamed, "bad\x1b[31m": torch.zeros(1)})
    smooth_picture((56, 56), 0).save(tmp_path / "a.png")
    arguments = ["reconstruct", tmp_path / "a.png", "--checkpoint", folder, "--out", tmp_path / "out"]
    assert run([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert f"missing ({len(state)}): global_block_pos_embed, " in error
    assert f"unexpected ({len(state) + 1}): 'bad\\x1b[31m', module_" in error
    assert "\x1b" not in error


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "torch.float64"}, torch.float64),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "auto"}, torch.float32),
    ],
)
def test_dtypes_by_name_and_by_their_other_name(golden_folder, options, dtype):
    assert UniFlow.from_pretrained(golden_folder, **options).dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16, float64, got 'int8'"),
        ({"dtype": torch.int8}, "dtype: expected one of float32, .* got torch.int8"),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, "torch_dtype: expected nothing beside dtype"),
    ],
)
def test_dtypes_that_weights_cannot_have(golden_folder, options, message):
    with pytest.raises(ValueError, match=message):
        UniFlow.from_pretrained(golden_folder, **options)


def test_a_file_in_the_place_of_a_folder(golden_folder):
    with pytest.raises(NotADirectoryError, match=r"model.safetensors is a file, expected the folder with config.json"):
        UniFlow.from_pretrained(golden_folder / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no such folder: some/older/model; expected one with config.json"):
        UniFlow.from_pretrained("some/older/model")


def test_an_image_processor_does_what_the_package_does(golden_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    golden_model.save_pretrained(tmp_path)
    size = golden_model.config.image_size
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
    picture = smooth_picture((size, size), 0)
    made = torch.as_tensor(processor(picture)["pixel_values"][0])
    assert torch.allclose(made, normalize(to_tensor(picture)), atol=1e-5)

    path = tmp_path / "preprocessor_config.json"
    for wrong in ([0.5, 0.5, 0.5], [0.485, 0.456], "x", ["a", "b", "c"], None):
        path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": wrong}))
        with pytest.raises(ValueError, match=r"preprocessor_config.json: image_mean: expected ImageNet's .*, got "):
            UniFlow.from_pretrained(tmp_path)
