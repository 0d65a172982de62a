"""README.md and docs/: every snippet runs as it is printed, on small models, and links lead somewhere."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import png, smooth_picture, write_shard
from tests.dropin.stand_ins import Canonical
from tests.uniflow.evaluation.conftest import Colours
from tests.uniflow.unifluid.conftest import LLAMA
from tests.uniflow.unifluid.test_features import siglip
from uniflow import UniFlow, UniFlowConfig
from uniflow.cli import run
from uniflow.unifluid.texts import make_text_tokenizer
from uniflow_kernels.dropin import verification

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

SNIPPET = re.compile(r"^```python\n(.*?)^```$|^    ((?:uniflow|ln) [^\n]*)$", re.DOTALL | re.MULTILINE)
# what would take hours, and the step at which a run of examples/ ends
SHORTER = {"Stage(steps=1000)": "Stage(steps=2)", "Stage(steps=300)": "Stage(steps=2)", "batch_size=64": "batch_size=2"}
SHORTER |= {"--out out/samples": "--out out/samples --count 2 --steps 1"}
LAST_STEP = re.compile(r"step-\d{8}")
# checkpoints of several GPUs and with adapters, and what an example takes minutes to write
NOT_RUN = ("uniflow gather ", "uniflow unifluid merge ", "uniflow probe out/win_win/")


def snippets(page):
    """Python and commands, in their order."""
    return SNIPPET.findall(page.read_text())


def shortened(snippet):
    for long, short in SHORTER.items():
        snippet = snippet.replace(long, short)
    made = sorted(Path().glob("runs/one/checkpoints/step-*"))
    return LAST_STEP.sub(made[-1].name, snippet) if made else snippet


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What there is after `make demo`, and what the pages suppose beside it; small."""
    transformers, yaml = pytest.importorskip("transformers"), pytest.importorskip("yaml")
    folder = tmp_path_factory.mktemp("clone")
    torch.manual_seed(0)
    demo = UniFlow(UniFlowConfig.preset("tiny"))
    demo.save_pretrained(folder / "out" / "demo" / "checkpoint")
    demo.save_pretrained(folder / "checkpoints" / "uniflow")
    siglip().save_pretrained(folder / "checkpoints" / "siglip")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder / "checkpoints" / "dinov2")
    texts = make_text_tokenizer(["a seven", "which digit?", "seven"], 300)
    texts.save_pretrained(folder / "checkpoints" / "language")
    llama = transformers.LlamaConfig(**{**LLAMA, "max_position_embeddings": 256, "vocab_size": len(texts)})
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "checkpoints" / "language")

    torch.jit.script(Colours()).save(folder / "inception-2015-12-05.pt")
    for name in (
        "photo.jpg",
        "folder/a.jpg",
        "folder/b.jpg",
        "data/validation/a.jpg",
        "samples/a.png",
        "samples/b.png",
        *(f"classes/{kind}/{number}.jpg" for kind in ("cat", "dog") for number in range(13)),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        smooth_picture((40, 32), len(name)).save(folder / name)
    said = '{"caption": "a seven", "question": "which digit?", "answer": "seven"}'
    (folder / "data" / "validation" / "captions.jsonl").write_text(f'{{"image": "a.jpg", {said[1:]}')
    (folder / "captions.jsonl").write_text('{"caption": "a seven"}')
    (folder / "questions.jsonl").write_text(f'{{"image": "photo.jpg", {said[1:]}')
    for shard in range(2):
        members = {f"{i}.png": png(smooth_picture((40, 32), i)) for i in range(4)}
        members |= {f"{i}.json": said.encode() for i in range(4)}
        write_shard(folder / "data" / f"train-000{shard}.tar", members)
    (folder / "mine.py").write_text("from tests.test_docs import factory\n")

    (folder / "examples").mkdir()
    for name in ("train.yaml", "unifluid.yaml"):
        config = yaml.safe_load((ROOT / "examples" / name).read_text())
        config["tensorboard"] = False
        config["data"]["shards"] = "data/train-{0000..0001}.tar"
        config["recipe"] |= {"batch_size": 4, "micro_batch_size": 2, "workers": 0}
        if "samples" in config:
            config["model"] |= {"head_width": 32, "head_depth": 1}
            config["samples"] |= {"steps": 1, "head_steps": 1}
        for stage in config["recipe"]["stages"]:
            stage["steps"] = 1
        (folder / "examples" / name).write_text(yaml.safe_dump(config))
    config = yaml.safe_load((ROOT / "examples" / "generator.yaml").read_text()) | {"tensorboard": False}
    config["model"]["config"] = {"width": 32, "depth": 1, "heads": 2, "head_width": 32}
    config["samples"] |= {"steps": 1, "columns": 1}
    config["recipe"] |= {"batch_size": 2, "micro_batch_size": 1, "workers": 0, "stages": [{"steps": 2}]}
    (folder / "examples" / "generator.yaml").write_text(yaml.safe_dump(config))
    return folder


def factory():
    """What docs/dropin.md calls one's own."""
    torch.manual_seed(0)
    return Canonical().eval(), (torch.randn(5, 6), torch.rand(5), torch.randn(5, 10))


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_what_is_printed_runs(page, prepared, tmp_path, monkeypatch, capsys):
    shutil.copytree(prepared, tmp_path / "clone")
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.syspath_prepend(tmp_path / "clone")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(verification, "SECONDS", 0.0)
    names = {"__name__": "__main__"}
    for python, command in snippets(page):
        if python:
            exec(compile(shortened(python), page.name, "exec"), names)
        elif not command.startswith(NOT_RUN):
            arguments = shlex.split(shortened(command), comments=True)
            if arguments[0] == "uniflow":
                assert run(arguments[1:]) == 0, (command, capsys.readouterr().err)
            else:
                subprocess.run(arguments, check=True)


def test_every_block_is_of_a_kind_that_is_run():
    for page in PAGES:
        assert set(re.findall(r"^```(\w+)", page.read_text(), re.MULTILINE)) <= {"python"}, page.name


def test_links_lead_somewhere():
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
