"""Results files: JSON with the machine, its software, the commit, and the quartiles of every set of samples."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment
from uniflow.atomic import replacing
from uniflow_kernels import doctor

SCHEMA = 1
FOLDER = Path(__file__).parent / "results"
ROOT = FOLDER.parents[1]

Entry = dict[str, Any]


class ResultsError(ValueError):
    """A results file that cannot be used; the message says why."""


def begin(device: str) -> dict[str, Any]:
    """A results file without entries, about this machine and now."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "schema": SCHEMA,
        "machine": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "environment": {**doctor().environment, **environment(), "driver": _driver() if device == "cuda" else "none"},
        "commit": _commit(),
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "entries": [],
    }


def default_path(results: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """<gpu or cpu>-<date>.json, with the time, so that no run replaces another."""
    return folder / f"{slug(results['machine'])}-{results['date'][:16].replace(':', '')}.json"


def slug(machine: str) -> str:
    """A machine's name as files have it."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def save(results: Mapping[str, Any], path: Path) -> None:
    """Write the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ResultsError: if there is none, or it is damaged, or of another schema version.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"no results file {path}: {error.strerror}") from None
    except ValueError as error:
        raise ResultsError(f"{path} is damaged: {error}") from None
    if not isinstance(results, dict) or "schema" not in results:
        raise ResultsError(f"{path} is no results file: it has no schema version")
    if results["schema"] != SCHEMA:
        raise ResultsError(f"{path} has schema version {results['schema']}, this program reads {SCHEMA}: measure again")
    missing = [key for key in ("machine", "environment", "commit", "date", "entries") if key not in results]
    if missing:
        raise ResultsError(f"{path} is damaged: it lacks {', '.join(missing)}")
    return results


def load_all(folder: Path) -> list[dict[str, Any]]:
    """All results files of a folder.

    Raises:
        ResultsError: if there are none.
    """
    # counts of an emulated GPU lie beside them, which are no measurements: benchmarks/kernels.py reads those
    files = [load(path) for path in sorted(folder.glob("*.json")) if not path.name.startswith("emulated-")]
    if not files:
        raise ResultsError(f"no results file in {folder}; make one with `python -m benchmarks run`")
    return files


def latest(files: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is known of every machine: of each case and size the newest entry, and in it as `run` the run it is of.

    So a run of some cases takes the place of these only, and one that only checked takes none. A machine's entries
    stand run after run, the newest first.
    """
    machines: dict[str, dict[tuple[Any, ...], Entry]] = {}
    for results in sorted(files, key=lambda results: results["date"], reverse=True):
        known = machines.setdefault(results["machine"], {})
        run = {name: value for name, value in results.items() if name != "entries"}
        for entry in results["entries"]:
            if key(entry) not in known or known[key(entry)]["status"] == "checked":
                known[key(entry)] = {**entry, "run": run}
    return [
        {
            "machine": machine,
            "entries": sorted(known.values(), key=lambda entry: entry["run"]["date"], reverse=True),
        }
        for machine, known in machines.items()
    ]


def key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies an entry: its case and its size."""
    return entry["case"], *sorted(entry["size"].items())


def size_text(entry: Mapping[str, Any]) -> str:
    """The size of an entry, for people."""
    return ", ".join(f"{name} {value}" for name, value in entry["size"].items())


def title(entry: Mapping[str, Any]) -> str:
    """Case and size of an entry, for people."""
    return f"{entry['case']} ({size_text(entry)})"


def milliseconds(measured: Mapping[str, Any]) -> float:
    """The median that counts of a measured pass: GPU time where there is one, else wall time."""
    return measured["gpu_ms" if "gpu_ms" in measured else "wall_ms"]["median"]


def plainly(error: BaseException) -> str:
    """An error in one line, without the machine's paths."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return re.sub(r"/[^\s'\":]*/", "", text)[:300]


def _commit() -> str:
    """The commit, marked where tracked files differ from it; "unknown" outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
