import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples import win_win


@pytest.mark.slow
def test_a_very_short_run(tmp_path, capsys):
    """Every way is trained, scored and drawn; a frozen encoder is the teacher's to the bit."""
    win_win.main(["--seeds", "1", "--steps", "4", "--teacher-steps", "40", "--out", str(tmp_path)])
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    accuracy = {row[0].strip("| "): row[1] for row in rows}
    assert list(accuracy) == ["the teacher", *win_win.WAYS]
    assert float(accuracy["frozen encoder"]) == float(accuracy["the teacher"]) > 50
    assert (tmp_path / "win_win.png").stat().st_size > 1000
    assert "plot and table in" in capsys.readouterr().out
