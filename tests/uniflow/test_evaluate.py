"""`uniflow evaluate` as a person uses it: sizes, files of networks and statistics, processes."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import GOLDEN, smooth_picture
from tests.uniflow.evaluation.conftest import Apart, colours  # noqa: F401
from tests.uniflow.test_cli import fails, ok
from tests.uniflow.training import two
from uniflow import UniFlow, normalize
from uniflow.cli import main
from uniflow.evaluation import FeatureNetwork, FeatureStatistics, frechet_distance
from uniflow.evaluation.scores import resized
from uniflow.evaluation.similarity import psnr, ssim
from uniflow.normalization import to_uint8
from uniflow.pictures import center_crop, open_picture, to_tensor

CHECKPOINT = ["--checkpoint", GOLDEN]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """Ten pictures, of which the fourth cannot be read."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(10):
        smooth_picture((40 + i, 50 - i), i).save(folder / f"{i}.png")
    (folder / "3.png").write_text("no")
    return folder


def scores(capsys, *arguments):
    return json.loads(ok(capsys, "evaluate", *arguments, "--json").splitlines()[-1])


def test_reconstructed_at_one_size_and_scored_at_another(capsys, folder, colours):  # noqa: F811
    side = 2 * UniFlow.from_pretrained(GOLDEN).config.image_size
    found = scores(capsys, folder, *CHECKPOINT, "--size", side, "--score-size", 20, "--features", colours)
    model = UniFlow.from_pretrained(GOLDEN)
    places = [0, 1, 2, *range(4, 10)]
    originals = torch.stack([to_tensor(center_crop(open_picture(folder / f"{i}.png"), side)) for i in places])
    seeds = torch.empty(10, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for seed in seeds:
        seed.random_(generator=generator)
    with torch.no_grad():
        made = to_uint8(model(normalize(originals), seed=seeds[places]))  # each has the noise of its place
    made, originals = resized(made, 20), resized(originals, 20)
    assert found["psnr"] == pytest.approx(psnr(made, originals).mean().item(), abs=2e-3)
    assert found["ssim"] == pytest.approx(ssim(made, originals).mean().item(), abs=1e-4)
    network, sets = FeatureNetwork(colours, CPU), []
    for images in (originals, made):
        sets.append(FeatureStatistics(12))
        sets[-1].add(network(images))
    assert found["rfid"] == pytest.approx(frechet_distance(*sets), rel=1e-3)
    assert (found["pictures"], found["skipped"], found["lpips"]) == (9, 1, None)


def test_what_a_lower_precision_costs(capsys, folder):
    plain = scores(capsys, folder, *CHECKPOINT)
    assert plain["precision"] is None
    found = scores(capsys, folder, *CHECKPOINT, "--precision", "fp8", "--batch-size", 4)
    costs = found["precision"]
    assert costs["psnr_full"] == pytest.approx(plain["psnr"], abs=1e-3)
    assert found["psnr"] != plain["psnr"]
    assert 15 < costs["psnr_beside_full"] < 60
    model = UniFlow.from_pretrained(GOLDEN)
    side, places = model.config.image_size, [0, 1, 2, *range(4, 10)]
    originals = torch.stack([to_tensor(center_crop(open_picture(folder / f"{i}.png"), side)) for i in places])
    lowered = model.at_precision("fp8")
    with torch.no_grad():
        pairs = [
            *zip(lowered.layer_states(normalize(originals)), model.layer_states(normalize(originals)), strict=True),
            (lowered.encode(normalize(originals)), model.encode(normalize(originals))),
        ]
    expected = [torch.cosine_similarity(*pair, dim=-1).mean().item() for pair in pairs]
    layers, blocks = ([f"{of} {i + 1}" for i in range(n)] for of, n in (("layer", len(pairs) - 1), ("block", 2)))
    assert [*costs["cosine"]] == [*layers, "latents", *blocks, "condition"]
    assert [*costs["cosine"].values()][: len(pairs)] == pytest.approx(expected, abs=1e-5)
    assert all(0.9 < costs["cosine"][name] < 0.99999 for name in (*blocks, "condition"))
    with torch.no_grad():
        conditions = [each.condition(each.encode(normalize(originals))) for each in (lowered, model)]
    assert costs["cosine"]["condition"] == pytest.approx(
        torch.cosine_similarity(*conditions, dim=-1).mean().item(), abs=1e-5
    )
    table = ok(capsys, "evaluate", folder, *CHECKPOINT, "--precision", "fp8")
    assert "in full precision PSNR" in table
    assert "layer 1\t" in table


def test_statistics_are_kept_and_read_again(capsys, folder, colours, tmp_path):  # noqa: F811
    features, kept = ["--features", colours], tmp_path / "kept" / "reference.npz"
    kept.parent.mkdir()
    first = scores(capsys, folder, *CHECKPOINT, *features, "--keep-reference", kept)
    again = scores(capsys, folder, *CHECKPOINT, *features, "--reference", kept)
    assert again["rfid"] == pytest.approx(first["rfid"], rel=1e-9)
    with np.load(kept) as held:
        assert held["mu"].dtype == held["sigma"].dtype == np.float64
        np.savez(tmp_path / "theirs.npz", mu=held["mu"], sigma=held["sigma"])  # as others write them
        np.savez(tmp_path / "moved.npz", mu=held["mu"] + 1, sigma=held["sigma"])
    theirs = scores(capsys, folder, *CHECKPOINT, *features, "--reference", tmp_path / "theirs.npz")
    assert theirs["rfid"] == pytest.approx(first["rfid"], rel=1e-9)
    moved = scores(capsys, folder, *CHECKPOINT, *features, "--reference", tmp_path / "moved.npz")
    assert moved["rfid"] > first["rfid"] + 1  # it is the file's statistics that count
    assert "--force overwrites" in fails(capsys, "evaluate", folder, *CHECKPOINT, *features, "--keep-reference", kept)


def test_results_as_json_beside_the_table(capsys, folder, colours, tmp_path):  # noqa: F811
    torch.jit.script(Apart()).save(tmp_path / "apart.pt")
    networks = ["--features", colours, "--lpips", tmp_path / "apart.pt"]
    printed = ok(capsys, "evaluate", folder, *CHECKPOINT, *networks, "--out", tmp_path / "scores.json")
    head, row = (line.split("\t") for line in printed.splitlines())
    assert head == ["pictures", "PSNR (dB)", "SSIM", "LPIPS", "rFID", "images/s"]
    written = json.loads((tmp_path / "scores.json").read_text())
    values, settings = written["scores"], written["settings"]
    assert row[1:5] == [
        f"{values['psnr']:.2f}",
        f"{values['ssim']:.4f}",
        f"{values['lpips']:.4f}",
        f"{values['rfid']:.3f}",
    ]
    assert values["lpips"] > 0
    assert (settings["size"], settings["score_size"], settings["steps"]) == (56, None, 1)
    assert (settings["checkpoint"], settings["features"]) == (str(GOLDEN), str(colours))


def test_processes_share_the_pictures(folder, colours, tmp_path):  # noqa: F811
    """One and three: the same to the bit, statistics too, with a block that ends early and one that is missing."""

    def act():
        arguments = ["evaluate", folder, *CHECKPOINT, "--batch-size", 2, "--device", "cpu", "--features", colours]
        out = ["--out", tmp_path / f"{world}.json", "--keep-reference", tmp_path / f"{world}.npz"]
        with open(tmp_path / "printed", "a") as sys.stdout:
            main([str(argument) for argument in (*arguments, *out)])

    for world in (1, 3):
        for said, status in two.both(act, tmp_path, world):
            assert status == 0, said
    found = [json.loads((tmp_path / f"{world}.json").read_text()) for world in (1, 3)]
    assert [one["settings"].pop("processes") for one in found] == [1, 3]
    assert all(one["scores"].pop("images_per_second") > 0 for one in found)
    assert found[0] == found[1]
    assert (found[0]["scores"]["pictures"], found[0]["scores"]["skipped"]) == (9, 1)
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "3.npz") as three:
        assert all(np.array_equal(one[name], three[name]) for name in ("mu", "sigma", "count"))
    lines = (tmp_path / "printed").read_text().splitlines()
    assert len(lines) == 4  # a table each
    assert lines[1].split("\t")[:4] == lines[3].split("\t")[:4]


