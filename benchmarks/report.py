"""Results as a Markdown page, plots and a short table for the README; every number comes from a results file."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import kernels
from benchmarks.host import CASE as HOST
from benchmarks.results import FOLDER, ROOT, Entry, ResultsError, latest, milliseconds, size_text, slug
from benchmarks.run import COMPILED
from uniflow.atomic import replacing

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
LABELS = {"ours": "ours", "plain": "plain PyTorch", "compile": "torch.compile", "compile max-autotune": "max-autotune"}
COLOURS = {"ours": "#0b6e4f", "plain": "#9a9a9a", "compile": "#d17a00", "compile max-autotune": "#7b4fa3"}
PASSES = ("forward", "backward", "both")
COLUMNS = ["case", "size", "pass", "ours, ms", "plain / ours", "torch.compile / ours", "max-autotune / ours"]
COLUMNS += [
    "others / ours",
    "of the floor",
    "peak MB: ours / plain",
    "saved MB: ours / plain",
    "launches: ours / plain",
]
GROWS = ("tokens", "batch", "rows")  # sizes that are a number of tokens

INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks report` from benchmarks/results: of each machine, case and size what was measured last,
run after run, the newest first. To measure on yours: `python -m benchmarks run --quick`; on a GPU, `make gpu` builds,
tests, measures and reports in nine minutes. `python -m benchmarks list` names the questions, `compare OLD NEW` says
what moved, `choices` makes the table by which the flow head takes its path on a GPU; `host` measures what calls cost in
Python, with a GPU or without.

Every function is first checked: its error against float64, outputs and gradients, may be at most twice that of plain
PyTorch in the same dtype; large sizes at a smaller one, and then against the plain form at their own. What fails is
marked wrong and never timed. Times are medians with quartiles, in ms; all
forms ran in turn in one process. A ratio is the other form's time over ours: above 1, ours is faster. On a GPU the time
is that of CUDA graph replays on inputs that are not in the cache; on a CPU it is wall time. "Plain" is eager PyTorch as
the official release writes it, on the same parameters. The floor is the larger of the bytes that must move over the
machine's copy rate and the FLOPs that must be done over its rate on a large product, both measured in the same run.
"""

HOST_TIME = """What a call costs before a GPU has anything to do, by `python -m benchmarks host`: microseconds of the
process' time, medians with quartiles, of small tensors. On a machine without a GPU Triton compiles and launches as for
an H100, on a libcuda that does nothing, and torch's own ops run on the CPU; launches are Triton's and torch's ops that
a GPU would launch."""


def write(files: list[dict[str, Any]], out: Path, flat: bool = False, readme: Path | None = None) -> None:
    """Write the page and, where matplotlib is installed, the plots.

    Args:
        files: results; of what several of a machine measured, the newest counts.
        out: the folder of benchmarks.md.
        flat: the plots beside the page, not in plots/ under it.
        readme: a Markdown file whose text between the markers becomes the summary.

    Raises:
        ResultsError: if `readme` lacks the markers.
    """
    draw = importlib.util.find_spec("matplotlib") is not None
    if not draw:
        print("matplotlib is not installed: no plots")
    machines = latest(files)
    sections = [INTRODUCTION]
    for results in machines:
        host = [entry for entry in results["entries"] if entry["case"] == HOST]
        results["entries"] = [entry for entry in results["entries"] if entry["case"] != HOST]
        plots = _plots(results, out if flat else out / "plots") if draw else []
        sections.append(_section(results, [plot.relative_to(out).as_posix() for plot in plots]))
        sections += [_host(host)] if host else []
    out.mkdir(parents=True, exist_ok=True)
    _replace(out / "benchmarks.md", "\n".join(sections))
    print(f"written: {out / 'benchmarks.md'}")
    if out == ROOT / "docs" and (counted := kernels.page(FOLDER)) is not None:
        _replace(out / "kernels.md", counted)
        print(f"written: {out / 'kernels.md'}")
    if readme is not None:
        _fill(readme, "\n".join(_summary(results) for results in machines))


def ratio(entry: Entry, label: str, name: str) -> float | None:
    """Time of form `label` over ours in a pass; None where it was not timed."""
    ours, other = entry["forms"].get("ours", {}).get(name), entry["forms"].get(label, {}).get(name)
    return milliseconds(other) / milliseconds(ours) if ours and other else None


def floor_ms(entry: Entry, name: str) -> float | None:
    """The least time a pass can take on its machine; None where no product was measured in the dtype."""
    rates, work = entry["run"].get("ceilings"), entry.get("work")
    if not rates or not work or (name != "forward" and "backward" not in work):
        return None
    parts = [work[part] for part in ("forward", "backward") if name in (part, "both")]
    product = rates["product"].get(entry["size"].get("dtype", "float32"))
    seconds = (max(part["bytes"] / rates["copy"], part["flops"] / product) if product else None for part in parts)
    return 1e3 * sum(s for s in seconds if s is not None) if product else None


# ---------------------------------------------------------------------------------------------------------------- page


