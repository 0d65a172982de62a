"""`uniflow encode` of data sets: the same bytes by any number of processes, stopped anywhere; reading what it wrote."""

import itertools
import json
import os
import pickle
import signal
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import GOLDEN, smooth_picture, write_shard
from tests.uniflow.test_cli import contents, fails, files, ok
from tests.uniflow.training import two
from uniflow import UniFlow, atomic, latent_set, normalize
from uniflow.cli import run
from uniflow.latent_set import LatentSet, Moments
from uniflow.latents import LatentsError
from uniflow.pictures import center_crop, open_picture, to_tensor

ENCODE = ["--checkpoint", GOLDEN, "--per-shard", 4, "--batch-size", 3]


@pytest.fixture
def class_folders(tmp_path):
    """Eleven pictures of two classes, of many sizes, and a damaged one."""
    folder = tmp_path / "pictures"
    for number in range(11):
        (folder / ("cat" if number % 3 else "dog")).mkdir(parents=True, exist_ok=True)
        picture = smooth_picture((60 + 7 * number, 90 - 3 * number), number)
        picture.save(folder / ("cat" if number % 3 else "dog") / f"{number:02}.png")
    (folder / "cat" / "05.png").write_bytes(b"no picture")
    return folder


def expected_latents(names, folder, model, flip=False):
    crops = torch.stack([to_tensor(center_crop(open_picture(folder / name), 56)) for name in names])
    with torch.inference_mode():
        return model.encode(normalize(crops.flip(-1) if flip else crops))


def test_a_folder_of_classes(capsys, class_folders, golden_model, tmp_path):
    out = tmp_path / "set"
    said = ok(capsys, "encode", class_folders, *ENCODE, "--out", out, "--flip")
    assert "latents of 10 pictures" in said
    found = LatentSet(out, golden_model)
    names = [found.name(number) for number in range(len(found))]
    everyone = sorted(path.relative_to(class_folders).as_posix() for path in class_folders.rglob("*.png"))
    assert names == [name for name in everyone if name != "cat/05.png"]
    assert found.manifest.classes == ["cat", "dog"]
    assert [found.manifest.classes[label] for label in found.labels] == [name.split("/")[0] for name in names]
    straight = torch.stack([found.latent(number) for number in range(10)])
    flipped = torch.stack([found.latent(number, flipped=True) for number in range(10)])
    assert torch.allclose(straight, expected_latents(names, class_folders, golden_model), atol=1e-5)
    assert torch.allclose(flipped, expected_latents(names, class_folders, golden_model, True), atol=1e-5)
    together = torch.cat([straight, flipped]).double().flatten(0, 1)
    assert torch.allclose(found.mean.double(), together.mean(0), atol=1e-6)
    assert torch.allclose(found.std.double(), together.std(0, correction=0), rtol=1e-6)
    assert torch.allclose(found.restored(found.standardised(straight)), straight, atol=1e-6)
    copy = pickle.loads(pickle.dumps(found))
    assert torch.equal(copy.latent(9), straight[9])
    with pytest.raises(IndexError, match="from 0 to 9, got 10"):
        found.latent(10)


def test_shards_give_what_folders_give(capsys, class_folders, tmp_path):
    """Labels beside the pictures, a picture that cannot be read, latents in bfloat16."""
    names = sorted(path.relative_to(class_folders).as_posix() for path in class_folders.rglob("*.png"))
    for shard in range(2):
        members = {}
        for number, name in enumerate(names[shard * 6 : shard * 6 + 6], shard * 6):
            members[f"{number:04}.png"] = (class_folders / name).read_bytes()
            members[f"{number:04}.cls"] = str(number % 5).encode()
        write_shard(tmp_path / f"part-{shard}.tar", members)
    ok(capsys, "encode", tmp_path / "part-{0..1}.tar", *ENCODE, "--out", tmp_path / "a", "--store", "bfloat16")
    ok(capsys, "encode", class_folders, *ENCODE, "--out", tmp_path / "b")
    of_shards, of_folders = LatentSet(tmp_path / "a"), LatentSet(tmp_path / "b")
    assert of_shards.name(0) == f"{tmp_path}/part-0.tar:0000.png"
    assert of_shards.labels.tolist() == [n % 5 for n, name in enumerate(names) if name != "cat/05.png"]
    assert of_shards.manifest.classes == []
    for number in range(10):
        assert torch.equal(of_shards.latent(number), of_folders.latent(number).bfloat16())


