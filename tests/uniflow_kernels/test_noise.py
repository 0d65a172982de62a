import math

import pytest
import torch

from uniflow_kernels import noise_seed, seeded_noise
from uniflow_kernels.ops.noise import philox

# the known answers that the authors of Philox publish with it: counter, key, result
KNOWN = [
    ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_integers(counter, key, expected):
    assert [int(word) for word in philox([torch.tensor(word) for word in counter], key)] == expected


def test_a_number_depends_on_seed_offset_and_place_alone():
    whole = seeded_noise(7, 10, seed=5, offset=3)
    assert torch.equal(whole, seeded_noise(7, 10, seed=5, offset=3))
    assert torch.equal(whole[4:], seeded_noise(3, 10, seed=5, offset=3, first_row=4))
    assert torch.equal(whole[:, :9], seeded_noise(7, 9, seed=5, offset=3))
    for other in (seeded_noise(7, 10, seed=6, offset=3), seeded_noise(7, 10, seed=5, offset=2**40)):
        assert (other != whole).all()
    high = seeded_noise(2, 8, seed=5, first_row=2**33)
    assert (high != seeded_noise(2, 8, seed=5)).all()


def test_pieces_on_a_cpu_do_not_show(monkeypatch):
    whole = seeded_noise(50, 12, seed=1)
    monkeypatch.setattr("uniflow_kernels.ops.noise._CHUNK", 7)
    assert torch.equal(seeded_noise(50, 12, seed=1), whole)


def test_normality():
    """Moments within five standard errors; the largest distance to the normal distribution at the 0.1% level."""
    count = 1 << 19
    for seed in (0, 1, 2**62):
        x = seeded_noise(count // 64, 64, seed).flatten().double()
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)):
            assert abs(x.pow(power).mean() - moment) < 5 * math.sqrt(variance / count), (seed, power)
        below = torch.special.ndtr(x.sort().values)
        steps = torch.arange(count + 1, dtype=torch.float64) / count
        distance = max((below - steps[:-1]).max(), (steps[1:] - below).max())
        assert distance < 1.95 / math.sqrt(count)
        assert x.abs().max() > 4  # the tails are there


def test_neighbours_seeds_and_offsets_are_uncorrelated():
    rows, columns = 1 << 12, 128
    x = seeded_noise(rows, columns, seed=9)
    pairs = {
        **{f"column {lag}": (x[:, lag:], x[:, :-lag]) for lag in (1, 2, 3, 4)},
        "row": (x[1:], x[:-1]),
        "seed": (x, seeded_noise(rows, columns, seed=10)),
        "offset": (x, seeded_noise(rows, columns, seed=9, offset=1)),
        "radius": (x[:, ::2].square(), x[:, 1::2].square()),
    }
    for name, (a, b) in pairs.items():
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 5 / math.sqrt(a.numel()), name


def test_a_generator_gives_a_seed_and_advances():
    first, second = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    seeds = [noise_seed(first) for _ in range(3)]
    assert seeds == [noise_seed(second) for _ in range(3)]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("seed", "offset", "name"), [(-1, 0, "seed"), (2**63, 0, "seed"), (0, -1, "offset")])
def test_out_of_range(seed, offset, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected an integer in \[0, 2\^63\), got"):
        seeded_noise(1, 1, seed, offset)
