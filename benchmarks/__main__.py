"""The command: python -m benchmarks list | run | host | precision | report | compare | choices | gpu."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

try:
    import torch
except ModuleNotFoundError:
    sys.exit("benchmarks: this Python has no torch; name one that has it, as in `make gpu PYTHON=.venv/bin/python`")

from benchmarks import BEGAN, choices, gpu, report, results
from benchmarks.cases import UnknownCaseError, select
from benchmarks.compare import compare
from benchmarks.run import Plan, run


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad use."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (UnknownCaseError, results.ResultsError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:  # at a step's limit; what was measured is written
        print("benchmarks: interrupted", file=sys.stderr)
        return 130


def _list(options: argparse.Namespace) -> int:
    for case in select(options.cases):
        print(f"{case.name}: {case.question}")
        for size in case.sizes(options.device, options.quick):
            print("  " + ", ".join(f"{name}={value}" for name, value in size.values.items()))
    return 0


def _run(options: argparse.Namespace) -> int:
    cases = select(options.cases)
    if options.resume and options.out is None:
        raise results.ResultsError("--resume goes on with a file: name it with --out")
    deadline = time.monotonic() + 60 * options.minutes
    plan = Plan(_device(), options.quick, not options.no_compile, not options.check, deadline)
    file = results.begin(plan.device)
    path = options.out or results.default_path(file)
    if options.resume and path.exists():
        file = results.load(path)
    run(cases, plan, file, path, say=lambda line: print(line, flush=True))
    print(f"written: {path}")
    return 1 if any(entry["status"] in ("wrong", "failed", "died") for entry in file["entries"]) else 0


def _host(options: argparse.Namespace) -> int:
    from benchmarks import host

    asked = options.cases.split(",") if options.cases else list(host.questions())
    if unknown := sorted(set(asked) - host.questions().keys()):
        raise UnknownCaseError(f"no question {', '.join(unknown)}; there are {', '.join(host.questions())}")
    file = results.begin(_device())
    path = options.out or results.default_path({**file, "machine": f"host {file['machine']}"})
    try:
        file["entries"] = host.measure(asked, options.seconds, say=lambda line: print(line, flush=True))
    except host.stand_in.HostError as error:
        raise results.ResultsError(str(error)) from None
    results.save(file, path)
    print(f"written: {path}")
    return 0


def _precision(options: argparse.Namespace) -> int:
    from benchmarks import precision

    try:
        for line in precision.tables(options.checkpoint):
            print(line, flush=True)
    except (FileNotFoundError, ValueError) as error:  # of what is no checkpoint
        raise results.ResultsError(str(error)) from None
    return 0


def _report(options: argparse.Namespace) -> int:
    if options.files and options.out is None:
        raise results.ResultsError("--out: name a folder for a page of these files alone; docs has one of all of them")
    files = [results.load(path) for path in options.files] or results.load_all(results.FOLDER)
    report.write(files, options.out or results.ROOT / "docs", options.flat, options.readme)
    return 0


def _compare(options: argparse.Namespace) -> int:
    for line in compare(results.load(options.old), results.load(options.new)):
        print(line)
    return 0


def _choices(options: argparse.Namespace) -> int:
    count = choices.write(
        [results.load(path) for path in options.files] or results.load_all(results.FOLDER), options.out
    )
    print(f"{count} sizes written: {options.out}")
    return 0


def _gpu(options: argparse.Namespace) -> int:
    select(options.cases)  # a wrong name is said now, not minutes later
    return gpu.session(options.cases, BEGAN, options.rehearse)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)

    cases = argparse.ArgumentParser(add_help=False)
    cases.add_argument("--cases", default="", metavar="A,B", help="only these; all if not given")
    quick = argparse.ArgumentParser(add_help=False)
    quick.add_argument("--quick", action="store_true", help="only some sizes, for a shorter time")

    command = commands.add_parser("list", parents=[cases, quick], help="the questions and their sizes")
    command.add_argument("--device", choices=["cpu", "cuda"], default=_device())
    command.set_defaults(command=_list)

    command = commands.add_parser("run", parents=[cases, quick], help="check and time")
    command.add_argument(
        "--out", type=Path, metavar="JSON", help="by default benchmarks/results/<gpu or cpu>-<date>.json"
    )
    command.add_argument("--resume", action="store_true", help="go on with the file given as --out")
    command.add_argument("--check", action="store_true", help="only check, time nothing")
    command.add_argument("--no-compile", action="store_true", help="leave torch.compile out: compiling takes long")
    command.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after this long")
    command.set_defaults(command=_run)

    command = commands.add_parser("host", help="what calls cost before a GPU has anything to do; needs none")
    command.add_argument("--cases", default="", metavar="A,B", help="only these questions; all if not given")
    command.add_argument(
        "--out", type=Path, metavar="JSON", help="by default benchmarks/results/host-<...>-<date>.json"
    )
    command.add_argument("--seconds", type=float, default=1.0, help="how long each call is timed, by default 1")
    command.set_defaults(command=_host)

    command = commands.add_parser("precision", help="what fp8 loses; needs no GPU")
    command.add_argument("checkpoint", type=Path, metavar="FOLDER", help="that `uniflow demo` wrote")
    command.set_defaults(command=_precision)

    command = commands.add_parser("report", help="a Markdown page and plots from results files")
    command.add_argument("files", nargs="*", type=Path, metavar="JSON", help="by default all in benchmarks/results")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="by default docs, if no files are given")
    command.add_argument("--flat", action="store_true", help="plots beside the page, not in plots/")
    command.add_argument("--readme", type=Path, metavar="MD", help="also fill the summary between this file's markers")
    command.set_defaults(command=_report)

    command = commands.add_parser("compare", help="what moved beyond its own spread")
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)
    command.set_defaults(command=_compare)

    command = commands.add_parser("choices", help="the table by which ops choose their path, from results files")
    command.add_argument("files", nargs="*", type=Path, metavar="JSON", help="by default all in benchmarks/results")
    command.add_argument("--out", type=Path, default=choices.TABLE, metavar="JSON", help="by default the package's own")
    command.set_defaults(command=_choices)

    command = commands.add_parser("gpu", parents=[cases], help="all that is to be done with a GPU, in under 9 minutes")
    command.add_argument(
        "--rehearse", type=float, default=0.0, metavar="SECONDS", help="without a GPU: what each test is to take"
    )
    command.set_defaults(command=_gpu)
    return parser


if __name__ == "__main__":
    sys.exit(main())
