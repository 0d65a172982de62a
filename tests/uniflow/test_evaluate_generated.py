"""`uniflow evaluate` of generated pictures, and of a reference alone, as a person uses it."""

import json
import sys

import numpy as np
import pytest
import torch

from tests.conftest import GOLDEN, smooth_picture
from tests.uniflow.evaluation.conftest import Colours, colours  # noqa: F401
from tests.uniflow.test_cli import fails, ok
from tests.uniflow.training import two
from uniflow.cli import main, run
from uniflow.cli.generate import MANIFEST
from uniflow.evaluation import FeatureStatistics, frechet_distance
from uniflow.evaluation.inception_score import InceptionScore
from uniflow.evaluation.manifolds import precision_recall
from uniflow.evaluation.scores import resized
from uniflow.pictures import center_crop, open_picture, to_tensor


@pytest.fixture
def generated(tmp_path):
    """Thirty-two pictures of two classes, of which one cannot be read."""
    folder = tmp_path / "generated"
    for i in range(32):
        (folder / ("cat" if i % 2 else "dog")).mkdir(parents=True, exist_ok=True)
        smooth_picture((20, 20), i).save(folder / ("cat" if i % 2 else "dog") / f"{i:02}.png")
    (folder / "cat" / "05.png").write_text("no")
    return folder


@pytest.fixture
def originals(tmp_path):
    folder = tmp_path / "originals"
    folder.mkdir()
    for i in range(20):
        smooth_picture((30 + i, 50), 100 + i).save(folder / f"{i:02}.png")
    return folder


def features(folder, fit):
    pictures = [fit(open_picture(path)) for path in sorted(folder.rglob("*.png")) if path.stat().st_size > 9]
    return torch.cat([Colours()(picture[None], return_features=True) for picture in pictures])


def statistics(of):
    made = FeatureStatistics(12)
    made.add(of)
    return made


def scores(capsys, *arguments):
    return json.loads(ok(capsys, "evaluate", *arguments, "--json").splitlines()[-1])


def test_against_a_folder(capsys, generated, originals, colours):  # noqa: F811
    """Both cropped and then resized; each number that of its definition on the features."""
    sizes = ["--size", 16, "--score-size", 12]
    found = scores(capsys, "--generated", generated, "--reference", originals, "--features", colours, *sizes)
    ours, theirs = (
        features(folder, lambda picture: resized(to_tensor(center_crop(picture, 16))[None], 12)[0])
        for folder in (generated, originals)
    )
    assert found["fid"] == pytest.approx(frechet_distance(statistics(theirs), statistics(ours)), rel=1e-6)
    expected = precision_recall(theirs, ours)
    assert (found["precision"], found["recall"]) == expected
    assert 0 < expected[0] < 1
    inception = InceptionScore(32)
    places = torch.tensor([place for place in range(32) if place != 2])  # cat/05 is the third of all
    inception.add(places, (ours[:, :5]).softmax(1))
    assert (found["inception_score"], found["inception_score_std"]) == pytest.approx(inception.result(), rel=1e-6)
    assert (found["pictures"], found["skipped"]) == (31, 1)
    assert (found["classes"], found["fewest_of_a_class"], found["most_of_a_class"]) == (2, 15, 16)


