"""Tar files as people have them, and as they should not be."""

import gzip
import io
import os
import pickle
import resource
import tarfile
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import png, smooth_picture, write_shard
from uniflow.cli.inputs import InputError
from uniflow.cli.runs import find_shards
from uniflow.data import PictureShards
from uniflow.pictures import PictureError, TooLargeError
from uniflow.shards import find_members, read_member
from uniflow.unifluid.captions import CaptionError, CaptionShards

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "a folder of a name that is rather long, as those of crawled pictures are/" * 2


def write(path, members, kind="pax"):
    """Write a tar file; its bytes if it is none but a buffer."""
    where = {"fileobj": path} if isinstance(path, io.BytesIO) else {"name": path}
    with tarfile.open(**where, mode="w", format=FORMATS[kind]) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path.getvalue() if isinstance(path, io.BytesIO) else path


def one_colour(colour):
    return png(Image.new("RGB", (8, 8), colour))


@pytest.mark.parametrize("kind", FORMATS)
def test_pictures_keep_their_captions_whatever_they_are_called(tmp_path, kind):
    # ustar has room for 100 bytes behind the folders
    names = {"图": "red", "猫": "blue", f"{LONG}x": "green", f"{LONG}y": "white", "a/x": "black", "b/x": "yellow"}
    if kind != "ustar":
        names |= {"é" * 110: "cyan", "é" * 111: "magenta"}
    members = [(f"{name}.png", one_colour(colour)) for name, colour in names.items()]
    members += [(f"{name}.txt", colour.encode()) for name, colour in reversed(names.items())]
    examples = CaptionShards([write(tmp_path / "x.tar", members, kind)], (".png",))
    assert len(examples) == len(names)
    for number, (name, colour) in enumerate(names.items()):
        assert examples.name(number) == f"{tmp_path}/x.tar:{name}.png"
        assert examples.texts(number).caption == colour
        assert examples.open(number).getpixel((0, 0)) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))


def test_what_is_cut_short_is_refused_wherever_it_was_cut(tmp_path):
    path = write(tmp_path / "x.tar", [(f"{'é' * 60}{i}.png", bytes([i]) * 700 * i) for i in range(4)])
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # its last block of data; zeros follow
    for length in [*range(0, end, 512), 1, 600, end - 100]:
        path.write_bytes(whole[:length])
        with pytest.raises(PictureError, match=r"x\.tar is no tar file or is damaged"):
            find_members(path)
    path.write_bytes(whole[: end + 512])
    assert len(find_members(path).names) == 4


def test_a_shard_that_was_replaced_is_read_anew_and_an_old_reader_refuses_it(tmp_path):
    path = write_shard(tmp_path / "x.tar", {"a.png": one_colour("red"), "b.png": one_colour("red")})
    before = PictureShards([path], (".png",))
    write_shard(tmp_path / "y.tar", {"c.png": one_colour("blue"), "d.png": one_colour("blue")}).replace(path)
    after = PictureShards([path], (".png",))
    assert after.name(0) == f"{path}:c.png"
    assert after.open(0).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(PictureError, match="has changed since"):
        before.open(0)
    assert before.name(0) == f"{path}:a.png"
    content = path.read_bytes()
    path.write_bytes(content)  # in place, as long as before
    os.utime(path, ns=(0, 1))
    with pytest.raises(PictureError, match="has changed since"):
        after.open(1)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        after.open(1)


def test_members_of_one_name_are_refused(tmp_path):
    path = write(tmp_path / "x.tar", [("a.png", b"1"), ("a.txt", b"one"), ("a.png", b"2"), ("a.txt", b"two")])
    with pytest.raises(PictureError, match=r"x\.tar: two members are called 'a\.png'"):
        find_members(path)


def test_a_negative_size_is_no_endless_loop(tmp_path):
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-512).to_bytes(12, "big", signed=True)
    (tmp_path / "x.tar").write_bytes(checked(header) + bytes(1024))
    with pytest.raises(PictureError, match="is no tar file or is damaged"):
        find_members(tmp_path / "x.tar")


