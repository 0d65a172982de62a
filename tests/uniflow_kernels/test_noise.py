import math

import numpy as np
import pytest
import torch

from uniflow_kernels import backend, noise_seed, seeded_noise
from uniflow_kernels.ops.noise import philox, seeded_noise_op

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


SEEDS = torch.tensor([5, 2**62 + 2**40, -1, 0, 9])  # a tensor may hold any 64 bits


@pytest.mark.parametrize(("columns", "first_row"), [(12, 0), (10, 5), (147, 2**33 + 1)])
def test_groups_of_rows_have_seeds_of_their_own(on_all_backends, columns, first_row):
    ours = seeded_noise(20, columns, SEEDS, offset=2**40 + 1, first_row=first_row)
    assert ours.is_contiguous()
    assert torch.equal(ours, seeded_noise(20, columns, SEEDS, offset=2**40 + 1, first_row=first_row))
    apart = torch.stack([SEEDS, SEEDS + 1], 1).unbind(1)[0]  # not next to each other in memory
    assert torch.equal(ours, seeded_noise(20, columns, apart, offset=2**40 + 1, first_row=first_row))
    with backend("eager"):
        each = [seeded_noise(4, columns, seed, offset=2**40 + 1, first_row=first_row) for seed in SEEDS]
    assert torch.allclose(ours, torch.cat(each), rtol=0, atol=1e-6)


def test_numbers_and_tensors_and_nothing(on_all_backends):
    held = torch.tensor(7)
    assert torch.equal(seeded_noise(3, 8, held), seeded_noise(3, 8, 7))
    assert torch.equal(seeded_noise(3, 8, held[None]), seeded_noise(3, 8, 7))
    for rows, columns, seed in ((0, 8, held), (0, 8, SEEDS), (0, 8, SEEDS[:0]), (3, 0, held)):
        assert seeded_noise(rows, columns, seed).shape == (rows, columns)


def test_opcheck_and_one_node_in_a_graph(on_all_backends):
    torch.library.opcheck(torch.ops.uniflow_kernels.seeded_noise.default, (SEEDS, 10, 12, 3, 1))
    twice = torch.compile(lambda seeds: 2 * seeded_noise_op(seeds, 10, 12, 3, 1), fullgraph=True, backend="eager")
    assert torch.equal(twice(SEEDS), 2 * seeded_noise(10, 12, SEEDS, 3, first_row=1))


@pytest.mark.parametrize("columns", [12, 10])
def test_pieces_on_a_cpu_do_not_show(monkeypatch, columns):
    whole = seeded_noise(50, columns, seed=1)
    groups = seeded_noise(50, columns, SEEDS)
    for counters in (7, 70):  # parts of a group, some groups
        monkeypatch.setattr("uniflow_kernels.ops.noise._CHUNK", counters)
        assert torch.equal(seeded_noise(50, columns, seed=1), whole)
        assert torch.equal(seeded_noise(50, columns, SEEDS), groups)


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


@pytest.mark.parametrize(
    ("rows", "seed", "error", "message"),
    [
        (9, SEEDS, ValueError, "rows: expected as many for each of 5 seeds, got 9"),
        (9, SEEDS[:0], ValueError, "rows: expected as many for each of 0 seeds, got 9"),
        (9, SEEDS[None], ValueError, r"seed: expected a tensor of shape \[S\], got shape \(1, 5\)"),
        (9, SEEDS.int(), TypeError, "seed: expected a tensor of torch.int64"),
        (9, 1.0, TypeError, "seed: expected an integer, or a tensor of torch.int64, got 1.0"),
        (9, np.arange(9), TypeError, "seed: expected an integer, or a tensor of torch.int64, got array"),
        (9, SEEDS.to("meta"), ValueError, "seed: expected a tensor on the device it is used on, cpu, got one on meta"),
    ],
)
def test_bad_input_names_the_argument(rows, seed, error, message):
    with pytest.raises(error, match=f"^{message}"):
        seeded_noise(rows, 8, seed)


def test_seeds_may_be_integers_of_numpy():
    assert torch.equal(seeded_noise(3, 8, np.uint32(7)), seeded_noise(3, 8, 7))


def test_the_cuda_part_has_no_such_kernel():
    with backend("cuda"), pytest.raises(ValueError, match="seeded_noise: backend 'cuda' cannot serve"):
        seeded_noise(3, 8, 1)
