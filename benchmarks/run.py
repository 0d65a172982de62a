"""Runs cases: the check first, then the time, the forms in turn; the results are written after every size."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.case import Case, Form, Problem, Size
from benchmarks.check import Checker, apart
from benchmarks.measure import (
    GpuTimer,
    Sample,
    Trial,
    ceilings,
    interleave,
    launches,
    peak_bytes,
    rotation,
    saved_bytes,
    synchronize,
)

COMPILED = {"compile": "default", "compile max-autotune": "max-autotune-no-cudagraphs"}  # label -> torch.compile's mode


@dataclass(frozen=True)
class Plan:
    """How to run.

    Args:
        device: "cuda" or "cpu".
        quick: only the quick sizes, for a shorter time.
        compile: also against torch.compile: in a quick run where the size says so, in default mode; else everywhere.
        time: False only checks.
        deadline: no size is begun after this `time.monotonic()`.
    """

    device: str
    quick: bool = False
    compile: bool = True
    time: bool = True
    deadline: float = float("inf")

    def modes(self, size: Size) -> dict[str, str]:
        """The compiled rivals at a size."""
        if not self.time or not self.compile or (self.quick and not size.compile):
            return {}
        return {"compile": COMPILED["compile"]} if self.quick else COMPILED

    def done(self, entry: results.Entry, size: Size) -> bool:
        """Whether nothing is to be added to what is known of a size."""
        if entry["status"] == "checked":
            return not self.time
        return entry["status"] != "measured" or entry["forms"].keys() >= self.modes(size).keys()

    @property
    def seconds(self) -> float:
        """How long the forms of one size are timed."""
        return 1.5 if self.quick else 10.0


def run(cases: list[Case], plan: Plan, file: dict[str, Any], path: Path, say: Callable[[str], None]) -> None:
    """Run all sizes of `cases` that `file` does not hold yet, writing `file` to `path` after each.

    A size during which the process dies is known from the file, and left out when the file is continued.
    """
    _bury(file)
    if plan.time and "ceilings" not in file:
        file["ceilings"] = ceilings(plan.device)
        results.save(file, path)
        say(f"copy {file['ceilings']['copy'] / 1e9:.0f} GB/s, " + ", ".join(_rates(file["ceilings"]["product"])))
    for case in cases:
        for size in case.sizes(plan.device, plan.quick):
            entry: results.Entry = {"case": case.name, "size": size.values}
            known = _find(file, entry)
            if known is not None and plan.done(known, size):
                continue
            if time.monotonic() > plan.deadline:
                say(f"{results.title(entry)}: left out, the time is up")
                continue
            file["running"] = entry
            results.save(file, path)
            entry = {**entry, **_measure(case, size, plan)}
            _replace(file, known, entry)
            del file["running"]
            results.save(file, path)
            say(summary(entry))


def summary(entry: results.Entry) -> str:
    """One line about an entry."""
    parts = [f"{results.title(entry)}: {entry['status']}"]
    if "why" in entry:
        parts.append(entry["why"])
    for label, form in entry["forms"].items():
        clocks = [f"{name} {results.milliseconds(form[name]):.4g}" for name in ("forward", "both") if name in form]
        parts.append(f"{label} {', '.join(clocks) or form.get('why', '')}")
    return " | ".join(parts)


def _rates(products: dict[str, float]) -> list[str]:
    return [f"{dtype} product {rate / 1e12:.2f} TFLOP/s" for dtype, rate in products.items()]


def _find(file: dict[str, Any], entry: results.Entry) -> results.Entry | None:
    return next((known for known in file["entries"] if results.key(known) == results.key(entry)), None)


def _replace(file: dict[str, Any], known: results.Entry | None, entry: results.Entry) -> None:
    if known is None:
        file["entries"].append(entry)
    else:
        file["entries"][file["entries"].index(known)] = entry


def _bury(file: dict[str, Any]) -> None:
    """Note the size during which an earlier process died; what was measured of it before is kept."""
    died = file.pop("running", None)
    if died is None:
        return
    why = "the process ended while this was measured"
    known = _find(file, died)
    if known is None:
        file["entries"].append(
            {**died, "status": "died", "why": why, "forms": {label: {"why": why} for label in COMPILED}}
        )
    else:
        known["forms"].update({label: {"why": why} for label in COMPILED})


def _measure(case: Case, size: Size, plan: Plan) -> results.Entry:
    # compiled code of earlier sizes would count towards the limit of recompilations, past which it falls back to eager
    if plan.modes(size):
        torch.compiler.reset()
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    try:
        entry, candidates, slack = _check(case.check_problem(plan.device, size.values))
        if entry["status"] == "wrong" or not plan.time:
            return entry
        problem = case.problem(plan.device, size.values)
        for label, why in apart(problem, candidates, slack).items():
            if label == "ours":
                return entry | {"status": "wrong", "why": why}
            entry["forms"][label] = {"why": f"wrong: {why}"}
            del candidates[label]
        work = {"forward": problem.forward} | ({"backward": problem.backward} if problem.backward else {})
        return entry | {
            "status": "measured",
            "tokens": problem.tokens,
            "work": {name: asdict(part) for name, part in work.items()},
            "forms": entry["forms"] | _time(problem, candidates, plan, plan.modes(size)),
        }
    except Exception as error:  # one size's failure must not end the run
        synchronize()  # raises if the GPU's context is lost: nothing more can be measured by this process
        return {"status": "failed", "why": results.plainly(error), "forms": {}}


def _check(problem: Problem) -> tuple[results.Entry, dict[str, Form], dict[str, float]]:
    """Check ours and the libraries' forms: what there is to say so far, the forms that may be timed, and the slack."""
    checker = Checker(problem)
    findings = {"ours": checker.findings(problem.ours)}
    forms: dict[str, Form] = {"ours": problem.ours}
    left_out: dict[str, Any] = {}
    for label, load in problem.libraries.items():
        try:
            form = load()
            findings[label] = checker.findings(form)
        except Exception as error:  # not installed, or not for this machine
            left_out[label] = {"why": results.plainly(error)}
            continue
        if findings[label][0].right:
            forms[label] = form
        else:
            left_out[label] = {"why": f"wrong: {findings[label][0]}"}
    worst = {label: asdict(found[0]) for label, found in findings.items()}
    entry: results.Entry = {"status": "checked", "check": worst, "forms": left_out}
    wrong = [str(finding) for finding in findings["ours"] if not finding.right]
    if wrong:
        entry |= {"status": "wrong", "why": f"{len(wrong)} wrong, the worst {wrong[0]}"}
    return entry, forms, checker.slack()


