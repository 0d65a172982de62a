"""Tar files as people have them, and as they should not be."""

import gzip
import io
import os
import pickle
import resource
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import png, smooth_picture, write_shard
from uniflow.data import PictureShards
from uniflow.pictures import PictureError
from uniflow.shards import members_of
from uniflow.unifluid.captions import CaptionShards

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "a folder of a name that is rather long, as those of crawled pictures are/" * 2


def write(path, members, kind="pax"):
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


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
            members_of(path)
    path.write_bytes(whole[: end + 512])
    assert len(members_of(path).names) == 4


def test_a_shard_that_was_replaced_is_read_anew_and_an_old_reader_refuses_it(tmp_path):
    path = write_shard(tmp_path / "x.tar", {"a.png": one_colour("red"), "b.png": one_colour("red")})
    before = PictureShards([path], (".png",))
    write_shard(tmp_path / "y.tar", {"c.png": one_colour("blue"), "d.png": one_colour("blue")}).replace(path)
    after = PictureShards([path], (".png",))
    assert after.name(0) == f"{path}:c.png"
    assert after.open(0).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(PictureError, match="has changed since"):
        before.open(0)
    assert before.name(0) == f"{path}:0"


def test_members_of_one_name_are_refused(tmp_path):
    path = write(tmp_path / "x.tar", [("a.png", b"1"), ("a.txt", b"one"), ("a.png", b"2"), ("a.txt", b"two")])
    with pytest.raises(PictureError, match=r"x\.tar: two members are called 'a\.png'"):
        members_of(path)


def test_a_negative_size_is_no_endless_loop(tmp_path):
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-512).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(1024).join([bytes(header), b""]))
    with pytest.raises(PictureError, match="is no tar file or is damaged"):
        members_of(tmp_path / "x.tar")


def test_a_header_that_says_it_is_huge_takes_no_memory(tmp_path):
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(long_name.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 33)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PictureError, match="is no tar file or is damaged: a header of"):
        members_of(tmp_path / "x.tar")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_what_cannot_be_read_member_by_member_is_named(tmp_path):
    path = write(tmp_path / "x.tar", [("a.png", b"1")])
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(PictureError, match=r"x\.tar\.gz is compressed \(gzip\)"):
        members_of(tmp_path / "x.tar.gz")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(PictureError, match="expected a file, got a pipe or device"):
        members_of(tmp_path / "pipe.tar")
    with pytest.raises(FileNotFoundError):
        members_of(tmp_path / "none.tar")


def test_links_and_folders_are_no_members(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE), ("pipe.png", tarfile.FIFOTYPE)):
            header = tarfile.TarInfo(name)
            header.type = kind
            tar.addfile(header)
    assert members_of(tmp_path / "x.tar").names == []


def test_a_pickle_holds_no_names_and_reads_the_same(tmp_path):
    path = write_shard(
        tmp_path / "x.tar", {f"{i:04}.png": b"picture" for i in range(500)} | {"x.png": one_colour("red")}
    )
    shards = PictureShards([path], (".png",))
    pickled = pickle.dumps(shards)
    assert len(pickled) < 500 * 8 + 1000
    assert np.array_equal(np.asarray(pickle.loads(pickled).open(500)), np.asarray(shards.open(500)))


@given(st.data())
def test_damage_is_refused_or_harmless(tmp_path_factory, data):
    """Any bytes of headers and data changed: members as tarfile finds them, or one line."""
    folder = tmp_path_factory.mktemp("damaged")
    kind = data.draw(st.sampled_from(list(FORMATS)))
    names = data.draw(st.lists(st.text(min_size=1, max_size=30 if kind == "ustar" else 300), max_size=4, unique=True))
    names = [name for name in names if name.isprintable() and not name.startswith("/") and name.strip("/.")]
    path = write(folder / "x.tar", [(name, name.encode()) for name in names], kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        members = members_of(path)
    except PictureError:
        return
    for number, name in enumerate(members.names):
        assert members.find(name) == number
        members.read(number)


def test_pictures_in_several_folders_have_their_own_texts(tmp_path):
    members = [("a/x.png", png(smooth_picture((8, 8), 0))), ("b/x.png", png(smooth_picture((8, 8), 1)))]
    members += [("a/x.txt", b"one"), ("b/x.txt", b"two")]
    examples = CaptionShards([write(tmp_path / "x.tar", members)], (".png",))
    assert [examples.texts(number).caption for number in range(2)] == ["one", "two"]
