"""The example of pictures as instructions: that it runs, and that its measures say what they are said to."""

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from PIL import Image

from examples import edit_digits, read_and_draw


@pytest.fixture
def few(monkeypatch):
    """Some digits of those that there are."""
    parts = [
        read_and_draw.Digits(part.pixels[:count, 0].numpy() * 16 / 255, part.labels[:count].numpy())
        for part, count in zip(read_and_draw.digits(), (40, 12), strict=True)
    ]
    monkeypatch.setattr(edit_digits, "digits", lambda: parts)
    return parts


def test_it_runs(few, tmp_path):
    edit_digits.main(["--steps", "2", "--tokenizer-steps", "2", "--out", str(tmp_path)])
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (tmp_path / "table.md").read_text().splitlines()]
    assert rows[0] == ["right, %", *edit_digits.EDITS, "digit and style"]
    assert [row[0] for row in rows[2:]] == ["the tokenizer's reconstructions", "drawn", "drawn, guided"]
    assert all(0 <= float(cell) <= 100 for row in rows[2:] for cell in row[1:])
    # a row of sources and one of drawings for each instruction and style, of 12 digits of 8 pixels, four times as large
    assert Image.open(tmp_path / "sheet.png").size == (12 * 10 * 4, 6 * (2 * 9 + 2) * 4)


def test_an_edit_is_right_where_it_is_nearest_to_what_was_asked_for():
    unseen = read_and_draw.digits()[1]
    edits = edit_digits.edits_of(unseen)
    noise = torch.randint(0, 20, edits.targets.shape, generator=torch.Generator().manual_seed(0))
    near = (edits.targets.int() + noise - 10).clamp(0, 255).to(torch.uint8)
    assert min(edit_digits.right_edits(near, unseen).values()) == 100
    others = edits.targets.view(3, -1, 3, 8, 8).roll(1, 1).flatten(0, 1)  # of another digit
    assert max(edit_digits.right_edits(others, unseen).values()) < 1
    undone = edit_digits.right_edits(edits.sources, unseen)
    assert max(undone.values()) < 5
    assert edits.texts(0).caption == "mirror it"
    assert torch.equal(edits.targets[0], unseen.pixels[0].flip(-1))


def test_a_drawing_in_a_style_has_another_digit_and_the_sources_style():
    train = read_and_draw.digits()[0]
    edits, labels, styles = edit_digits.in_styles(train, 0)
    count = len(train)
    assert len(edits) == len(labels) == len(styles) == 3 * count
    for number in (0, count, 2 * count):
        assert edits.captions[number] == f"a {read_and_draw.NAMES[labels[number]]} in this style"
        style = list(edit_digits.STYLES.values())[styles[number]]
        assert torch.equal(edits.sources[number], style(train.pixels[number % count]))
        of_the_label = style(train.pixels[train.labels == labels[number]])
        assert (of_the_label == edits.targets[number]).flatten(1).all(1).any()
