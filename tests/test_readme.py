import re
from pathlib import Path

from uniflow import UniFlow, UniFlowConfig

ROOT = Path(__file__).parent.parent


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    UniFlow(UniFlowConfig.preset("tiny")).save_pretrained("out/demo/checkpoint")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["again"].shape == (2, 3, 64, 96)
    assert (tmp_path / "out" / "mine" / "model.safetensors").is_file()


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
