import math

import pytest
import torch

from uniflow.unifluid.orders import draw_groups, draw_orders, group_sizes

CPU = torch.device("cpu")


@pytest.mark.parametrize("tokens", [1, 2, 16, 256])
def test_group_sizes_give_every_token_once_and_at_least_one_a_step(tokens):
    for steps in {1, tokens, max(1, tokens // 2), max(1, tokens // 7)}:
        sizes = group_sizes(tokens, steps)
        assert len(sizes) == steps
        assert sum(sizes) == tokens
        assert min(sizes) >= 1
    assert group_sizes(tokens, tokens) == (1,) * tokens


def test_group_sizes_follow_the_cosine():
    left = 256
    for step, size in enumerate(group_sizes(256, 16), 1):
        left -= size
        assert left == int(256 * math.cos(math.pi / 2 * step / 16)) if step < 16 else left == 0


@pytest.mark.parametrize("steps", [0, 17, -1])
def test_group_sizes_refuse_other_numbers_of_steps(steps):
    with pytest.raises(ValueError, match="steps: expected between 1 and 16"):
        group_sizes(16, steps)


def test_every_picture_has_its_own_order():
    orders = draw_orders(8, 16, "random", CPU, torch.Generator().manual_seed(0))
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand(8, 16))
    assert len({tuple(order.tolist()) for order in orders}) == 8
    assert torch.equal(orders, draw_orders(8, 16, "random", CPU, torch.Generator().manual_seed(0)))
    assert torch.equal(draw_orders(2, 3, "raster", CPU), torch.tensor([[0, 1, 2]] * 2))


def test_orders_start_anywhere_equally_often():
    first = draw_orders(16000, 16, "random", CPU, torch.Generator().manual_seed(0))[:, 0]
    counts = first.bincount(minlength=16)
    assert (counts - 1000).abs().max() < 5 * math.sqrt(1000)


def test_groups_rise_by_steps_of_one_as_in_sampling():
    torch.manual_seed(0)
    groups = draw_groups(64, 12, CPU)
    for row in groups:
        assert tuple(row.bincount().tolist()) == group_sizes(12, int(row[-1]) + 1)
    assert groups[:, -1].unique().tolist() == list(range(12))
    assert draw_groups(2, 12, torch.device("meta")).is_meta  # as the rest of a batch whose FLOPs are counted
