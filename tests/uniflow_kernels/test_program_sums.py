import pytest
import torch

from tests.uniflow_kernels.test_flow_counts import Launches
from uniflow_kernels.triton_kernels import sums
from uniflow_kernels.triton_kernels.sums import ProgramSums


@pytest.mark.parametrize(
    ("shape", "most", "additions"),
    [((2, 8), 1 << 24, 1), ((2, 8), 400, 3), ((2, 8), 1, 5), ((5,), 1 << 24, 5)],
    ids=["all at once", "as many as are held", "one by one", "whose memory begins anywhere"],
)
def test_each_launch_has_its_sum(monkeypatch, within_twice, shape, most, additions):
    monkeypatch.setattr(sums, "_MOST_HELD", most)
    values = torch.randn(5, 3, *shape)  # of five launches of three programs
    of_all = ProgramSums(5)
    totals = []
    with Launches() as launches:
        for each in values:
            partial, total = of_all.of_launch(3, shape, torch.device("cpu"))
            assert partial.data_ptr() % 16 == 0
            partial.copy_(each)
            totals.append(total)
        of_all.add_up()
        of_all.add_up()  # there is nothing more
    assert len(launches.names) == 5 + additions  # with the copies
    for each, total in zip(values, totals, strict=True):
        within_twice(total, each.sum(0), each.double().sum(0))