def _section(results: dict[str, Any], plots: list[str]) -> str:
    lines = [f"## {results['machine']}", "", *(f"![{Path(plot).stem}]({plot})" for plot in plots), ""]
    for run, entries in _runs(results["entries"]):
        lines += [_facts(run), ""]
        if rates := run.get("ceilings"):
            products = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in rates["product"].items())
            lines += [f"Ceilings: copy {rates['copy'] / 1e9:.3g} GB/s; product {products}.", ""]
        lines += _table(COLUMNS, [row for entry in entries for row in _rows(entry)])
    return "\n".join(lines)


def _host(entries: list[Entry]) -> str:
    lines = ["### Host time", "", HOST_TIME, ""]
    for run, part in _runs(entries):
        rows = []
        for entry in part:
            call = entry["forms"]["ours"]["call"]
            times = call["host_us"]
            shown = f"{times['median']:.3g} ({times['q1']:.3g}-{times['q3']:.3g})"
            rows.append([entry["size"]["what"], entry["size"]["Triton"], shown, f"{call['launches']:g}"])
        lines += [_facts(run), "", *_table(["call", "Triton", "host, us", "launches"], rows)]
    return "\n".join(lines)


def _facts(run: dict[str, Any]) -> str:
    facts = {"measured": run["date"][:10], "commit": run["commit"], **run["environment"]}
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _runs(entries: list[Entry]) -> Iterator[tuple[dict[str, Any], list[Entry]]]:
    for _, group in groupby(entries, key=lambda entry: (entry["run"]["date"], entry["run"]["commit"])):
        part = list(group)
        yield part[0]["run"], part


def _rows(entry: Entry) -> Iterator[list[str]]:
    begin = [entry["case"], size_text(entry)]
    if entry["status"] != "measured":
        yield [*begin, "", f"**{entry['status']}** {entry.get('why', '')}".strip(), *[""] * 8]
        return
    ours, plain = entry["forms"]["ours"], entry["forms"].get("plain", {})
    for name in PASSES:
        if name not in ours:
            continue
        times = ours[name].get("gpu_ms", ours[name].get("wall_ms"))
        least = floor_ms(entry, name)
        yield [
            *begin,
            name,
            f"{times['median']:.3g} ({times['q1']:.3g}-{times['q3']:.3g})",
            *(_number(ratio(entry, label, name)) for label in ("plain", *COMPILED)),
            _others(entry, name),
            f"{least / times['median']:.0%}" if least else "",
            _pair(ours[name].get("peak_bytes"), plain.get(name, {}).get("peak_bytes"), 1e6),
            _pair(ours.get("saved_bytes"), plain.get("saved_bytes"), 1e6) if name == "both" else "",
            _pair(ours[name].get("launches"), plain.get(name, {}).get("launches"), 1),
        ]


def _others(entry: Entry, name: str) -> str:
    others = [label for label in entry["forms"] if label not in LABELS and ratio(entry, label, name)]
    return ", ".join(f"{label} {_number(ratio(entry, label, name))}" for label in others)


def _summary(results: dict[str, Any]) -> str:
    """The largest measured size of every case, one row each."""
    rows = []
    for entry in _largest(results):
        name = _whole(entry)
        ours, plain = entry["forms"]["ours"], entry["forms"].get("plain", {})
        saved = _pair(ours.get("saved_bytes"), plain.get("saved_bytes"), 1e6)
        ratios = [_number(ratio(entry, label, name)) for label in ("plain", "compile")]
        time = f"{milliseconds(ours[name]):.3g}"
        rows.append([entry["case"], size_text(entry), name, time, *ratios, _others(entry, name), saved])
    header = ["case", "size", "pass", "ours, ms", "plain / ours", "torch.compile / ours", "others / ours"]
    header.append("saved MB: ours / plain")
    runs = {
        f"torch {run['environment'].get('torch')}, {run['date'][:10]}": None for run, _ in _runs(results["entries"])
    }
    about = f"{results['machine']}, {'; '.join(runs)}"
    return "\n".join([f"{about}:", "", *_table(header, rows)])


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _pair(ours: float | None, plain: float | None, unit: float) -> str:
    return (
        " / ".join("-" if value is None else f"{value / unit:.4g}" for value in (ours, plain))
        if ours is not None
        else ""
    )


