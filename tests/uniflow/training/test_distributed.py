"""Two gloo processes make the run of one."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.uniflow.training import two
from uniflow import CheckpointError
from uniflow.cli import run
from uniflow.training.processes import Processes, joined

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process did alone ("alone"), and two together; see two.py."""
    folder = tmp_path_factory.mktemp("two")
    made, heard = two.trainer(Processes(), folder / "alone")
    (folder / "alone-0.json").write_text(json.dumps(two.results(made, heard)))
    (folder / "ends.json").write_text(json.dumps(two.both(lambda: two.main(folder), folder)))
    return folder


def read(folder, name, rank=0):
    return json.loads((folder / f"{name}-{rank}.json").read_text())


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


def same_weights(one, two):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_make_the_steps_of_one(folder, parallel):
    alone, together = read(folder, "alone"), read(folder, parallel)
    assert len(alone["losses"]) == 6
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert together["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert read(folder, parallel, 1)["losses"] == together["losses"]  # everyone's mean
    assert read(folder, parallel, 1)["norms"] == []  # the first process alone reports


def test_weights_are_those_of_one_process(folder):
    last = "checkpoints/step-00000006"
    same_weights(folder / "alone" / last, folder / "ddp" / last)
    same_weights(folder / "alone" / last / "ema", folder / "ddp" / last / "ema")
    for options, part in (([], ""), (["--ema"], "ema")):
        assert run(["gather", str(folder / "fsdp" / last), "--out", str(folder / f"gathered{part}"), *options]) == 0
        same_weights(folder / "alone" / last / part, folder / f"gathered{part}")


def test_damaged_shards_are_not_gathered(folder, capsys):
    damaged = shutil.copytree(folder / "fsdp" / "checkpoints" / "step-00000004", folder / "damaged")
    shard = next((damaged / "shards").glob("__1_*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    for options in ([], ["--ema"]):
        assert run(["gather", str(damaged), "--out", str(folder / "none"), *options]) == 2
        assert f"{damaged} is damaged: shards/{shard.name} is not as it was written" in capsys.readouterr().err
    assert not (folder / "none").exists()
    # a run without a moving average
    assert run(["gather", str(folder / "half/checkpoints/step-00000006"), "--out", str(folder / "none"), "--ema"]) == 2
    assert "does not hold ema" in capsys.readouterr().err


def test_processes_with_other_recipes_are_refused_by_all(folder):
    for rank in (0, 1):
        wrong = read(folder, "unlike", rank)
        assert wrong == "process 1 of the job has another recipe.batch_size (6, the first has 4)"


def test_two_go_on_from_one(folder):
    assert read(folder, "resumed")["losses"] == pytest.approx(read(folder, "alone")["losses"][2:], rel=1e-5)


@pytest.mark.parametrize("step", [2, 4])  # in the first stage, in the second
def test_one_goes_on_from_two(folder, step):
    made, heard = two.trainer(Processes(), folder / f"ddp-alone-{step}")
    made.resume(folder / "ddp" / "checkpoints" / f"step-{step:08}")
    assert two.results(made, heard)["losses"] == pytest.approx(read(folder, "alone")["losses"][step:], rel=1e-5)


def test_one_goes_on_from_the_shards_of_two(folder, monkeypatch):
    for name, value in two.environment(0, 1, two.free_port()).items():
        monkeypatch.setenv(name, value)
    with joined(torch.device("cpu")) as (processes, _):
        for step in (2, 4):
            made, heard = two.trainer(processes, folder / f"fsdp-alone-{step}", parallel="fsdp")
            made.resume(folder / "fsdp" / "checkpoints" / f"step-{step:08}")
            assert two.results(made, heard)["losses"] == pytest.approx(read(folder, "alone")["losses"][step:], rel=1e-5)
        half = folder / "half" / "checkpoints" / "step-00000006"
        with pytest.raises(CheckpointError, match=r"of a run in bfloat16, and .* for one in float32: say recipe.prec"):
            made.resume(half)
        made, _ = two.trainer(processes, folder / "half-alone", parallel="fsdp", precision="bfloat16")
        # averages that were not kept cannot go on
        with pytest.raises(CheckpointError, match=r"another recipe.ema_decay .0.9, was none.: it has no"):
            made.resume(half)


def test_mixed_precision(folder):
    half, whole = read(folder, "half")["losses"], read(folder, "alone")["losses"]
    assert half != whole
    assert half == pytest.approx(whole, rel=0.02)


def test_a_process_that_is_killed_ends_the_other_with_a_message(folder):
    (message, status), (_, killed) = json.loads((folder / "ends.json").read_text())
    assert killed == -signal.SIGKILL
    assert status == 1
    assert "ProcessLostError: another process of the job has ended, and so does this one; --resume auto" in message
    assert not any((folder / "killed").rglob("*.safetensors"))
