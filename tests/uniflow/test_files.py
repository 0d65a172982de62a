"""What a command reads and writes: a bad file among good ones, too many pixels, equal names, places that are taken."""

import json
import os
import shutil
import struct
import threading
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.conftest import smooth_picture
from tests.uniflow.test_cli import CHECKPOINT, contents, fails, files, ok
from uniflow import UniFlow
from uniflow.atomic import replacing
from uniflow.cli import batches, run, tokenize
from uniflow.latents import EncodedPicture, write_latents


def outcome(capsys, *arguments):
    status = run([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


# --- one bad file ---


@pytest.fixture
def mixed(picture_folder):
    """Four files that cannot be read, beside three that can and below."""
    (picture_folder / "bad.png").write_text("x")
    data = (picture_folder / "b.jpg").read_bytes()
    (picture_folder / "more" / "cut.jpg").write_bytes(data[: len(data) // 2])
    (picture_folder / "link.png").symlink_to("nowhere")
    os.mkfifo(picture_folder / "pipe.png")
    return picture_folder


@pytest.mark.parametrize("command", ["reconstruct", "encode", "evaluate"])
def test_a_bad_file_of_a_folder_is_skipped_and_named(capsys, mixed, tmp_path, command):
    out = tmp_path / ("out.safetensors" if command == "encode" else "out")
    to = [] if command == "evaluate" else ["--out", out]
    status, printed, said = outcome(capsys, command, mixed, *CHECKPOINT, *to)
    assert status == 0
    for name in ("bad.png is not", "more/cut.jpg is damaged", "link.png", "pipe.png: expected a file"):
        assert sum(line.startswith("uniflow: skipped: ") and name in line for line in said.splitlines()) == 1
    assert said.splitlines()[-1] == "uniflow: 4 of 7 pictures cannot be read: skipped"
    if command == "reconstruct":
        assert files(out) == ["a.png", "b.png", "more/c.png"]
        assert [line.split("\t")[2] for line in printed.splitlines()[1:4]] == files(out)
    elif command == "encode":
        assert printed.startswith("3 pictures in")
        with safe_open(out, framework="pt") as file:
            assert [entry["name"] for entry in json.loads(file.metadata()["pictures"])] == [
                "a.png",
                "b.png",
                "more/c.png",
            ]
    else:
        assert printed.splitlines()[1].startswith("3\t")

    # not if the user is strict, nor if he named it
    if command != "evaluate":
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert "skipped" not in fails(capsys, command, mixed, *CHECKPOINT, *to, "--strict")
    if command != "evaluate":
        for name in ("bad.png", "more/cut.jpg", "pipe.png"):
            assert name in fails(capsys, command, mixed, mixed / name, *CHECKPOINT, *to)
        assert not out.exists()


def test_the_same_noise_without_the_skipped(capsys, mixed, tmp_path):
    """A picture that is skipped takes no seed, so decoding gives what reconstructing gives."""
    same = [*CHECKPOINT, "--seed", 3]
    assert outcome(capsys, "reconstruct", mixed, *same, "--out", tmp_path / "one", "--batch-size", 2)[0] == 0
    assert outcome(capsys, "encode", mixed, *CHECKPOINT, "--out", tmp_path / "l.safetensors", "--batch-size", 2)[0] == 0
    ok(capsys, "decode", tmp_path / "l.safetensors", *same, "--out", tmp_path / "two", "--batch-size", 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_nothing_that_can_be_read_is_an_error(capsys, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).write_text("x")
    status, _, said = outcome(capsys, "reconstruct", tmp_path / "in", *CHECKPOINT, "--out", tmp_path / "out")
    assert status == 2
    assert said.splitlines()[-1] == "uniflow: none of 2 pictures can be read"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_read_is_named(capsys, monkeypatch, picture_folder, tmp_path):
    scandir = os.scandir
    closed = {str(picture_folder / "more")}

    def of_another_user(path):
        if str(path) in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", of_another_user)
    status, _, said = outcome(capsys, "reconstruct", picture_folder, *CHECKPOINT, "--out", tmp_path / "out")
    assert status == 0
    assert f"uniflow: skipped: cannot read the folder {picture_folder}/more: Permission denied" in said.splitlines()
    assert files(tmp_path / "out") == ["a.png", "b.png"]
    evaluate = ["evaluate", picture_folder, *CHECKPOINT]
    assert f"cannot read the folder {picture_folder}/more" in fails(capsys, *evaluate, "--strict")
    closed.add(str(picture_folder))
    assert f"cannot read the folder {picture_folder}: Permission denied" in fails(capsys, *evaluate)


# --- many pixels ---


def png_that_says(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_too_many_pixels(capsys, monkeypatch, picture_folder, tmp_path):
    out = ["--out", tmp_path / "out"]
    (picture_folder / "huge.png").write_bytes(png_that_says(20_000, 20_000))
    by_hand = fails(capsys, "reconstruct", picture_folder / "huge.png", *CHECKPOINT, *out)
    said = f"{picture_folder}/huge.png is too large: 20000x20000 pixels, at most 178956970 are allowed; --max-pixels"
    assert said in by_hand
    assert said in outcome(capsys, "evaluate", picture_folder, *CHECKPOINT)[2]
    more = ["--max-pixels", 400_000_000]  # then it is read, and found to hold nothing
    assert "is damaged" in fails(capsys, "reconstruct", picture_folder / "huge.png", *CHECKPOINT, *out, *more)

    limit = 100
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # Pillow's own: it would warn, and refuse twice as many
    ok(capsys, "reconstruct", picture_folder / "a.png", *CHECKPOINT, *out)
    assert limit == Image.MAX_IMAGE_PIXELS
    assert "at most 1000 are allowed" in fails(
        capsys, "encode", picture_folder / "a.png", *CHECKPOINT, "--out", "l.safetensors", "--max-pixels", 1000
    )


def test_what_is_slow_is_said_before_and_done_one_by_one(capsys, monkeypatch, tmp_path):
    (tmp_path / "in").mkdir()
    for number, name in enumerate("abc"):
        smooth_picture((84, 70), number).save(tmp_path / "in" / f"{name}.png")
    smooth_picture((14, 14), 3).save(tmp_path / "in" / "d.png")
    monkeypatch.setitem(batches._SLOW, "cpu", 100_000)
    encode, heard = UniFlow.encode, []

    def listening(self, images):
        heard.append((len(images), capsys.readouterr().err))
        return encode(self, images)

    monkeypatch.setattr(UniFlow, "encode", listening)
    folder, keep = tmp_path / "in", "--keep-size"
    ok(capsys, "reconstruct", folder, *CHECKPOINT, "--out", tmp_path / "out", keep)
    assert [count for count, _ in heard] == [1, 1, 1, 1]
    line = heard[0][1].strip().splitlines()[-1]
    assert line.startswith(
        f"uniflow: {folder}/a.png takes long: 84x70 pixels are 30 tokens, and in each layer attention"
    )
    assert not any("takes long" in said for _, said in heard[1:])

    heard.clear()
    ok(capsys, "encode", folder, *CHECKPOINT, "--out", tmp_path / "l.safetensors", keep)
    assert "a.png takes long" in heard[0][1]
    status, _, said = outcome(capsys, "decode", tmp_path / "l.safetensors", *CHECKPOINT, "--out", tmp_path / "again")
    assert status == 0
    assert "a.png takes long: 84x70" in said
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_what_is_done_is_shown_when_the_rest_is_not(capsys, monkeypatch, picture_folder, tmp_path):
    """The second picture takes so long that the user ends it: the first is there, and its row."""
    out, encode, calls = tmp_path / "out", UniFlow.encode, []
    shown = threading.Event()
    row = tokenize.Table.row
    monkeypatch.setattr(tokenize.Table, "row", lambda *arguments: row(*arguments) or shown.set())

    def slow(self, images):
        calls.append(len(images))
        if len(calls) == 2:
            assert shown.wait(30)
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(UniFlow, "encode", slow)
    status, printed, _ = outcome(capsys, "reconstruct", picture_folder, *CHECKPOINT, "--out", out, "--batch-size", 1)
    assert status == 130
    assert files(out) == ["a.png"]
    assert [line.split("\t")[2] for line in printed.splitlines()] == ["reconstruction", "a.png"]


# --- names and places ---


def test_no_two_pictures_have_one_name(capsys, tmp_path):
    for number, name in enumerate(
        ["a/x.png", "b/x.png", "b/x.jpg", "b/x-2.png", "c/y.png", "c/y.png.d/z.png", "d/y.png/z.png"]
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        smooth_picture((20 + number, 20), number).save(tmp_path / name)
    folders = [tmp_path / name for name in "abcd"]
    printed = ok(capsys, "reconstruct", *folders, *CHECKPOINT, "--out", tmp_path / "out", "--json")
    rows = [json.loads(line) for line in printed.splitlines()[:-1]]
    written = {str(Path(row["picture"]).relative_to(tmp_path)): row["reconstruction"] for row in rows}
    assert written == {
        "a/x.png": "x.png",
        "b/x-2.png": "x-2.png",
        "b/x.jpg": "x-3.png",
        "b/x.png": "x-4.png",
        "c/y.png": "y-2.png",
        "c/y.png.d/z.png": "y.png.d/z.png",
        "d/y.png/z.png": "y.png/z.png",
    }
    assert files(tmp_path / "out") == sorted(written.values())


def test_names_that_are_too_long(capsys, tmp_path):
    name = tmp_path / ("x" * 255)
    smooth_picture((20, 20), 0).save(name, "png")
    assert "too long a name" in fails(capsys, "reconstruct", name, *CHECKPOINT, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("{t}/link", "{t}/link is a link to nothing, expected a folder to write to"),
        ("{t}/link/below", "{t}/link is a link to nothing"),
        ("/proc/uniflow", "/proc cannot be written to: "),
        ("{t}/file/below", "{t}/file is a file, expected a folder"),
        ("{t}/taken", "{t}/taken/more is a file, expected a folder"),
        ("{t}/" + "x" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize("command", ["reconstruct", "encode", "decode"])
def test_a_place_that_cannot_be_written_to_is_found_before_the_work(
    capsys, monkeypatch, picture_folder, tmp_path, command, out, message
):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "more").write_text("")
    source, out = picture_folder, out.format(t=tmp_path)
    if command == "decode":
        source = tmp_path / "l.safetensors"
        model = UniFlow.from_pretrained(CHECKPOINT[1])
        write_latents(source, [torch.zeros(16, model.config.latent_ch)], [EncodedPicture("more/c.png", 56, 56)], model)
    else:
        monkeypatch.setattr(UniFlow, "encode", None)
    if command == "encode":
        out = f"{out}/more/l.safetensors" if out.endswith("taken") else f"{out}/l.safetensors"
    before = files(tmp_path)
    assert message.format(t=tmp_path) in fails(capsys, command, source, *CHECKPOINT, "--out", out)
    assert files(tmp_path) == before


def test_pictures_are_not_written_over_themselves(capsys, picture_folder, tmp_path):
    (tmp_path / "link").symlink_to(picture_folder)
    before = contents(picture_folder)
    for out in (picture_folder, tmp_path / "link"):
        wrong = fails(capsys, "reconstruct", picture_folder, *CHECKPOINT, "--out", out, "--force")
        assert f"{out}/a.png is one of the pictures to read" in wrong
    assert contents(picture_folder) == before


@pytest.mark.parametrize("temporary_name", [False, True])
def test_errors_of_writing_name_the_file(tmp_path, temporary_name):
    def write():
        with replacing(tmp_path / "x.png") as temporary:
            raise OSError(28, "No space left on device", *([str(temporary)] if temporary_name else []))

    with pytest.raises(OSError, match="No space left on device") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
def test_errors_of_reading_name_the_file(capsys, tmp_path):
    out = ["--out", tmp_path / "out"]
    for command in ("reconstruct", "decode"):
        assert "Input/output error: /proc/self/mem" in fails(capsys, command, "/proc/self/mem", *CHECKPOINT, *out)


@pytest.mark.parametrize("name", ["latents.pt", "latents.safetensors.bin"])
def test_latents_are_called_what_they_are(capsys, picture_folder, tmp_path, name):
    wrong = fails(capsys, "encode", picture_folder, *CHECKPOINT, "--out", tmp_path / name)
    assert f"--out: expected a file called *.safetensors, or a folder for a data set, got {tmp_path / name}" in wrong
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["x.exe", "x", "x.pdf", "\x1b[31m.pt"])
def test_what_is_decoded_is_a_picture(capsys, tmp_path, name):
    model = UniFlow.from_pretrained(CHECKPOINT[1])
    latents = [torch.zeros(16, model.config.latent_ch)] * 2
    pictures = [EncodedPicture("a.png", 56, 56), EncodedPicture(name, 56, 56)]
    write_latents(tmp_path / "l.safetensors", latents, pictures, model)
    wrong = fails(capsys, "decode", tmp_path / "l.safetensors", *CHECKPOINT, "--out", tmp_path / "out")
    assert "expected the name of a picture, as in" in wrong
    assert "\x1b" not in wrong
    assert not (tmp_path / "out").exists()


def test_latents_that_are_not_finite_are_not_written(capsys, monkeypatch, picture_folder, tmp_path):
    monkeypatch.setattr(UniFlow, "encode", lambda self, images: torch.full((len(images), 16, 8), float("inf")))
    status, _, said = outcome(capsys, "encode", picture_folder, *CHECKPOINT, "--out", tmp_path / "l.safetensors")
    assert status == 2
    assert f"the latents of {picture_folder}/a.png are not finite" in said.splitlines()[-1]
    assert not (tmp_path / "l.safetensors").exists()


def test_all_files_have_the_mode_of_the_umask(capsys, picture_folder, tmp_path):
    before = os.umask(0o027)
    try:
        ok(capsys, "reconstruct", picture_folder, *CHECKPOINT, "--out", tmp_path / "a")
        ok(capsys, "encode", picture_folder, *CHECKPOINT, "--out", tmp_path / "b" / "l.safetensors")
        ok(capsys, "decode", tmp_path / "b" / "l.safetensors", *CHECKPOINT, "--out", tmp_path / "c")
    finally:
        os.umask(before)
    written = [path for folder in "abc" for path in (tmp_path / folder).rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in written if path.is_file()} == {0o640}
    assert len(written) == 9
