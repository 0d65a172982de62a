"""`uniflow probe` as a person uses it: the table, what is kept, who the teacher is, processes."""

import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import smooth_picture
from tests.uniflow.test_cli import fails, ok
from tests.uniflow.training import two
from uniflow import UniFlow, normalize
from uniflow.cli import main, run
from uniflow.cli.files import picture_files
from uniflow.evaluation import Labelled, PooledLayers, feature_set, linear_accuracy, neighbour_accuracy
from uniflow.evaluation.probing import split_by_class
from uniflow.pictures import center_crop, open_picture, to_tensor

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

CLASSES = ("dark", "light", "mixed")


@pytest.fixture
def folder(tmp_path):
    """Three classes of ten pictures, which differ in their noise and, a little, in their colours."""
    for number, name in enumerate(CLASSES):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(10):
            picture = smooth_picture((20 + i, 24), 10 * number + i)
            tinted = Image.blend(picture, Image.new("RGB", picture.size, (90 * number, 60, 60)), 0.15)
            tinted.save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def student(tiny, tmp_path):
    tiny().save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def teacher(tiny, tmp_path):
    torch.manual_seed(5)
    tiny(hidden_size=96, vit_hidden_size=96, intermediate_size=128).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def made(monkeypatch):
    """How many pictures features were made of, call by call."""
    counts = []
    plain = PooledLayers.forward

    def counted(self, images):
        counts.append(len(images))
        return plain(self, images)

    monkeypatch.setattr(PooledLayers, "forward", counted)
    return counts


def interrupted_at(count):
    """`center_crop`, during which Ctrl-C is heard once so many pictures are read."""
    read = itertools.count(1)

    def crop(picture, size):
        if next(read) == count:
            raise KeyboardInterrupt
        return center_crop(picture, size)

    return crop


@torch.inference_mode()
def by_hand(checkpoint, files, layer, size):
    pictures = torch.stack([to_tensor(center_crop(open_picture(file), size)) for file in files])
    return UniFlow.from_pretrained(checkpoint).hidden_states(normalize(pictures))[layer][:, 1:].mean(1).numpy()


def probed(capsys, *arguments):
    return [json.loads(line) for line in ok(capsys, "probe", *arguments, "--json").splitlines()]


def test_student_beside_teacher(capsys, folder, student, teacher, tmp_path):
    """A table, JSON and a plot; the numbers are those of the parts, called by hand."""
    out = ["--out", tmp_path / "new" / "out"]
    how = ["--neighbours", 3, "--c", 0.1, "--held-out", 0.3, "--seed", 7, "--size", 24, "--layers", "2"]
    printed = ok(capsys, "probe", folder, "--checkpoint", student, "--encoder", teacher, *how, *out)
    head, row, last = (line.split("\t") for line in printed.splitlines())
    assert last[0].startswith("21 pictures seen, 9 not; written to")
    files = picture_files(folder)
    labels = np.array([CLASSES.index(file.parent.name) for file in files])
    seen, unseen = split_by_class(labels, 0.3, 7)
    expected = {}
    for name, checkpoint in (("student", student), ("teacher", teacher)):
        features = by_hand(checkpoint, files, 2, 24)
        sides = Labelled(features[seen], labels[seen]), Labelled(features[unseen], labels[unseen])
        expected[f"knn_{name}"] = neighbour_accuracy(*sides, 3)
        expected[f"linear_{name}"] = linear_accuracy(*sides, 0.1)
    assert len(set(expected.values())) > 1
    written = json.loads((tmp_path / "new" / "out" / "probe.json").read_text())
    assert written["scores"] == [{"layer": 2} | {key: pytest.approx(value) for key, value in expected.items()}]
    assert dict(zip(head, row, strict=True)) == {
        "layer": "2",
        "kNN, student (%)": f"{expected['knn_student']:.2f}",
        "kNN, teacher (%)": f"{expected['knn_teacher']:.2f}",
        "linear, student (%)": f"{expected['linear_student']:.2f}",
        "linear, teacher (%)": f"{expected['linear_teacher']:.2f}",
    }
    assert (written["seen"], written["unseen"], written["settings"]["encoder"]) == (21, 9, str(teacher))
    assert Image.open(tmp_path / "new" / "out" / "probe.png").size == (1080, 432)
    again = ["probe", folder, "--checkpoint", student, *out]
    assert "--force overwrites" in fails(capsys, *again)


