"""What the command prints: results as they are, to people and to programs, and nothing that acts on a terminal."""

import io
import json
import os
import sys
import warnings
from contextlib import suppress

import pytest
from rich.console import Console

import uniflow
import uniflow_kernels
from tests.conftest import smooth_picture
from tests.uniflow.test_cli import CHECKPOINT, fails, files, ok
from uniflow import UniFlow
from uniflow.cli import run
from uniflow.cli.bars import picture_bar
from uniflow.cli.printing import Column, Table, notice, printable, say, say_json, warnings_as_notices

ODD = (
    "a[/b].png",
    "photo [edited].png",
    "[bold]x[/bold].png",
    "\x1b]0;title\x07\x1b[31m.png",
    "new\nline.png",
    "图 é.png",
)


def output_of(printed):
    """Of stdout and stderr; nothing in it acts on a terminal."""
    assert printable(printed.out.replace("\n", "").replace("\t", "")) == printed.out.replace("\n", "").replace("\t", "")
    assert printable(printed.err.replace("\n", "")) == printed.err.replace("\n", "")
    return printed.out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("photo [edited] 图 é 👩‍👩‍👧.png", "photo [edited] 图 é 👩‍👩‍👧.png"),
        ("narrow\u202fspace", "narrow\u202fspace"),
        ("\x1b[31mred\x9b2J\x7f", r"\x1b[31mred\x9b2J\x7f"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        (os.fsdecode(b"\xff.png"), r"\udcff.png"),
    ],
)
def test_what_acts_on_a_terminal_is_escaped(text, shown):
    assert printable(text) == shown


def test_lines(capsys):
    say("a\tb", "c\x1b[0m")
    notice("one\n   two\x07")
    say_json({"x": float("inf"), "y": 1.5, "z": "\x1b"})
    with warnings_as_notices():
        warnings.warn("hear\x1b", stacklevel=1)
    printed = capsys.readouterr()
    assert printed.out == 'a\\tb\tc\\x1b[0m\n{"x": null, "y": 1.5, "z": "\\u001b"}\n'
    assert printed.err == "uniflow: one two\\x07\nuniflow: warning: hear\\x1b\n"


