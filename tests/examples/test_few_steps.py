"""The example of heads that draw in few steps runs, and its objectives lower what they are to lower."""

import torch

from examples import few_steps
from examples.few_steps import distance


def test_it_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(few_steps, "ROWS", 32)
    monkeypatch.setattr(few_steps, "distance", lambda head, steps: distance(head, steps, 50))
    few_steps.main(2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["objective", "flow_matching", "mean_flow", "self_distillation"]
    assert all(len(line.split()) == 6 for line in lines[1:])


def test_equal_clouds_have_no_distance():
    head = torch.nn.Module()
    head.sample = lambda condition, steps, noise: few_steps.points(len(noise), torch.Generator().manual_seed(3))
    assert abs(few_steps.distance(head, 1, 1000)) < 0.02
    head.sample = lambda condition, steps, noise: 3 * noise
    assert few_steps.distance(head, 1, 1000) > 0.1
