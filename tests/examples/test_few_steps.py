"""The example of heads that draw in few steps runs, and its objectives lower what they are to lower."""

import pytest
import torch

from examples import few_steps
from examples.few_steps import energy_distance


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(few_steps, "ROWS", 32)
    return lambda draw, steps: energy_distance(draw, steps, 50)


def test_it_prints_a_table(capsys, short, monkeypatch):
    monkeypatch.setattr(few_steps, "energy_distance", short)
    few_steps.main(2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["objective", "flow_matching", "mean_flow", "self_distillation"]
    assert all(len(line.split()) == 6 for line in lines[1:])


def test_a_head_of_pocket_tts_is_tuned(capsys, short, monkeypatch):
    pytest.importorskip("transformers.models.pocket_tts")
    from examples import tune_pocket_tts

    monkeypatch.setattr(tune_pocket_tts, "energy_distance", short)
    tune_pocket_tts.main(2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["objective", "flow", "self-distillation"]
    assert all(float(cell) >= 0 for line in lines[1:] for cell in line.split()[-4:])


def test_equal_clouds_have_no_distance():
    generator = torch.Generator().manual_seed(3)
    assert abs(energy_distance(lambda condition, noise, steps: few_steps.points(len(noise), generator), 1, 1000)) < 0.02
    assert energy_distance(lambda condition, noise, steps: 3 * noise, 1, 1000) > 0.1