def _replace(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _fill(readme: Path, summary: str) -> None:
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if BEGIN not in text or END not in text:
        raise ResultsError(f"{readme} lacks the markers {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    _replace(readme, f"{before}{BEGIN}\n{summary}\n{END}{rest.split(END, 1)[1]}")
    print(f"filled: {readme}")


# --------------------------------------------------------------------------------------------------------------- plots


def _plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw all plots that there are numbers for; returns their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    machine = slug(results["machine"])
    drawn = []
    for name, draw in (("ratio", _draw_ratio), ("time", _draw_time), ("memory", _draw_memory), ("floor", _draw_floor)):
        figure = draw(results, plt)
        if figure is None:
            continue
        figure.suptitle(f"{TITLES[name]} ({results['machine']})")
        drawn.append(folder / f"{machine}-{name}.png")
        with replacing(drawn[-1]) as temporary:
            figure.savefig(temporary, dpi=110)
        plt.close(figure)
    return drawn


TITLES = {
    "ratio": "Time of the other form over ours, the largest size of each case: above 1, ours is faster",
    "time": "Time against tokens",
    "memory": "Memory against tokens",
    "floor": "Share of the floor reached, the largest size of each case",
}


def _draw_ratio(results: dict[str, Any], plt: Any) -> Any:
    entries = _largest(results)
    labels = [label for label in ("plain", *COMPILED) if any(ratio(e, label, _whole(e)) for e in entries)]
    values = {label: [ratio(e, label, _whole(e)) for e in entries] for label in labels}
    return _bars(plt, entries, values, "time over ours", 1.0)


def _draw_floor(results: dict[str, Any], plt: Any) -> Any:
    entries = [entry for entry in _largest(results) if floor_ms(entry, _whole(entry))]
    values = {label: [_share(entry, label) for entry in entries] for label in ("ours", "plain")}
    return _bars(plt, entries, values, "floor over time", None)


def _share(entry: Entry, label: str) -> float | None:
    name = _whole(entry)
    measured, least = entry["forms"].get(label, {}).get(name), floor_ms(entry, name)
    return least / milliseconds(measured) if measured and least else None


def _bars(plt: Any, entries: list[Entry], values: dict[str, list[float | None]], axis: str, line: float | None) -> Any:
    if not entries or not values:
        return None
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.5 * len(entries)), layout="constrained")
    height = 0.8 / len(values)
    for index, (label, numbers) in enumerate(values.items()):
        places = [row + (index - (len(values) - 1) / 2) * height for row in range(len(entries))]
        bars = axes.barh(places, [number or 0 for number in numbers], height, label=LABELS[label], color=COLOURS[label])
        axes.bar_label(bars, [_number(number) for number in numbers], padding=2, fontsize=7)
    if line is not None:
        axes.axvline(line, color="black", linewidth=0.8)
    axes.set_yticks(range(len(entries)), [f"{entry['case']}, {_whole(entry)}" for entry in entries])
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    figure.legend(loc="outside lower center", ncols=len(values), frameon=False)
    return figure


def _draw_time(results: dict[str, Any], plt: Any) -> Any:
    def read(form: dict[str, Any], name: str) -> float | None:
        return milliseconds(form[name]) if name in form else None

    return _curves(results, plt, read, "ms")


def _draw_memory(results: dict[str, Any], plt: Any) -> Any:
    def read(form: dict[str, Any], name: str) -> float | None:
        peak = form.get(name, {}).get("peak_bytes")
        return peak / 1e6 if peak else None

    return _curves(results, plt, read, "peak MB")


def _curves(results: dict[str, Any], plt: Any, read: Callable[[dict[str, Any], str], float | None], axis: str) -> Any:
    from matplotlib.ticker import LogLocator

    series = _series(results)
    if not series:
        return None
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.2 * columns, 3 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(series) :]:
        axes.set_visible(False)
    shown_forms: dict[str, Any] = {}
    for axes, (case, entries) in zip(grid.flat, series.items(), strict=False):
        name = _whole(entries[0])
        for label, shown in LABELS.items():
            points = [(entry["tokens"], read(entry["forms"].get(label, {}), name)) for entry in entries]
            points = [(tokens, value) for tokens, value in points if value is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=shown, color=COLOURS[label])
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=axis, title=f"{case}, {name}")
        axes.set_xticks(
            [entry["tokens"] for entry in entries], [str(entry["tokens"]) for entry in entries], minor=False
        )
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_yticks([], minor=True)
        shown_forms |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(shown_forms.values(), shown_forms, loc="outside lower center", ncols=len(shown_forms), frameon=False)
    return figure


def _series(results: dict[str, Any]) -> dict[str, list[Entry]]:
    """For every case the longest run of entries that differ only in the number of tokens."""
    groups: dict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for entry in results["entries"]:
        if entry["status"] == "measured":
            fixed = tuple(sorted((name, value) for name, value in entry["size"].items() if name not in GROWS))
            groups[entry["case"], fixed].append(entry)
    longest: dict[str, list[Entry]] = {}
    for (case, _), entries in groups.items():
        if len(entries) > max(1, len(longest.get(case, ()))):
            longest[case] = sorted(entries, key=lambda entry: entry["tokens"])
    return longest


def _largest(results: dict[str, Any]) -> list[Entry]:
    """Of every case the measured entry with the most tokens; of several, one that was also compiled."""
    best: dict[str, Entry] = {}
    for entry in results["entries"]:
        if entry["status"] != "measured":
            continue
        known = best.get(entry["case"])
        if known is None or _rank(entry) >= _rank(known):
            best[entry["case"]] = entry
    return list(best.values())


def _rank(entry: Entry) -> tuple[int, bool]:
    return entry["tokens"], ratio(entry, "compile", "forward") is not None


def _whole(entry: Entry) -> str:
    return "both" if "both" in entry["forms"]["ours"] else "forward"
