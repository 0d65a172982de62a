import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks import gpu, results
from benchmarks.__main__ import main
from tests.gpu.conftest import under_sanitizer


@pytest.fixture
def session(tmp_path):
    with (tmp_path / "log").open("w", buffering=1) as log:
        yield gpu.Session(log, time.monotonic())


def test_the_rehearsal_goes_through_every_step(tmp_path):
    """As a program, since that is how it is started; on a machine without a GPU."""
    # nothing is built: that takes a minute, and other tests are running what it would write over
    environment = {**os.environ, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"UNIFLOW_CUDA": "0", "UNIFLOW_CPU": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", "--cases", "patchify"],
        cwd=results.ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for step in (
        "rehearsal",
        "not installed",
        "build",
        "tests",
        "benchmarks",
        "compute-sanitizer",
        "report",
        "all went well",
    ):
        assert step in done.stdout
    assert str(results.ROOT) + os.sep not in done.stdout
    files = list(tmp_path.iterdir())
    assert len(files) <= 8
    assert all(path.is_file() for path in files)
    (written,) = tmp_path.glob("*.json")
    assert [entry["status"] for entry in results.load(written)["entries"]] == ["checked", "checked"]
    (log,) = tmp_path.glob("*.log")
    assert log.read_text() == done.stdout


def test_a_step_is_stopped_at_its_limit_with_all_it_started(session, capsys):
    program = "import subprocess, sys; print('on', flush=True); "
    program += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert session.run(gpu.Step("sleeper", ["-c", program], 1)) is None
    out = capsys.readouterr().out
    assert "on\n" in out
    assert "stopped at its limit after 1 s" in out


def test_a_program_says_what_it_has_before_it_is_killed(session, capsys):
    program = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what there is')\ntime.sleep(60)"
    assert session.run(gpu.Step("sleeper", ["-c", program], 2)) is None
    assert "what there is\n" in capsys.readouterr().out


def test_a_failing_gpu_test_is_told_at_once_and_in_full(tmp_path):
    """With what `make gpu` says to pytest; the session is killed while the next test runs."""
    (tmp_path / "conftest.py").write_text((results.ROOT / "tests" / "gpu" / "conftest.py").read_text())
    (tmp_path / "test_two.py").write_text(
        "import os\ndef test_one():\n    assert 2 + 2 == 5\ndef test_two():\n    os._exit(9)\n"
    )
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-q", "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 9
    assert "assert (2 + 2) == 5" in done.stdout


def test_the_sanitizer_sees_every_tensors_end(tmp_path, monkeypatch):
    """As torch then keeps no memory; one that finds something fails with what it says."""
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\necho "$@" $PYTORCH_NO_CUDA_MEMORY_CACHING beyond; [ "$2" = racecheck ]\n')
    sanitizer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    under_sanitizer("racecheck", "pass")
    with pytest.raises(AssertionError, match=r"--tool memcheck --error-exitcode 9 .* -c pass 1 beyond"):
        under_sanitizer("memcheck", "pass")


def test_a_step_keeps_back_what_later_steps_need(session):
    session.end -= gpu.BUDGET - 50
    assert session.limit(gpu.Step("long", [], 400, reserve=40)) <= 10
    assert session.run(gpu.Step("late", ["-c", "print('never')"], 400, reserve=60)) is None


def test_what_keeps_the_pipe_open_or_outlives_a_kill_is_not_waited_for(session, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "LINGER", 0.2)
    apart = "import subprocess, sys; "
    apart += (
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(9)'], start_new_session=True); print('on')"
    )
    began = time.monotonic()
    assert session.run(gpu.Step("leaves another", ["-c", apart], 8)) == 0
    killpg = os.killpg
    with monkeypatch.context() as patched:  # as of a process that a driver holds
        patched.setattr(gpu.os, "killpg", lambda *_: None)
        assert session.run(gpu.Step("hangs", ["-c", "import os, time; print(os.getpid()); time.sleep(9)"], 1)) is None
    assert time.monotonic() - began < 6
    out = capsys.readouterr().out
    assert "on\n" in out
    killpg(int(next(line for line in out.splitlines() if line.isdigit())), 9)


def test_steps_that_all_hang_end_within_nine_minutes(monkeypatch, tmp_path, results_file):
    """And each has had its time, by a clock that goes on as the steps' limits say."""
    clock, given = [12.0], {}  # torch took as long to import

    def hangs(self, step):
        given[step.name] = self.limit(step)
        clock[0] += max(given[step.name], 0) + 2 * gpu.LINGER

    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(gpu.shutil, "which", str)
    monkeypatch.setattr(gpu.Session, "run", hangs)
    with (tmp_path / "log").open("w") as log:
        assert gpu._steps(gpu.Session(log, 0.0), "", results_file(), True, 0.0) == 1
    assert clock[0] < 9 * 60
    least = {
        "build": 90,
        "tests": 120,
        "benchmarks": 120,
        "benchmarks with torch.compile": 0,
        "compute-sanitizer": 60,
        "report": 20,
    }
    assert given.keys() == least.keys()
    assert all(given[name] >= seconds for name, seconds in least.items()), given


def test_a_process_that_dies_is_run_again_and_a_failure_is_not(session, results_file):
    path = results_file(runs=0)
    # dies in the middle of a size the first time, and then ends it
    program = "import json, os, pathlib, sys; p = pathlib.Path(sys.argv[1]); r = json.loads(p.read_text()); "
    program += "r['runs'] += 1; r.pop('running', 0) or r.update(running=1); p.write_text(json.dumps(r)); "
    program += "os.abort() if 'running' in r else sys.exit(int(sys.argv[2]))"
    for status in (0, 1):
        path.write_text(json.dumps(results.load(path) | {"runs": 0}))
        assert gpu._benchmark(session, gpu.Step("dies", ["-c", program, str(path), str(status)], 30), path) == (
            status == 0
        )
        assert results.load(path)["runs"] == 2


def test_an_unknown_case_is_said_before_anything_runs(capsys):
    assert main(["gpu", "--cases", "nothing"]) == 2
    assert "no case is called 'nothing'" in capsys.readouterr().err