def test_a_header_that_says_it_is_huge_takes_no_memory(tmp_path):
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(long_name.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 33)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PictureError, match="is no tar file or is damaged: a member has headers of more than"):
        find_members(tmp_path / "x.tar")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_what_cannot_be_read_member_by_member_is_named(tmp_path):
    path = write(tmp_path / "x.tar", [("a.png", b"1")])
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(PictureError, match=r"x\.tar\.gz is compressed \(gzip\)"):
        find_members(tmp_path / "x.tar.gz")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(PictureError, match="expected a file, got a pipe or device"):
        find_members(tmp_path / "pipe.tar")
    with pytest.raises(FileNotFoundError):
        find_members(tmp_path / "none.tar")


def special(name, kind):
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, "a.png"
    return header


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"Q"])
def test_what_is_neither_file_nor_folder_is_named(tmp_path, kind):
    """A picture that is a link to another's data would else be missing without a word."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(special("folder", tarfile.DIRTYPE))
        tar.addfile(special("b.png", kind))
    with pytest.raises(PictureError, match=r"'b\.png' is a link or device, or sparse; expected plain files"):
        find_members(tmp_path / "x.tar")


def test_folders_are_no_members(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(special("folder.png", tarfile.DIRTYPE))
    assert find_members(tmp_path / "x.tar").names == []


@pytest.mark.parametrize("gap", [0, 1024])
def test_what_stands_behind_the_end_is_named(tmp_path, gap):
    """Two tar files in one, or a header that was overwritten by zeros: what follows would be lost."""
    path = write(tmp_path / "x.tar", [("a.png", b"1")])
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(gap) + whole)
    with pytest.raises(PictureError, match="it goes on behind its end at byte 1024"):
        find_members(path)
    with path.open("wb") as file:
        file.write(whole)
        file.truncate(1 << 40)
    with pytest.raises(PictureError, match="it goes on behind its end"):
        find_members(path)
    path.write_bytes(whole + bytes(1 << 20))
    assert find_members(path).names == ["a.png"]


def test_a_member_longer_than_any_picture_is_not_read(tmp_path):
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        for name in ("a.png", "a.txt"):
            header = tarfile.TarInfo(name)
            header.size = 1 << 33
            file.write(header.tobuf())
            file.truncate(file.tell() + header.size)
            file.seek(header.size, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    examples = CaptionShards([path], (".png",))
    with pytest.raises(TooLargeError, match="a member of 8589934592 bytes is too large"):
        examples.open(0)
    with pytest.raises(CaptionError, match=r"x\.tar:a\.txt is longer than 1 MiB"):
        examples.texts(0)


def pax(records, kind=tarfile.XHDTYPE):
    header = tarfile.TarInfo("pax")
    header.type, header.size = kind, len(records)
    return header.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)


def checked(header):
    """With the sum of its bytes in it."""
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


SPARSE = bytearray(special("a.png", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
SPARSE[482:483] = b"1"  # more of its map follows, without end
SPARSE = checked(SPARSE)


@pytest.mark.parametrize(
    "content",
    [
        pax(b"1" * (1 << 19)),
        pax(b"0 GNU.sparse.size=0\n" + b"2" * (1 << 19)),
        pax(b"".join(b"13 a%06d=b\n" % i for i in range(20_000)), tarfile.XGLTYPE)
        + tarfile.TarInfo("a.png").tobuf() * 20_000,
        pax(b"9 abc=de\n" * 10_000) * 20,
        pax(b"", tarfile.XGLTYPE) * 3000,
        bytes(SPARSE) + (b"1" * 12 + b"1" * 12) * 21 * 20_000,
        pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n") + tarfile.TarInfo("a.png").tobuf() + b"9" * (1 << 19),
    ],
    ids=["digits", "sparse digits", "globals", "long chain", "chain", "sparse map", "sparse 1.0"],
)
def test_headers_that_would_take_hours_or_the_memory_are_refused(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content + bytes(1024))
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PictureError, match="is no tar file or is damaged"):
        find_members(tmp_path / "x.tar")
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_pickle_is_small_and_reads_the_same(tmp_path):
    members = {f"{i:04}.png": b"picture" for i in range(500)} | {"x.png": one_colour("red"), "x.txt": b"red"}
    shards = PictureShards([write_shard(tmp_path / "x.tar", members)], (".png",), (".txt",))
    shards.open(500)
    pickled = pickle.dumps(shards)
    assert len(pickled) < 500 * (8 + 3 * 16) + 2000  # where a name ends, and it and two members stand
    again = pickle.loads(pickled)
    assert np.array_equal(np.asarray(again.open(500)), np.asarray(shards.open(500)))
    assert again.beside(500, ".txt", 2) == (f"{tmp_path}/x.tar:x.txt", b"re")
    assert again.beside(499, ".txt", 2) is None


def test_headers_are_read_once(tmp_path, monkeypatch):
    """Not again by every worker, nor where more shards are read than are open."""
    paths = [write_shard(tmp_path / f"{i}.tar", {f"{i}.png": one_colour("red")}) for i in range(70)]
    shards = PictureShards(paths, (".png",))
    monkeypatch.setattr(tarfile, "open", None)
    for _ in range(2):
        for number in range(70):
            assert shards.name(number) == f"{paths[number]}:{number}.png"
            assert shards.open(number).size == (8, 8)


WHOLE = {
    kind: write(
        io.BytesIO(), [("a" * 98 + str(i) if kind == "ustar" else "é" * 200 + str(i), b"7" * i) for i in range(3)], kind
    )
    for kind in FORMATS
}
BLOCKS = {kind: range(0, len(content.rstrip(b"\0")), 512) for kind, content in WHOLE.items()}
VALUES = st.one_of(
    st.binary(min_size=1, max_size=1),
    st.sampled_from([b"0", b"7", b"\0", b" ", b"x", b"L", b"S", b"=", b"\x80", b"\xff" * 12]),
)


@given(st.sampled_from(list(FORMATS)), st.data())
def test_damage_is_refused_or_harmless(tmp_path_factory, kind, data):
    """Any bytes of headers and data changed, sums put right: members as tarfile finds them, or one line."""
    content = bytearray(WHOLE[kind])
    for block in data.draw(st.lists(st.sampled_from(BLOCKS[kind]), max_size=3)):
        place, value = block + data.draw(st.integers(0, 400)), data.draw(VALUES)
        content[place : place + len(value)] = value
        if data.draw(st.booleans()):
            content[block : block + 512] = checked(content[block : block + 512])
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), *BLOCKS[kind]]))])
    try:
        members = find_members(path)
    except PictureError:
        return
    with tarfile.open(path, encoding="utf-8") as tar:
        files = [member for member in tar if member.isreg()]
        assert members.names == [file.name for file in files]
        for place, file in zip(members.places, files, strict=True):
            assert read_member(path, members.state, place) == tar.extractfile(file).read()


def test_pictures_in_several_folders_have_their_own_texts(tmp_path):
    members = [("a/x.png", png(smooth_picture((8, 8), 0))), ("b/x.png", png(smooth_picture((8, 8), 1)))]
    members += [("a/x.txt", b"one"), ("b/x.txt", b"two")]
    examples = CaptionShards([write(tmp_path / "x.tar", members)], (".png",))
    assert [examples.texts(number).caption for number in range(2)] == ["one", "two"]


def test_patterns_of_shards(tmp_path):
    paths = [write(tmp_path / f"{name}.tar", []) for name in ("a-0", "a-1", "b-0")]
    assert find_shards(f"{tmp_path}/{{a-{{0..1}},b-*}}.tar") == paths
    for pattern, message in (("{0..3}", r"no such file: .*/0\.tar"), ("{0..999999999999}", "more than 1000000 files")):
        with pytest.raises(InputError, match=message):
            find_shards(f"{tmp_path}/{pattern}.tar")
    with pytest.raises(ValueError, match="Unbalanced braces"):
        find_shards(f"{tmp_path}/{{0..3.tar")
