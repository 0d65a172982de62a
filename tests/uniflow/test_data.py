import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import png, smooth_picture, write_shard
from uniflow.data import Epochs, PictureList, PictureShards, Positions, RandomCrops, load
from uniflow.pictures import PictureError, open_picture


def pictures(count=5):
    return PictureList({str(i): smooth_picture((50 - i, 40 + i), i) for i in range(count)})


def take(crops, count, start=0):
    return [crops[position].value for position in range(start, start + count)]


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# crops


def test_a_crop_is_a_uint8_square_that_follows_from_seed_and_position():
    one, two, other = (take(RandomCrops(pictures(), 16, seed), 20) for seed in (3, 3, 4))
    assert all(crop.shape == (3, 16, 16) and crop.dtype == torch.uint8 for crop in one)
    assert equal(one, two)
    assert not equal(one, other)
    assert equal(one[7:12], take(RandomCrops(pictures(), 16, 3), 5, start=7))


def test_every_epoch_shows_all_pictures_in_another_order():
    crops = RandomCrops(pictures(6), 16)
    names = [crops[position].name for position in range(24)]
    epochs = [names[first : first + 6] for first in range(0, 24, 6)]
    assert all(sorted(epoch) == list("012345") for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_crops_differ_in_place_size_and_direction():
    # red rises to the right, green downwards
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(64) * 4, np.arange(64)[:, None] * 4
    picture = PictureList({"ramp": Image.fromarray(ramp)})
    crops = [crop.float() for crop in take(RandomCrops(picture, 16), 200)]
    slopes = torch.stack([crop[0, :, -1].mean() - crop[0, :, 0].mean() for crop in crops])
    assert 60 < (slopes < 0).sum() < 140
    assert slopes.abs().max() > 2 * slopes.abs().min()
    assert all(crop[1, -1].mean() > crop[1, 0].mean() for crop in crops)
    assert torch.stack([crop[1].mean() for crop in crops]).std() > 10

    unflipped = [crop.float() for crop in take(RandomCrops(picture, 16, flip=False, smallest=1.0), 5)]
    assert all(torch.equal(crop, unflipped[0]) for crop in unflipped)
    assert unflipped[0][0, 0, -1] > unflipped[0][0, 0, 0]


def test_pictures_smaller_than_a_crop_are_enlarged(tmp_path):
    smooth_picture((7, 5), 0).save(tmp_path / "x.png")
    assert RandomCrops(PictureList({"x": tmp_path / "x.png"}), 16)[0].value.shape == (3, 16, 16)
    with pytest.raises(ValueError, match="at least one"):
        RandomCrops(PictureList({}), 16)


def test_crops_of_jpegs_are_those_of_the_whole_pictures(tmp_path):
    """Decoded smaller or not: the same places, sizes and directions as of pictures in memory."""
    smooth_picture((300, 200), 0).save(tmp_path / "x.jpg", quality=95)
    files = PictureList({"x": tmp_path / "x.jpg"})
    whole = PictureList({"x": open_picture(tmp_path / "x.jpg")})
    shards = PictureShards([write_shard(tmp_path / "x.tar", {"x.jpg": (tmp_path / "x.jpg").read_bytes()})], (".jpg",))
    crops, others, again = (take(RandomCrops(source, 16), 30) for source in (files, whole, shards))
    assert equal(crops, again)
    assert not equal(crops, others)  # or none was decoded smaller
    assert max((one.int() - other.int()).abs().max() for one, other in zip(crops, others, strict=True)) <= 6


def test_a_damaged_picture_is_skipped_and_named(picture_folder):
    (picture_folder / "bad.png").write_text("no picture")
    files = PictureList({name: picture_folder / name for name in ("a.png", "bad.png", "b.jpg", "gone.png")})
    crops = RandomCrops(files, 16)
    epoch = [crops[position] for position in range(4)]
    assert {sample.name for sample in epoch} == {"a.png", "b.jpg"}
    assert {name for sample in epoch for name in sample.skipped} == {"bad.png", "gone.png"}
    with pytest.raises(PictureError, match=r"none of the 1 pictures can be read; .*bad\.png is not a picture"):
        RandomCrops(PictureList({"bad.png": picture_folder / "bad.png"}), 16)[0]


def test_streams_of_chosen_pictures():
    """Each is all of its pictures in every epoch, in an order that other streams do not have."""
    source, chosen = pictures(12), np.arange(12) % 3 > 0
    streams = [Epochs(source, 5, stream, chosen) for stream in (2, 3)]
    orders = [[stream.read(position, source.open)[0] for position in range(16)] for stream in streams]
    for order in orders:
        assert sorted(order[:8]) == sorted(order[8:]) == list(np.flatnonzero(chosen))
    assert orders[0] != orders[1]
    with pytest.raises(ValueError, match="at least one"):
        Epochs(source, 5, 2, np.zeros(12, bool))


# batches


def test_processes_share_every_step_in_equal_runs_of_neighbours():
    steps = 3
    alone = list(itertools.islice(Positions(5, 8, 2), 4 * steps))
    assert list(itertools.chain(*alone)) == list(range(5, 5 + 8 * steps))
    halves = [list(itertools.islice(Positions(5, 8, 2, rank, 2), 2 * steps)) for rank in (0, 1)]
    together = [part for step in range(steps) for half in halves for part in half[2 * step : 2 * step + 2]]
    assert together == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_from_the_position_whatever_the_workers(workers):
    crops = RandomCrops(pictures(), 16)
    batches = list(itertools.islice(load(crops, Positions(6, 4, 2), workers, pin_memory=False), 5))
    assert torch.equal(torch.cat([batch.inputs[0] for batch in batches]), torch.stack(take(crops, 10, start=6)))
    assert [name for batch in batches for name in batch.names] == [crops[position].name for position in range(6, 16)]


def test_loading_leaves_torchs_random_state_alone():
    before = torch.get_rng_state()
    next(load(RandomCrops(pictures(), 16), Positions(0, 2, 2), 0, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), before)


# shards


@pytest.fixture
def shards(tmp_path):
    paths = [tmp_path / f"{shard}.tar" for shard in range(20)]
    for shard, path in enumerate(paths):
        members = {}
        for sample in range(3):
            members[f"{sample}.PNG"] = png(smooth_picture((20, 20), 3 * shard + sample))
            members[f"{sample}.cls"] = b"7"
        write_shard(path, members)
    return paths


def test_shards_are_read_member_by_member(shards):
    source = PictureShards(shards, (".png", ".jpg"))
    assert len(source) == 60
    for number in (0, 4, 59):
        assert source.name(number) == f"{shards[number // 3]}:{number % 3}.PNG"
        assert np.array_equal(np.asarray(source.open(number)), np.asarray(smooth_picture((20, 20), number)))


def test_members_beside_a_picture(tmp_path):
    members = {"a.b/x.y.PNG": png(smooth_picture((20, 20), 0)), "a.b/x.txt": b"text", "a.txt": b"another"}
    write_shard(tmp_path / "x.tar", members)
    source = PictureShards([tmp_path / "x.tar"], (".png",), (".json", ".txt"))
    assert source.beside(0, ".txt", 100) == (f"{tmp_path}/x.tar:a.b/x.txt", b"text")
    assert source.beside(0, ".json", 100) is None


def test_an_epoch_goes_through_all_shards_sixteen_at_a_time(shards):
    order = PictureShards(shards, (".png",)).order(np.random.default_rng(0))
    assert sorted(order) == list(range(60))
    first, last = (set(part // 3) for part in (order[:48], order[48:]))
    assert len(first) == 16
    assert len(last) == 4
    assert not first & last
    assert len(set(order[:16] // 3)) > 6  # mixed, not one after the other


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_in_workers(shards, workers):
    crops = RandomCrops(PictureShards(shards[:2], (".png",)), 16)
    batches = itertools.islice(load(crops, Positions(3, 4, 4), workers, pin_memory=False), 2)
    assert torch.equal(torch.cat([batch.inputs[0] for batch in batches]), torch.stack(take(crops, 8, start=3)))


def test_damaged_shards(tmp_path):
    good = png(smooth_picture((20, 20), 0))
    write_shard(tmp_path / "x.tar", {"bad.png": good[:50], "good.png": good})
    crops = RandomCrops(PictureShards([tmp_path / "x.tar"], (".png",)), 16)
    assert {crops[position].name for position in range(2)} == {f"{tmp_path}/x.tar:good.png"}
    assert [name for position in range(2) for name in crops[position].skipped] == [f"{tmp_path}/x.tar:bad.png"]
    for content in (b"", b"hello" * 200):
        (tmp_path / "no.tar").write_bytes(content)
        with pytest.raises(PictureError, match=r"no\.tar is no tar file or is damaged"):
            PictureShards([tmp_path / "no.tar"], (".png",))
    with pytest.raises(FileNotFoundError):
        PictureShards([tmp_path / "none.tar"], (".png",))