def test_a_terminal_that_knows_few_characters(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    say("图.png")
    assert sys.stdout.buffer.getvalue() == b"\\u56fe.png\n"


def test_tables_are_aligned_on_a_terminal_and_plain_elsewhere(monkeypatch, capsys):
    columns = [Column("name", "name", width=8), Column("dB", "db", ".2f", 6)]

    def printed(as_json=False):
        table = Table(columns, as_json)
        table.row("图\n[b]", 1.234)
        table.row("mean", float("nan"))
        return capsys.readouterr().out

    assert printed() == "name\tdB\n图\\n[b]\t1.23\nmean\tnan\n"
    assert printed(as_json=True) == '{"name": "\\u56fe\\n[b]", "db": 1.234}\n{"name": "mean", "db": null}\n'
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert printed() == "name          dB\n图\\n[b]     1.23\nmean         nan\n"


def test_times_of_the_bar_have_labels():
    bar = picture_bar("drawn")
    bar.add_task("", total=10)
    console = Console(file=io.StringIO(), width=120)
    console.print(bar)
    assert "0:00:00 gone, -:--:-- left" in console.file.getvalue()


def test_results_do_not_go_where_the_bar_is(capsys, monkeypatch, picture_folder, tmp_path):
    monkeypatch.setenv("FORCE_COLOR", "1")  # stderr is a terminal, stdout is none
    assert run(["reconstruct", str(picture_folder), *CHECKPOINT, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "reconstructing" in printed.err
    assert [line.count("\t") for line in printed.out.splitlines()] == [5, 5, 5, 5, 5, 0]


@pytest.fixture
def odd_folder(tmp_path):
    folder = tmp_path / "odd"
    for number, name in enumerate(ODD):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        smooth_picture((30 + number, 20), number).save(folder / name)
    (folder / os.fsdecode(b"\x1b[0m\xff.png")).write_text("x")
    return folder


def test_names_are_shown_as_they_are(capsys, odd_folder, tmp_path):
    out = tmp_path / "out"
    assert run(["reconstruct", str(odd_folder), *CHECKPOINT, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    rows = [line.split("\t") for line in output_of(printed).splitlines()][1:-2]
    sizes = {printable(name): f"{30 + number}x20" for number, name in enumerate(ODD)}
    assert {row[2]: row[1] for row in rows} == sizes
    assert [row[0] for row in rows] == [f"{odd_folder}/{row[2]}" for row in rows]
    assert {row[3] for row in rows} == {"56x56"}
    assert files(out) == sorted(ODD)
    assert r"skipped: " + f"{odd_folder}/" + r"\x1b[0m\udcff.png is not a picture" in printed.err

    # the same for programs
    printed = ok(capsys, "reconstruct", odd_folder, *CHECKPOINT, "--out", out, "--force", "--json")
    *rows, means = map(json.loads, printed.splitlines())
    assert {row["reconstruction"]: row["size"] for row in rows} == {
        name: f"{30 + number}x20" for number, name in enumerate(ODD)
    }
    assert means["skipped"] == 1
    assert means["psnr"] == pytest.approx(sum(row["psnr"] for row in rows) / len(rows), rel=1e-5)

    # latents keep them
    latents = tmp_path / "[red]\x1b[31m.safetensors"
    assert run(["encode", str(odd_folder), *CHECKPOINT, "--out", str(latents)]) == 0
    assert r"[red]\x1b[31m.safetensors" in output_of(capsys.readouterr())
    ok(capsys, "decode", latents, *CHECKPOINT, "--out", tmp_path / "again")
    assert files(tmp_path / "again") == sorted(ODD)

    means = json.loads(ok(capsys, "evaluate", odd_folder, *CHECKPOINT, "--json"))
    assert (means["pictures"], means["skipped"], means["rfid"]) == (len(ODD), 1, None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["reconstruct", "none\x1b[31m", *CHECKPOINT, "--out", "out"],
        ["reconstruct", str(CHECKPOINT[1]), *CHECKPOINT, "--out", "out", "--\x1b[31m"],
        ["reconstruct", "x", *CHECKPOINT, "--out", "out", "--schedule", "\x1b[31m"],
        ["reconstruct", "x", "--checkpoint", "x", "--out", "out", "--max-memory", "\x1b[31m"],
        ["decode", "\x1b[31m", *CHECKPOINT, "--out", "out"],
        ["decode", "x", "--checkpoint", "\x1b[31m", "--out", "out"],
        ["train", "\x1b[31m.yaml"],
        ["\x1b[31m"],
    ],
)
def test_errors_do_not_act_on_a_terminal(capsys, arguments):
    assert r"\x1b[31m" in fails(capsys, *arguments)


def test_no_arguments_show_the_help_alone(capsys):
    for arguments in ([], ["unifluid"]):
        assert run(arguments) == 2
        printed = capsys.readouterr()
        assert "Usage: uniflow" in printed.out
        assert printed.err == ""


def test_what_newcomers_try(capsys, tmp_path):
    assert ok(capsys, "--version") == f"{uniflow_kernels.__version__}\n"
    assert "--checkpoint" in ok(capsys, "encode", "-h")
    wrong = fails(capsys, "reconstruct", "", *CHECKPOINT, "--out", tmp_path / "out")
    assert "one of the arguments is empty" in wrong


def test_doctor_names_each_reason_once(capsys):
    plain = ok(capsys, "doctor")
    for line in plain.splitlines():
        assert max(line.count("runs on CUDA"), line.count("…")) <= 1
        assert "…" not in line
    assert "scaled_dot_product_attention\t" in plain
    report = json.loads(ok(capsys, "doctor", "--json"))
    assert {"uniflow-kernels", "CUDA part", "torch"} <= report["environment"].keys()
    assert all(op["op"] in plain for op in report["ops"])


def test_output_that_nobody_reads_or_that_has_no_room(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert "No space left on device" in fails(capsys, "doctor")
    reader, writer = os.pipe()
    os.close(reader)
    with suppress(BrokenPipeError), os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run(["doctor"]) == 1
    monkeypatch.setattr(sys, "stdout", None)
    assert run(["doctor"]) == 0
    assert capsys.readouterr().err == ""
    with suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert run(["none"]) == 2


def test_an_interrupt_that_became_another_error(capsys, monkeypatch, picture_folder, tmp_path):
    class Interrupting:
        def __set_name__(self, owner, name):
            raise KeyboardInterrupt

    def encode(self, images):
        type("Made", (), {"x": Interrupting()})  # before Python 3.12 this raises a RuntimeError

    monkeypatch.setattr(UniFlow, "encode", encode)
    assert run(["encode", str(picture_folder), *CHECKPOINT, "--out", str(tmp_path / "l.safetensors")]) == 130


def test_memory_that_is_not_there_is_one_line(capsys, monkeypatch, picture_folder, tmp_path):
    def encode(self, images):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(UniFlow, "encode", encode)
    assert run(["reconstruct", str(picture_folder), *CHECKPOINT, "--out", str(tmp_path / "out")]) == 2
    assert "\nuniflow: this machine's memory does not hold this" in capsys.readouterr().err


@pytest.mark.parametrize("package", [uniflow, uniflow_kernels], ids=lambda package: package.__name__)
def test_completion_lists_the_names_that_are_loaded_on_first_use(package):
    assert set(package.__all__) <= set(dir(package))
    assert "__version__" in dir(uniflow_kernels)


def test_without_a_terminal_a_bar_is_one_line_and_an_error_another(capsys, tmp_path):
    smooth_picture((56, 56), 0).save(tmp_path / "a.png")
    command = ["encode", str(tmp_path / "a.png"), *map(str, CHECKPOINT), "--out", str(tmp_path / "a.safetensors")]
    assert run(command) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("encoding ")
    assert " 1/1 " in line
    assert run(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("uniflow: ")
    assert run([*command[:1], "none.png", *command[2:], "--force"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
