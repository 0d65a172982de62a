import pytest

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from examples import read_and_draw


@pytest.mark.slow
def test_a_short_run_scores_every_way_and_draws_a_sheet(tmp_path, monkeypatch):
    monkeypatch.setattr(read_and_draw, "DRAWN", 7)
    monkeypatch.setattr(read_and_draw, "SHOWN", 2)
    weights = []
    objective = read_and_draw.UniFluidObjective
    monkeypatch.setattr(
        read_and_draw,
        "UniFluidObjective",
        lambda *given, image_weight: weights.append(image_weight) or objective(*given, image_weight=image_weight),
    )
    ways = {**read_and_draw.WAYS, "image_weight 2": read_and_draw.Way(0.5, image_weight=2.0)}
    scores = read_and_draw.run(0, steps=2, tokenizer_steps=2, out=tmp_path, ways=ways)
    assert weights == [1.0] * 4 + [2.0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in read_and_draw.table([scores]).splitlines()]
    assert rows[0][1:] == ["recognised, %", "distance", "recognised, guided, %", "distance, guided", "answers, %"]
    filled = {row[0]: [bool(cell) for cell in row[1:]] for row in rows[2:]}
    draws, reads = [True] * 4, [True]
    assert filled == {
        "digits never seen": [True, True, False, False, False],
        "both": draws + reads,
        "draws only": [*draws, False],
        "reads only": [False] * 4 + reads,
        "both, raster order": draws + reads,
        "image_weight 2": draws + reads,
    }
    assert (tmp_path / "sheet.png").stat().st_size > 0


def test_the_table_has_mean_and_spread():
    table = read_and_draw.table([{"both": {"answers, %": 90.0}}, {"both": {"answers, %": 94.0}}])
    assert table.splitlines()[-1] == "| both | 92.0 ± 2.8 |"


def test_the_distance_of_a_set_to_itself_is_nothing_and_to_others_is_not():
    train, unseen = read_and_draw.digits()
    assert abs(read_and_draw.distance(train.pixels, train.pixels)) < 1e-2
    assert (
        0
        < read_and_draw.distance(unseen.pixels, train.pixels)
        < read_and_draw.distance(255 - unseen.pixels, train.pixels)
    )


def test_no_digit_is_both_learnt_and_asked_about():
    train, unseen = read_and_draw.digits()
    assert len(train) + len(unseen) == 1797
    assert train.texts(0).caption == f"a {read_and_draw.NAMES[train.labels[0]]}"
