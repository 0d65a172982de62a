"""The example of generated digits trains every way and scores every plan."""

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from examples import generate_digits


@pytest.mark.slow
def test_a_short_run_scores_every_way_and_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(generate_digits, "DRAWN", 7)
    monkeypatch.setattr(generate_digits, "STEPS", 2)
    monkeypatch.setattr(generate_digits, "PLANS", dict(list(generate_digits.PLANS.items())[-2:]))
    ways, plans = generate_digits.run(0, steps=2, tokenizer_steps=2, out=tmp_path)
    assert set(generate_digits.WAYS) < set(ways)
    assert list(plans) == list(generate_digits.PLANS)
    for way in generate_digits.WAYS:
        assert 0 <= ways[way]["recognised, guided, %"] <= 100
        assert ways[way]["distance"] > 0
    counts = [ways[way]["thousand parameters"] for way in list(generate_digits.WAYS)[:3]]
    assert max(counts) < 1.05 * min(counts)  # the heads are compared at equal size
    assert (tmp_path / "sheet.png").exists()


def test_the_space_of_pixels_holds_the_digits():
    train, _ = generate_digits.digits.digits()
    space = generate_digits.pixels_of(train)
    assert torch.equal(space.decode(space.rows, torch.zeros(len(train))), train.pixels)
