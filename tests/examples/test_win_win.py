import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples import win_win
from tests.uniflow.test_cli import ok


@pytest.mark.slow
def test_a_very_short_run(tmp_path, capsys):
    """Every way is trained, scored and drawn; a frozen encoder is the teacher's to the bit; `uniflow probe` agrees."""
    win_win.main(["--seeds", "1", "--steps", "4", "--teacher-steps", "40", "--out", str(tmp_path)])
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    accuracy = {row[0].strip("| "): row[1] for row in rows}
    assert list(accuracy) == ["the teacher", *win_win.WAYS]
    assert float(accuracy["frozen encoder"]) == float(accuracy["the teacher"]) > 50
    assert (tmp_path / "win_win.png").stat().st_size > 1000
    assert "models and digits in" in capsys.readouterr().out

    # of the models and pictures that were written, by another way through another order of the pictures
    digits, way = tmp_path / "digits", "no distillation"
    assert accuracy[way] != accuracy["the teacher"]
    models = ["--checkpoint", tmp_path / "seed-0" / way, "--encoder", tmp_path / "seed-0" / "the teacher"]
    validation = ["--validation", digits / "unseen", "--layers", 3, "--out", tmp_path / "probe", "--json"]
    row = json.loads(ok(capsys, "probe", digits / "seen", *validation, *models))
    assert f"{row['linear_student']:.2f}" == accuracy[way]
    assert f"{row['linear_teacher']:.2f}" == accuracy["the teacher"]
