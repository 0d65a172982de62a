import dataclasses
import json

import pytest

from benchmarks import results, run
from benchmarks.__main__ import main
from benchmarks.run import Plan

QUICK = Plan("cpu", quick=True, compile=False)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(run, "ceilings", lambda device: {"copy": 1e9, "product": {"float32": 1e9}})
    monkeypatch.setattr(Plan, "seconds", 0.0)


def run_case(case, path, plan=QUICK, file=None):
    file = file or results.begin("cpu")
    run.run([case], plan, file, path, say=lambda line: None)
    return results.load(path)["entries"]


def test_a_right_form_is_timed_beside_its_rivals(make_case, tmp_path):
    def slow(layer, x):
        for _ in range(300):
            layer(x)
        return layer(x)

    first, second = run_case(make_case(plain=slow), tmp_path / "r.json")
    assert (first["size"], second["size"]) == ({"tokens": 8}, {"tokens": 32})
    assert first["status"] == "measured"
    for name in ("forward", "backward", "both"):
        times = first["forms"]["ours"][name]["wall_ms"]
        assert times["q1"] <= times["median"] <= times["q3"]
        assert times["samples"] >= 5
    slower = first["forms"]["plain"]["forward"]["wall_ms"]["median"]
    assert slower > 5 * first["forms"]["ours"]["forward"]["wall_ms"]["median"]
    assert first["forms"]["ours"]["saved_bytes"] == 8 * 16 * 4


@pytest.mark.parametrize("fault", ["output", "gradient"])
def test_a_wrong_kernel_is_reported_and_never_timed(make_case, tmp_path, monkeypatch, fault):
    def wrong(layer, x):
        out = layer(x)
        return out + 0.01 if fault == "output" else out + 0.01 * (out - out.detach())

    def never(*_):
        raise AssertionError("a wrong form was timed")

    monkeypatch.setattr(run, "_time", never)
    first, _ = run_case(make_case(ours=wrong), tmp_path / "r.json")
    assert first["status"] == "wrong"
    assert fault in first["why"]
    assert fault in first["check"]["ours"]["tensor"]
    assert "ours" not in first["forms"]


def test_a_form_that_is_wrong_only_at_the_size_that_is_timed_is_not_timed(make_case, tmp_path):
    def wrong(layer, x):
        return layer(x) + 0.01 * (len(x) > 8)

    case = dataclasses.replace(make_case(ours=wrong), check_at_most={"tokens": 8})
    first, second = run_case(case, tmp_path / "r.json")
    assert first["status"] == "measured"
    assert second["status"] == "wrong"
    assert second["why"].startswith("at the size that is timed, output 0: 1.00e-02 from the plain form")
    case = dataclasses.replace(make_case(libraries={"other": lambda: wrong}), check_at_most={"tokens": 8})
    _, second = run_case(case, tmp_path / "q.json")
    assert second["status"] == "measured"
    assert second["forms"]["other"]["why"].startswith("wrong: at the size")


def test_a_wrong_rival_is_named_and_left_out(make_case, tmp_path):
    case = make_case(libraries={"wrong": lambda: lambda layer, x: layer(x) + 1})
    first, _ = run_case(case, tmp_path / "r.json")
    assert first["status"] == "measured"
    assert first["forms"]["wrong"]["why"].startswith("wrong: output 0")
    assert "forward" in first["forms"]["plain"]


def test_a_library_that_is_missing_is_named(make_case, tmp_path):
    def load():
        raise ImportError("No module named 'nowhere'")

    first, _ = run_case(make_case(libraries={"nowhere": load}), tmp_path / "r.json")
    assert "nowhere" in first["forms"]["nowhere"]["why"]


def test_a_library_that_does_not_run_here_is_named(make_case, tmp_path):
    def load():
        return lambda layer, x: x.undefined

    first, _ = run_case(make_case(libraries={"broken": load}), tmp_path / "r.json")
    assert first["status"] == "measured"
    assert "AttributeError" in first["forms"]["broken"]["why"]


def test_a_form_that_raises_fails_alone_and_shows_no_path(make_case, tmp_path):
    def breaks(layer, x):
        if len(x) == 8:
            raise RuntimeError("cannot open /home/someone/secret/kernel.cu")
        return layer(x)

    first, second = run_case(make_case(ours=breaks), tmp_path / "r.json")
    assert (first["status"], second["status"]) == ("failed", "measured")
    assert "kernel.cu" in first["why"]
    assert "someone" not in first["why"]


def test_an_interrupted_run_leaves_what_it_had(make_case, tmp_path):
    path = tmp_path / "r.json"

    def interrupted(layer, x):
        if len(x) == 32:
            raise KeyboardInterrupt
        return layer(x)

    with pytest.raises(KeyboardInterrupt):
        run_case(make_case(ours=interrupted), path)
    file = results.load(path)
    assert [entry["status"] for entry in file["entries"]] == ["measured"]
    assert file["running"] == {"case": "product", "size": {"tokens": 32}}

    # continued, the size that took the process down is left out, and the finished one is not measured again
    kept = file["entries"][0]
    entries = run_case(make_case(), path, Plan("cpu", compile=False), file)
    assert [entry["status"] for entry in entries] == ["measured", "died", "measured"]
    assert entries[0] == kept
    assert "running" not in results.load(path)


def test_nothing_is_begun_after_the_deadline(make_case, tmp_path):
    file = results.begin("cpu")
    run.run([make_case()], Plan("cpu", quick=True, deadline=0.0), file, tmp_path / "r.json", say=lambda line: None)
    assert file["entries"] == []


def test_only_checking_times_nothing(make_case, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_time", None)
    first, _ = run_case(make_case(), tmp_path / "r.json", Plan("cpu", quick=True, time=False))
    assert first["status"] == "checked"
    assert first["check"]["ours"]


def test_a_file_names_its_machine_and_no_path(make_case, tmp_path):
    path = tmp_path / "r.json"
    run_case(make_case(), path)
    text = path.read_text()
    file = json.loads(text)
    assert file["schema"] == results.SCHEMA
    assert {"torch", "Python", "GPU", "driver", "CPU"} <= file["environment"].keys()
    assert str(tmp_path) not in text
    assert str(results.ROOT) not in text


def test_what_is_no_checkpoint_is_one_line(tmp_path, capsys):
    assert main(["precision", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("benchmarks: no such folder: ")