def test_a_reference_is_kept_and_read_again(capsys, generated, originals, colours, tmp_path):  # noqa: F811
    """By itself, without a checkpoint; with features, or some of them, or none, and as others write it."""
    network = ["--features", colours, "--size", 16]
    direct = scores(capsys, "--generated", generated, "--reference", originals, *network)
    kept = tmp_path / "kept.npz"
    assert f"statistics of 20 pictures in {kept}" in ok(
        capsys, "evaluate", originals, *network, "--keep-reference", kept
    )
    again = scores(capsys, "--generated", generated, "--reference", kept, *network)
    for values in (direct, again):
        values.pop("images_per_second")
    assert again == {**direct, "fid": pytest.approx(direct["fid"], rel=1e-9)}
    held = np.load(kept)
    assert (held["features"].shape, held["count"]) == ((20, 12), 20)

    ok(capsys, "evaluate", originals, *network, "--keep-reference", tmp_path / "few.npz", "--manifold", 7)
    few = np.load(tmp_path / "few.npz")["features"]
    rows = [int(np.flatnonzero((held["features"] == row).all(1))[0]) for row in few]
    assert len(rows) == 7
    assert set(np.diff(rows)) == {2, 3}  # spread over the folder

    np.savez(tmp_path / "theirs.npz", mu=held["mu"], sigma=held["sigma"])
    theirs = scores(capsys, "--generated", generated, "--reference", tmp_path / "theirs.npz", *network)
    assert theirs["fid"] == pytest.approx(direct["fid"], rel=1e-9)
    assert (theirs["precision"], theirs["recall"]) == (None, None)
    assert theirs["inception_score"] == direct["inception_score"]
    none = scores(capsys, "--generated", generated, "--reference", kept, *network, "--manifold", 0)
    assert (none["precision"], none["recall"]) == (None, None)


def test_the_table_and_the_file(capsys, generated, originals, colours, tmp_path):  # noqa: F811
    arguments = ["--generated", generated, "--reference", originals, "--features", colours, "--size", 16]
    status = run([str(each) for each in ("evaluate", *arguments, "--out", tmp_path / "scores.json")])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    head, row = (line.split("\t") for line in printed.out.splitlines())
    assert head == ["pictures", "classes", "per class", "FID", "IS", "±", "precision", "recall", "images/s"]
    written = json.loads((tmp_path / "scores.json").read_text())
    values, settings = written["scores"], written["settings"]
    assert row[:3] == ["31", "2", "15 to 16"]
    assert row[3:5] == [f"{values['fid']:.3f}", f"{values['inception_score']:.3f}"]
    assert row[6:8] == [f"{values['precision']:.4f}", f"{values['recall']:.4f}"]
    assert (settings["neighbours"], settings["splits"], settings["size"]) == (3, 10, 16)
    assert "warning: classes have from 15 to 16 pictures; the common protocol has equally many" in printed.err
    assert "FID of 31 pictures is larger than of 50000" in printed.err


def test_what_could_not_be_computed(capsys, tmp_path, colours):  # noqa: F811
    """Three pictures in no classes, by a network without probabilities."""

    class Features(torch.nn.Module):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return pictures.float().mean((2, 3))

    torch.jit.script(Features()).save(tmp_path / "features.pt")
    folder = tmp_path / "few"
    folder.mkdir()
    for i in range(3):
        smooth_picture((9, 9), i).save(folder / f"{i}.png")
    arguments = ["--generated", folder, "--reference", folder, "--features", tmp_path / "features.pt"]
    status = run([str(argument) for argument in ("evaluate", *arguments)])
    printed = capsys.readouterr()
    assert status == 0
    head, row, *notes = printed.out.splitlines()
    distance = row.split("\t")[1]
    assert row.split("\t")[:-1] == ["3", distance, *["not computed"] * 4]
    assert abs(float(distance)) < 1e-3
    assert "classes" not in head
    assert [note.split(" w")[0] for note in notes] == ["IS", "precision and recall"]
    assert "3 pictures are no more than the 3 features" in printed.err
    assert "classes" not in printed.err