def _time(problem: Problem, candidates: dict[str, Form], plan: Plan, modes: dict[str, str]) -> dict[str, Any]:
    forms = {**candidates, "plain": problem.plain}
    for label, mode in modes.items():
        # nn.Modules are arguments here, so their parameters stay the ones all forms share
        compile = partial(torch.compile, mode=mode, dynamic=False)
        forms[label] = problem.compiled(compile) if problem.compiled else compile(problem.plain)
    measured: dict[str, Any] = {}
    samplers: dict[str, list[Callable[[], Sample]]] = {}
    pool = torch.cuda.graph_pool_handle() if plan.device == "cuda" else None
    for label, form in forms.items():
        try:
            trial = Trial(form, problem.inputs)
            found = _memory(trial)
            clocks: list[Callable[[], Sample]] = [trial.wall]
            if plan.device == "cuda":
                timer = GpuTimer(rotation(form, problem.inputs, trial.wall()["forward", "wall_ms"]), pool)
                clocks.append(timer)
                if timer.why_no_graph:
                    found["why no graph"] = results.plainly(timer.why_no_graph)
                    pool = torch.cuda.graph_pool_handle()  # a failed capture may have spoilt the other
        except Exception as error:  # a rival that does not run here is named; ours must
            if label == "ours":
                raise
            measured[label] = {"why": results.plainly(error)}
        else:
            measured[label], samplers[label] = found, clocks
    for label, passes in interleave(samplers, plan.seconds).items():
        for name, times in passes.items():
            measured[label].setdefault(name, {}).update(times)
    return measured


def _memory(trial: Trial) -> dict[str, Any]:
    """All that is no time: peak memory and launches of each pass, bytes saved for the backward pass."""
    found: dict[str, Any] = {}
    for name, call in trial.passes().items():
        found[name] = {"peak_bytes": peak_bytes(call)}
        if torch.cuda.is_available():
            found[name]["launches"] = launches(call)
    if trial.leaves:
        found["saved_bytes"] = saved_bytes(trial)
    return found