def test_judged_by_another_folder(capsys, folder, student, tmp_path):
    """Its classes may be fewer, and are counted by their names; without a teacher JSON has nulls."""
    shutil.copytree(folder, tmp_path / "others")
    shutil.rmtree(tmp_path / "others" / "dark")
    arguments = ["--checkpoint", student, "--neighbours", 1, "--out", tmp_path / "out", "--layers", "1,2"]
    rows = probed(capsys, folder, "--validation", tmp_path / "others", *arguments)
    assert [row["layer"] for row in rows] == [1, 2]
    assert all(row["knn_student"] == 100 and row["knn_teacher"] is None for row in rows)  # these have been seen
    (tmp_path / "others" / "mixed").rename(tmp_path / "others" / "strange")
    message = fails(capsys, "probe", folder, "--validation", tmp_path / "others", *arguments, "--force")
    assert "--validation: expected the classes of the other folder, got strange too" in message


def test_features_are_made_once_and_an_interrupted_run_goes_on(capsys, folder, student, tmp_path, made, monkeypatch):
    monkeypatch.setattr(feature_set, "PER_PART", 8)
    kept = tmp_path / "kept"
    arguments = [folder, "--checkpoint", student, "--out", tmp_path / "out", "--keep", kept, "--force"]
    first = probed(capsys, *arguments)
    assert sum(made) == 30
    made.clear()
    assert probed(capsys, *arguments, "--neighbours", 20, "--batch-size", 3) == first
    assert not made
    shutil.rmtree(kept)
    monkeypatch.setattr("uniflow.cli.probe.center_crop", interrupted_at(20))
    assert run(list(map(str, ["probe", *arguments]))) == 130
    capsys.readouterr()
    whole = sum(made)
    assert whole == len(list(kept.rglob("*.safetensors"))) * 8 > 0
    monkeypatch.setattr("uniflow.cli.probe.center_crop", center_crop)
    assert probed(capsys, *arguments) == first
    assert sum(made) == 30  # none twice
    made.clear()
    parts = sorted(kept.rglob("*.safetensors"))
    assert len(parts) == 4
    before = [part.read_bytes() for part in parts]
    parts[1].unlink()
    parts[3].unlink()
    (parts[0].parent / ".features-00001.1-ab.tmp.safetensors").write_text("of a process that was killed")
    assert probed(capsys, *arguments) == first
    assert sum(made) == 8 + 6
    assert [part.read_bytes() for part in parts] == before
    assert sorted(kept.rglob("*.safetensors")) == parts
    made.clear()
    (folder / "dark" / "0.png").touch()
    probed(capsys, *arguments)
    assert sum(made) == 30


def test_the_encoder_that_a_run_was_distilled_from(capsys, folder, student, teacher, tmp_path):
    """What its run.json says: the teacher before what the student began as; for its averages too."""
    shutil.copytree(student, student / "ema")
    settings = {"objective": {"teacher": str(teacher)}, "model": {"encoder": "elsewhere"}}
    (student / "run.json").write_text(json.dumps(settings))
    arguments = ["--validation", folder, "--c", 1e-3, "--out", tmp_path / "out", "--layers", "1", "--force"]
    for checkpoint in (student, student / "ema"):
        rows = probed(capsys, folder, "--checkpoint", checkpoint, *arguments)
        assert rows == probed(capsys, folder, "--checkpoint", checkpoint, "--encoder", teacher, *arguments)
        assert rows[0]["linear_teacher"] != rows[0]["linear_student"]
    (student / "run.json").write_text(json.dumps(settings | {"objective": {"teacher": None}}))
    assert run(list(map(str, ["probe", folder, "--checkpoint", student, *arguments]))) == 0
    said = "the checkpoint was distilled from elsewhere, which is not here: --encoder DIR compares with it"
    assert said in capsys.readouterr().err
    (student / "run.json").write_text("no")
    assert "run.json is not JSON" in fails(capsys, "probe", folder, "--checkpoint", student, *arguments)


