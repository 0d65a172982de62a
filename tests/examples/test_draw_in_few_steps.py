"""The example of digits drawn in few steps trains every way and scores every number of steps."""

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from examples import draw_in_few_steps, read_and_draw


@pytest.mark.slow
def test_a_short_run_scores_every_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(read_and_draw, "DRAWN", 7)
    draw_in_few_steps.main(["--seeds", "1", "--steps", "4", "--tokenizer-steps", "2", "--out", str(tmp_path)])
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (tmp_path / "table.md").read_text().splitlines()]
    assert rows[0][1:] == ["recognised, %", "distance", "seconds"]
    names = [row[0] for row in rows[2:]]
    assert len(names) == 2 * 5 + 5 * 4
    assert {name.rsplit(", two tokens", 1)[0].rsplit(", ", 1)[0] for name in names} == {
        "flow matching",
        "flow matching, guided",
        "self-distillation, guided",
        *draw_in_few_steps.WAYS,
    }
    assert all(all(float(cell) >= 0 for cell in row[1:]) for row in rows[2:])
    assert "table in" in capsys.readouterr().out