def dies_at(place, monkeypatch):
    """Let this process be killed while it writes the file of that number, which it then has written half."""
    written, whole = itertools.count(), atomic.replacing

    @contextmanager
    def replacing(path):
        with whole(path) as temporary:
            yield temporary
            if next(written) == place:
                temporary.write_bytes(temporary.read_bytes()[:100])
                os.kill(os.getpid(), signal.SIGKILL)

    for module in (atomic, latent_set):
        monkeypatch.setattr(module, "replacing", replacing)


def test_the_same_bytes_by_two_processes_that_are_killed_twice(capsys, class_folders, tmp_path, monkeypatch):
    """First amid shards, then when all but the statistics is there; one process alone makes the same."""
    arguments = [str(each) for each in ("encode", class_folders, *ENCODE, "--per-shard", 2, "--flip", "--out")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ok(capsys, *arguments, tmp_path / "one")
    torch.set_num_threads(threads)
    out = tmp_path / "two"
    # the manifest and 3 shards are written by the first process, 3 shards by the second
    for ends, left in (({0: 2, 1: 1}, 2), ({0: 2, 1: 9}, 6), ({0: 9, 1: 9}, 6)):

        def encode(ends=ends):
            dies_at(ends[int(os.environ["RANK"])], monkeypatch)
            return run([*arguments, str(out)])

        statuses = [status for _, status in two.both(encode, tmp_path)]
        assert statuses[0] == (0 if ends[0] == 9 else -signal.SIGKILL)
        assert len(list(out.glob("latents-*.safetensors"))) == left
    assert contents(out) == contents(tmp_path / "one")


def test_what_is_not_to_be_mixed(capsys, class_folders, tmp_path):
    out, arguments = tmp_path / "set", ["encode", class_folders, *ENCODE]
    ok(capsys, *arguments, "--out", out)
    before = contents(out)
    assert "holds latents of another flips; --force" in fails(capsys, *arguments, "--out", out, "--flip")
    assert "another dtype" in fails(capsys, *arguments, "--out", out, "--store", "float16")
    (class_folders / "cat" / "05.png").unlink()
    assert "another pictures, listing; --force" in fails(capsys, *arguments, "--out", out)
    assert contents(out) == before
    ok(capsys, *arguments, "--out", out, "--force")
    assert contents(out) != before
    (out / "manifest.json").unlink()
    assert "but no manifest.json; --force deletes it" in fails(capsys, *arguments, "--out", out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "set.pt"], "--out: expected a file called *.safetensors, or a folder for a data set, got set.pt"),
        (["--out", "set", "--keep-size"], "--keep-size: the latents of a set have one size"),
        (["--out", "set", "--size", 50], "--size: expected a multiple of the patch (14), got 50"),
        (["--out", "set", "--store", "int8"], "--store: expected auto, float32, bfloat16, float16, got 'int8'"),
        (["--out", "set", "--strict"], "05.png"),
        (["--out", "set", "--max-memory", "1KB"], "--max-memory: encoding a picture of 56x56 needs at least"),
        (["--out", "x.safetensors", "--flip"], "--flip: of a data set, whose --out is a folder"),
        (["--out", "set", "more.tar"], "PICTURES: expected either tar files or folders"),
    ],
)
def test_bad_options(capsys, class_folders, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert run(list(map(str, ["encode", class_folders, *ENCODE, *options]))) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("set*/latents*"))