def test_classes_of_what_uniflow_generate_has_drawn(capsys, originals, colours, tmp_path):  # noqa: F811
    """By the pictures' numbers: the file beside them says which classes come in turn."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    for i in range(7):
        smooth_picture((16, 16), i).save(folder / f"{i:06}.png")
    (folder / MANIFEST).write_text(json.dumps({"classes": [207, 5, 9]}))
    arguments = ["--generated", folder, "--reference", originals, "--features", colours, "--size", 16]
    found = scores(capsys, *arguments)
    assert (found["classes"], found["fewest_of_a_class"], found["most_of_a_class"]) == (3, 2, 3)
    (folder / MANIFEST).write_text(json.dumps({"classes": None}))
    assert scores(capsys, *arguments)["classes"] is None
    for manifest, name, message in (
        ({"classes": 3}, "000000.png", "classes: expected a list of them, got 3"),
        ({"classes": [1]}, "a.png", "expected pictures as 000000.png, as generation.json is there, got 'a.png'"),
    ):
        (folder / MANIFEST).write_text(json.dumps(manifest))
        (folder / "000000.png").rename(folder / name)
        with pytest.raises(AssertionError, match=message):
            ok(capsys, "evaluate", *arguments)


def test_processes_share_the_pictures(generated, originals, colours, tmp_path):  # noqa: F811
    """One and three: the same to the bit, statistics and kept features too."""

    def act():
        arguments = ["evaluate", "--generated", generated, "--reference", originals, "--size", 16, "--batch-size", 3]
        out = ["--out", tmp_path / f"{world}.json", "--keep-reference", tmp_path / f"{world}.npz", "--device", "cpu"]
        with open(tmp_path / "printed", "a") as sys.stdout:
            main([str(argument) for argument in (*arguments, "--features", colours, "--manifold", 11, *out)])

    for world in (1, 3):
        for said, status in two.both(act, tmp_path, world):
            assert status == 0, said
    found = [json.loads((tmp_path / f"{world}.json").read_text()) for world in (1, 3)]
    assert [one["settings"].pop("processes") for one in found] == [1, 3]
    assert all(one["scores"].pop("images_per_second") > 0 for one in found)
    assert found[0] == found[1]
    assert None not in found[0]["scores"].values()
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "3.npz") as three:
        assert len(one["features"]) == 11
        assert all(np.array_equal(one[name], three[name]) for name in ("mu", "sigma", "count", "features"))
    assert len((tmp_path / "printed").read_text().splitlines()) == 4  # a table each


def test_bad_input(capsys, generated, originals, colours, tmp_path):  # noqa: F811
    np.savez(tmp_path / "wide.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(12), sigma=np.eye(12), features=np.zeros((4, 3)))
    (generated / "cat" / "05.png").unlink()
    ours, network = ["--generated", generated], ["--features", colours]
    for arguments, message in (
        ([], "expected FOLDER --checkpoint, --generated --reference, or FOLDER --keep-reference"),
        ([originals], "expected FOLDER --checkpoint"),
        ([originals, *ours], "FOLDER: of no use with --generated"),
        ([*ours, "--checkpoint", GOLDEN], "--checkpoint: of no use with --generated"),
        ([*ours, "--steps", 3], "--steps: of no use with --generated"),
        ([originals, "--checkpoint", GOLDEN, "--manifold", 9], "--manifold: of no use with --checkpoint"),
        ([*ours, *network], "--generated: expected --reference too"),
        ([*ours, "--reference", originals], "--features: expected a network"),
        ([*ours, *network, "--reference", tmp_path / "none.npz"], "no such file"),
        ([*ours, *network, "--reference", tmp_path / "odd.npz"], "features: expected finite numbers [n, 12], got"),
        ([*ours, *network, "--reference", tmp_path / "wide.npz", "--keep-reference", "a.npz"], "expected a folder as"),
        (["--generated", tmp_path / "none", *network, "--reference", originals], "no such folder"),
        ([originals, "--keep-reference", tmp_path / "a.npz"], "--features: expected a network"),
        ([originals, "--keep-reference", tmp_path / "a.npz", "--out", tmp_path / "a"], "--out: of no use with"),
    ):
        assert message in fails(capsys, "evaluate", *arguments), arguments
    with pytest.raises(AssertionError, match="reference: expected statistics of 12 features, got those of 3"):
        ok(capsys, "evaluate", *ours, *network, "--reference", tmp_path / "wide.npz")  # at the first batch