def test_bad_input(capsys, folder, colours, tmp_path):  # noqa: F811
    (tmp_path / "text.pt").write_text("no")
    np.savez(tmp_path / "wide.npz", mu=np.zeros(3), sigma=np.eye(3))
    for arguments, message in (
        (["--size", 17], "--size: expected a multiple of the checkpoint's patch, 14, got 17"),
        (["--keep-size", "--score-size", 16], "--keep-size: pictures have their own sizes"),
        (["--reference", tmp_path / "wide.npz"], "--reference: statistics are of a network's features"),
        (["--features", tmp_path / "text.pt"], "text.pt: expected a program of TorchScript"),
        (["--features", colours, "--reference", tmp_path / "none.npz"], "no such file"),
        (["--out", folder], "is a folder, expected a file to write"),
    ):
        assert message in fails(capsys, "evaluate", folder, *CHECKPOINT, *arguments), arguments
    (folder / "3.png").unlink()
    networks = ["--features", colours, "--reference", tmp_path / "wide.npz"]
    with pytest.raises(AssertionError, match="reference: expected statistics of 12 features, got those of 3"):
        ok(capsys, "evaluate", folder, *CHECKPOINT, *networks)  # at the first batch


def test_no_picture_can_be_read(capsys, tmp_path):
    (tmp_path / "bad.png").write_text("no")
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    assert scores(capsys, tmp_path, *CHECKPOINT)["pictures"] == 1
    (tmp_path / "good.png").unlink()
    with pytest.raises(AssertionError, match="none of 1 pictures can be read"):
        ok(capsys, "evaluate", tmp_path, *CHECKPOINT)