def test_damaged_sets_are_named(capsys, class_folders, golden_model, tiny, tmp_path):
    out = tmp_path / "set"
    ok(capsys, "encode", class_folders, *ENCODE, "--out", out)
    with pytest.raises(LatentsError, match="was written by another model: "):
        LatentSet(out, tiny())
    shard, statistics = out / "latents-00001.safetensors", out / "statistics.json"
    whole, said = shard.read_bytes(), statistics.read_text()
    damages = [
        (whole[:50], said, "latents-00001.safetensors is damaged"),
        (None, said, "is not finished: latents-00001.safetensors is missing"),
        (whole, None, "is not finished: there is no statistics.json"),
        (whole, json.dumps({"mean": [1], "std": [1], "rows": [1]}), "does not fit manifest.json"),
        (whole, json.dumps({**json.loads(said), "rows": [4, 4, 2]}), "does not fit statistics.json"),
        (whole, json.dumps({**json.loads(said), "rows": None}), "statistics.json is damaged"),
    ]
    for data, text, message in damages:
        for path, content in ((shard, data), (statistics, text and text.encode())):
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
        with pytest.raises(LatentsError, match=message):
            LatentSet(out)
    statistics.write_text(said)
    save_file({**load_file(out / "latents-00000.safetensors")}, shard)
    with pytest.raises(LatentsError, match=r"is of other pictures than manifest\.json"):
        LatentSet(out)
    values = json.loads((out / "manifest.json").read_text())
    for change in ({"format": "x"}, {"per_shard": 0}, {"size": [56]}, {"dtype": "int3"}, {"tokenizer": 3}):
        (out / "manifest.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(LatentsError, match=r"is damaged|is of no set"):
            LatentSet(out)


def test_moments_add_up():
    parts = [3 + 5 * torch.randn(count, 2, 4) for count in (0, 3, 1, 8)]
    total = sum(map(Moments.of, parts[1:]), Moments.of(parts[0]))
    whole = torch.cat(parts).double().flatten(0, 1)
    assert total.count == len(whole)
    assert torch.allclose(torch.from_numpy(total.mean), whole.mean(0), rtol=1e-12)
    assert torch.allclose(torch.from_numpy(total.squares), (whole - whole.mean(0)).square().sum(0), rtol=1e-10)


def test_braces_in_names_that_are_there(capsys, tmp_path):
    folder, shard = tmp_path / "{0..3}" / "a", tmp_path / "{0..3}" / "[x]{y}.tar"
    folder.mkdir(parents=True)
    Image.new("RGB", (60, 60)).save(folder / "{z}.png")
    write_shard(shard, {"a.png": (folder / "{z}.png").read_bytes()})
    for place, given in enumerate((folder.parent, shard)):
        ok(capsys, "encode", given, *ENCODE, "--out", tmp_path / str(place))
    assert LatentSet(tmp_path / "0").name(0) == "a/{z}.png"
    assert LatentSet(tmp_path / "1").name(0) == f"{shard}:a.png"


def test_pictures_of_equal_names(capsys, tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        Image.new("RGB", (60, 60)).save(tmp_path / folder / "x.png")
    pictures = tmp_path / "a", tmp_path / "b"
    assert "have one name; give the folder above" in fails(
        capsys, "encode", *pictures, *ENCODE, "--out", tmp_path / "s"
    )


def test_weights_that_are_not_finite(capsys, class_folders, tmp_path, golden_folder):
    model = UniFlow.from_pretrained(golden_folder)
    torch.nn.init.constant_(model.chal_proj.c_proj.bias, 1e30)
    model.save_pretrained(tmp_path / "model")
    arguments = ["encode", class_folders, "--checkpoint", tmp_path / "model", "--out", tmp_path / "set"]
    ok(capsys, *arguments)
    assert run(list(map(str, [*arguments, "--store", "float16", "--force"]))) == 2
    assert "latents are not finite" in capsys.readouterr().err.splitlines()[-1]
    assert files(tmp_path / "set") == ["manifest.json"]
