"""All that is to be done with a GPU, in one command and under nine minutes: build, test, measure, report.

Made for a machine lent for minutes, with whatever Python it has and no network. Correctness comes before speed, and
what is worth most before the rest: the tests in several processes at once, a first round of measurements without
torch.compile, a second one with it, compute-sanitizer last. Whatever is measured or fails is on the disk at once, so a
kill at any second leaves what can be read. On a machine without a GPU the same steps are gone through as a rehearsal
that checks every case and times none.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from benchmarks.results import FOLDER, ROOT, begin, default_path, load, save
from uniflow_kernels import doctor

BUDGET = 520  # seconds for everything; the command promises 540
LINGER = 2  # seconds that are waited for the end of what was killed, and for the last of what it said
GRACE = 10  # seconds between the interrupt, at which a program says what it has, and the kill
PROCESSES = 6  # of the tests; most of their time is compiling, on the host
OPTIONAL = ("pytest", "xdist", "matplotlib", "pytest_benchmark", "liger_kernel", "quack", "flash_attn", "pybind11")


@dataclass(frozen=True)
class Step:
    """A program to run.

    Args:
        name: for the log.
        command: its arguments, after the Python in use.
        seconds: its limit, if the steps before it left that much.
        reserve: seconds kept back for the steps after it.
    """

    name: str
    command: list[str]
    seconds: int
    reserve: int = 0


class Session:
    """Runs steps under one time budget, every line to the terminal and to the log at once."""

    def __init__(self, log: IO[str], began: float) -> None:
        self.log = log
        self.end = began + BUDGET

    def say(self, line: str) -> None:
        """One line to the terminal and to the log."""
        line = line.replace(f"{ROOT}{os.sep}", "")
        print(line, flush=True)
        self.log.write(line + "\n")

    def limit(self, step: Step) -> int:
        """Seconds the step may take now."""
        return int(min(step.seconds, self.end - time.monotonic() - step.reserve))

    def run(self, step: Step) -> int | None:
        """Run a step; returns its exit status, None if it was stopped at its limit or had no time to begin."""
        seconds = self.limit(step)
        if seconds < 1:
            self.say(f"== {step.name}: left out, the time is up")
            return None
        self.say(f"== {step.name}, at most {seconds} s: python {' '.join(step.command)}")
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # so that its own children end with it
        )
        ends = {signal.SIGINT: max(0.75 * seconds, seconds - GRACE), signal.SIGKILL: seconds}
        timers = [threading.Timer(after, os.killpg, (process.pid, end)) for end, after in ends.items()]
        # in a thread, and waited for so long: what left the group keeps the pipe open, and a driver that hangs keeps
        # a process that was killed
        reader = threading.Thread(target=self._copy, args=(process.stdout,), daemon=True)
        status = None
        for thread in (*timers, reader):
            thread.start()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(seconds + LINGER)
            reader.join(LINGER)
        finally:
            stopped = not timers[0].is_alive()
            for timer in timers:
                timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        ended = "stopped at its limit" if stopped else f"exit status {status}"
        self.say(f"== {step.name}: {ended} after {time.monotonic() - began:.0f} s")
        return None if stopped else status

    def _copy(self, lines: IO[str]) -> None:
        for line in lines:
            self.say(line.rstrip("\n"))


def session(cases: str, began: float, rehearse: float = 0.0) -> int:
    """Go through all steps; returns 0 if everything went well, else 1.

    Args:
        cases: names of those to measure; all if none is given.
        began: the `time.monotonic()` from which the time is counted.
        rehearse: without a GPU, the seconds for which every test is pretended to run; 0 only collects them.
    """
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(os.environ.get("OUT") or (FOLDER if on_gpu else scratch)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        file = begin("cuda" if on_gpu else "cpu")
        path = default_path(file, out)
        save(file, path)
        with path.with_suffix(".log").open("w", encoding="utf-8", buffering=1) as log:
            return _steps(Session(log, began), cases, path, on_gpu, rehearse)


def _steps(here: Session, cases: str, path: Path, on_gpu: bool, rehearse: float) -> int:
    if not on_gpu:
        here.say("no CUDA GPU here: a rehearsal; every case is checked at its small sizes, nothing is timed")
    here.say(str(doctor()))
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    here.say(f"not installed, so left out: {', '.join(missing) or 'nothing'}")
    how = [] if on_gpu else ["--pretend", str(rehearse)] if rehearse else ["--collect-only"]
    if "xdist" not in missing and how != ["--collect-only"]:
        how += ["-n", str(PROCESSES)]
    tests = Step("tests", _pytest("gpu and not sanitizer", how), 150, reserve=290)
    sanitizer = Step("compute-sanitizer", _pytest("gpu and sanitizer", how), 80, reserve=40)
    measure = ["-m", "benchmarks", "run", "--quick", "--resume", "--out", str(path)]
    measure += ["--cases", cases] if cases else []
    report = Step("report", ["-m", "benchmarks", "report", str(path), "--out", str(path.parent), "--flat"], 30)
    went_well = {
        "build": _build(here),
        "tests": _test(here, tests, missing),
        "benchmarks": _measure(here, measure, path, on_gpu),
        "compute-sanitizer": _test(here, sanitizer, missing),
        "report": here.run(report) == 0,
    }
    statuses = [entry["status"] for entry in load(path)["entries"]]
    here.say(f"{len(statuses)} sizes: " + ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses)))
    failed = [name for name, well in went_well.items() if not well]
    here.say(f"not well: {', '.join(failed)}; see above" if failed else "all went well")
    return 1 if failed else 0


def _build(here: Session) -> bool:
    if not (ROOT / "csrc").is_dir():
        here.say("== build: there is no csrc, so nothing is built")
        return True
    if shutil.which("nvcc") is None:
        here.say("== build: nvcc is not on the PATH, so the CUDA part is left out")
        return True
    return here.run(Step("build", ["setup.py", "build_ext", "--inplace"], 90, reserve=300)) == 0


def _test(here: Session, step: Step, missing: list[str]) -> bool:
    if "pytest" in missing:
        here.say(f"== {step.name}: pytest is not installed, so left out; the benchmarks check every case themselves")
        return True
    return here.run(step) in (0, 5)  # 5: there is none


def _pytest(marks: str, how: list[str]) -> list[str]:
    # the folder is named: its conftest.py then tells a failure at once, in the process that prints
    quiet = ["-q", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return ["-m", "pytest", "tests/gpu", "-m", marks, *quiet, *how]


def _measure(here: Session, command: list[str], path: Path, on_gpu: bool) -> bool:
    if on_gpu:
        plain = _benchmark(here, Step("benchmarks", [*command, "--no-compile"], 230, reserve=130), path)
        return _benchmark(here, Step("benchmarks with torch.compile", command, BUDGET, reserve=120), path) and plain
    here.say("on a GPU: all sizes of `list --device cuda --quick`, first without torch.compile, then with it")
    return _benchmark(here, Step("benchmarks", [*command, "--check"], 300, reserve=120), path)


def _benchmark(here: Session, step: Step, path: Path) -> bool:
    """Run `step`, and again if a kernel takes the process down: that costs its own size, not those after it."""
    for _ in range(5):
        minutes = max(0, here.limit(step) - 20) / 60  # it should end by itself
        status = here.run(replace(step, command=[*step.command, "--minutes", f"{minutes:.1f}"]))
        if status is None or "running" not in load(path):
            return status == 0
    return False