def test_a_run_around_an_encoder_of_the_transformers_package(capsys, folder, tmp_path):
    """Its checkpoint says which folder it began with; both encoders are given another size than their own."""
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("yaml")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    encoder = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    encoder.save_pretrained(tmp_path / "dinov2")
    stage = "{steps: 1, train: all, learning_rate: 0.01, warmup_steps: 0}"
    (tmp_path / "run.yaml").write_text(f"""
model: {{encoder: {tmp_path / "dinov2"}}}
data: {{folder: {folder}}}
recipe: {{batch_size: 2, stages: [{stage}]}}
tensorboard: false
""")
    ok(capsys, "train", tmp_path / "run.yaml", "--out", tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    how = ["--validation", folder, "--size", 24, "--layers", 2, "--neighbours", 3, "--pooling", "class"]
    (row,) = probed(capsys, folder, "--checkpoint", checkpoint, *how, "--out", tmp_path / "out")
    files = picture_files(folder)
    labels = np.array([CLASSES.index(file.parent.name) for file in files])
    pictures = normalize(torch.stack([to_tensor(center_crop(open_picture(file), 24)) for file in files]))
    with torch.inference_mode():
        states = encoder(pictures, output_hidden_states=True).hidden_states
    features = Labelled(states[2][:, 0].numpy(), labels)
    assert row["linear_teacher"] == pytest.approx(linear_accuracy(features, features))
    assert row["knn_teacher"] == pytest.approx(neighbour_accuracy(features, features, 3))
    settings = json.loads((tmp_path / "out" / "probe.json").read_text())["settings"]
    assert settings["encoder"] == str(tmp_path / "dinov2")


def test_pictures_that_cannot_be_read(capsys, folder, student, tmp_path):
    (folder / "light" / "3.png").write_text("no")
    arguments = [folder, "--checkpoint", student, "--out", tmp_path / "out"]
    for _ in range(2):  # the second time the features are there
        rows = probed(capsys, *arguments, "--force")
        written = json.loads((tmp_path / "out" / "probe.json").read_text())
        assert (written["seen"] + written["unseen"], written["skipped"]) == (29, 1)
    assert "3.png is not a picture" in fails(capsys, "probe", *arguments, "--force", "--strict")
    (folder / "light" / "3.png").unlink()
    assert len(rows) == len(probed(capsys, *arguments, "--force"))


def test_processes_share_the_pictures(folder, student, tmp_path, monkeypatch):
    """One and two: the same table, and the same features to the bit."""
    monkeypatch.setattr(feature_set, "PER_PART", 8)

    def act():
        out = ["--out", tmp_path / "out", "--keep", tmp_path / f"kept-{world}", "--force", "--json"]
        with open(tmp_path / f"printed-{world}", "a") as sys.stdout:
            main([str(argument) for argument in ("probe", folder, "--checkpoint", student, *out)])

    for world in (1, 2):
        for said, status in two.both(act, tmp_path, world):
            assert status == 0, said
    one, both = (sorted((tmp_path / f"kept-{world}").rglob("*.safetensors")) for world in (1, 2))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in both]
    assert len(one) == 4
    assert (tmp_path / "printed-1").read_text() == (tmp_path / "printed-2").read_text() != ""


def test_bad_input(capsys, folder, student, tiny, tmp_path):
    tiny(num_channels=1).save_pretrained(tmp_path / "grey")
    tiny(patch_size=8).save_pretrained(tmp_path / "coarse")
    taken = tmp_path / "taken"
    taken.write_text("")
    for arguments, message in (
        (["--layers", "3"], "the student: layers: expected numbers from 1 to 2, got [3]"),
        (["--layers", "1,a"], "--layers: expected numbers as in 6,12, got '1,a'"),
        (["--pooling", "max"], "the student: pooling: expected one of mean, class, got 'max'"),
        (["--size", 17], "--size: expected a multiple of the student's patch, 4, got 17"),
        (
            ["--size", 12, "--encoder", tmp_path / "coarse"],
            "--size: expected a multiple of the teacher's patch, 8, got 12",
        ),
        (
            ["--encoder", tmp_path / "grey"],
            "the teacher: expected an encoder of pictures in colours, got one of 1 channels",
        ),
        (["--encoder", tmp_path / "none"], "no such checkpoint folder"),
        (["--held-out", 1], "--held-out: expected a number above 0 and below 1, got 1.0"),
        (["--held-out", 0.01], "should be greater or equal to the number of classes"),
        (["--neighbours", 25], "--neighbours: expected at most 24, the pictures to see, got 25"),
        (["--c", 0], "--c: expected a number above 0, got 0"),
        (["--validation", tmp_path / "none"], "no such folder"),
        (["--keep", taken / "kept"], "taken is a file, expected a folder to write to"),
    ):
        found = fails(capsys, "probe", folder, "--checkpoint", student, "--out", tmp_path / "out", *arguments)
        assert message in found, arguments
    assert not (tmp_path / "out").exists()
    for path in (folder / "dark", student):  # pictures without folders; none at all
        fails(capsys, "probe", path, "--checkpoint", student, "--out", tmp_path / "out")
    (folder / "beside.png").write_bytes((folder / "dark" / "0.png").read_bytes())
    message = "expected two folders of pictures or more, one a class, and no pictures beside"
    assert message in fails(capsys, "probe", folder, "--checkpoint", student, "--out", tmp_path / "out")
