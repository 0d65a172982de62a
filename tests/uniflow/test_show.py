import pytest
import torch
from PIL import Image

from tests.conftest import smooth_picture
from uniflow.cli import run
from uniflow.cli.show import principal_colours


def test_the_sheet(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    tiny().save_pretrained(tmp_path / "checkpoint")
    smooth_picture((40, 24), 0).save(tmp_path / "a.png")
    sheet = tmp_path / "new" / "sheet.png"
    command = ["show", str(tmp_path / "a.png"), "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(sheet)]
    assert run([*command, "--teacher", str(tmp_path / "checkpoint")]) == 0
    said = capsys.readouterr().out
    for panel in ("original; 1 step, ", "; 4 steps, ", "guidance 2", "error at 1 step", "latents, 3 of 8", "teacher"):
        assert panel in said
    first = sheet.read_bytes()
    assert Image.open(sheet).size == (1248, 696)
    assert run(command) == 2
    assert "exists; --force overwrites it" in capsys.readouterr().err
    assert run([*command, "--force", "--teacher", str(tmp_path / "checkpoint")]) == 0
    assert sheet.read_bytes() == first
    assert run([*command[:-1], "sheet.txt"]) == 2
    assert "--out: expected a file called *.png" in capsys.readouterr().err
    assert run([*command, "--force", "--size", "18"]) == 2
    assert "--size: expected a multiple of the patch, 4 pixels, got 18" in capsys.readouterr().err
    assert run([*command, "--force", "--size", "24"]) == 0
    assert sheet.read_bytes() != first


def test_colours_are_principal_components():
    """Tokens that vary in one direction have one colour's range; those that are all alike are black."""
    line = torch.linspace(-1, 1, 16)[:, None] * torch.tensor([[0.6, 0.0, 0.8, 0.0]]) + 5
    red = principal_colours(line)[0]
    assert red.shape == (4, 4)
    assert torch.equal(red.flatten(), (torch.linspace(0, 1, 16) * 255).round().to(torch.uint8))
    assert principal_colours(torch.ones(4, 3)).unique().tolist() == [0]
    assert principal_colours(torch.rand(9, 2)).shape == (3, 3, 3)
    with pytest.raises(ValueError, match=r"^tokens: expected those of a square grid, got 8"):
        principal_colours(torch.rand(8, 2))
