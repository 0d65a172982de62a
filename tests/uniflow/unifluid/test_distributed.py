"""Two gloo processes train the UniFluid of one, in both ways of spreading it, on data of both kinds and of one.

Where it reads it has a vision encoder of its own, which is trained too.
"""

import os

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import randomize
from tests.uniflow.training.two import both
from tests.uniflow.unifluid.conftest import LLAMA
from tests.uniflow.unifluid.test_cli import BOTH, CONFIG, RECIPE, files, last, losses, write_folder
from uniflow import UniFlow, UniFlowConfig
from uniflow.cli import run
from uniflow.unifluid import UniFluid
from uniflow.unifluid.backbone import new_backbone
from uniflow.unifluid.texts import make_text_tokenizer

pytestmark = pytest.mark.slow

KINDS = {
    "both": BOTH,
    "drawing": {"caption": "a {} square"},
    "reading": {"question": "which colour?", "answer": "{}"},
    "adapters": BOTH,
    "edits": {"caption": "a {} square"},  # and the first from another picture
}
# data of one kind leave parameters without a gradient, which each way of spreading has its own trouble with
TOGETHER = [("both", "ddp"), ("both", "fsdp"), ("drawing", "fsdp"), ("reading", "ddp"), ("adapters", "fsdp")]
TOGETHER += [("edits", "ddp"), ("edits", "fsdp")]
TINY = {"image_size": 8, "patch_size": 4, "hidden_size": 64, "vit_hidden_size": 64, "intermediate_size": 96}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 4, "latent_ch": 8}
TINY |= {"global_blocks_depth": 1, "num_decoder_layers": 2}


def write(folder, kind, parallel="ddp"):
    """A configuration, and the command that trains as it says."""
    path = folder / f"{kind}-{parallel}.yaml"
    size = "micro_batch_size: 2, ema_decay: 0.9"
    around = f"config: {CONFIG}, vocabulary: 300"
    if kind == "adapters":
        around = f"backbone: {folder / 'language'}, lora: {{rank: 4}}"
    if kind == "edits":
        around += ", sources: both"
    recipe = RECIPE.replace("save_every: 1", "save_every: 2")
    if kind != "drawing":  # which sees nothing
        recipe = recipe.replace("{steps: 4,", "{steps: 4, vision_learning_rate: 1.0e-3,")
    path.write_text(
        f"tokenizer: {folder / 'tokenizer'}\n"
        f"model: {{{around}, head_width: 32, head_depth: 1}}\n"
        f"data: {{folder: {folder / kind}, validation: {folder / kind}}}\n"
        f"samples: {{captions: 1, steps: 2, head_steps: 2}}\n"
        f"tensorboard: false\nrecipe: {{{recipe}, {size}, "
        f"parallel: {parallel}}}\n"
    )
    return ["unifluid", "train", str(path)]


def all_of(commands):
    """Until one fails; each has a port of its own, on which the two meet."""
    for command in commands:
        if status := run(command):
            return status
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process did alone (KIND-alone), and two together (KIND-ddp, KIND-fsdp)."""
    folder = tmp_path_factory.mktemp("two")
    randomize(UniFlow(UniFlowConfig.preset("base", **TINY))).save_pretrained(folder / "tokenizer")
    texts_of = make_text_tokenizer(["a red square", "which colour?"], 300)
    new_backbone(LLAMA).save_pretrained(folder / "language")
    texts_of.save_pretrained(folder / "language")
    together = []
    for kind, texts in KINDS.items():
        first = {**texts, "source": "1.png"} if kind == "edits" else texts
        write_folder(folder / kind, [first, *[texts] * 7])
        assert run([*write(folder, kind), "--out", str(folder / f"{kind}-alone")]) == 0
        together += [
            [*write(folder, kind, parallel), "--out", str(folder / f"{kind}-{parallel}")]
            for one, parallel in TOGETHER
            if one == kind
        ]
    again = [*write(folder, "both", "fsdp"), "--out", str(folder / "again"), "--resume"]
    together.append([*again, str(folder / "both-fsdp/checkpoints/step-00000002")])
    for said, status in both(lambda: all_of(together), folder):
        assert status == 0, said
    return folder


@pytest.mark.parametrize(("kind", "parallel"), TOGETHER)
def test_two_processes_make_the_steps_of_one(folder, kind, parallel):
    alone, together = losses(folder / f"{kind}-alone"), losses(folder / f"{kind}-{parallel}")
    assert list(together) == [1, 2, 3, 4]
    for step, found in together.items():
        assert found == pytest.approx(alone[step], rel=1e-4)
    drawn = [] if kind == "reading" else ["step-00000002.png", "step-00000004.png"]
    assert (files(folder / f"{kind}-{parallel}" / "samples") if drawn else []) == drawn


def test_shards_go_on_and_are_gathered(folder):
    again, whole = losses(folder / "again"), losses(folder / "both-fsdp")
    assert again == {step: whole[step] for step in (3, 4)}
    for options, part in (([], ""), (["--ema"], "ema")):
        out = folder / f"gathered{part}"
        assert run(["gather", str(last(folder / "again")), "--out", str(out), *options]) == 0
        gathered, alone = (
            load_file(place / "model.safetensors") for place in (out, last(folder / "both-alone") / part)
        )
        assert gathered.keys() == alone.keys()
        assert any(name.startswith("vision.") for name in alone)
        for name, value in alone.items():
            assert torch.allclose(gathered[name], value, atol=1e-4), name
        assert UniFluid.from_pretrained(out).text_tokenizer.get_vocab()


def test_adapters_are_gathered_and_merged(folder):
    out = {name: folder / f"adapters-{name}" for name in ("gathered", "merged", "alone-merged")}
    assert run(["gather", str(last(folder / "adapters-fsdp")), "--out", str(out["gathered"])]) == 0
    assert run(["unifluid", "merge", str(out["gathered"]), "--out", str(out["merged"])]) == 0
    assert run(["unifluid", "merge", str(last(folder / "adapters-alone")), "--out", str(out["alone-merged"])]) == 0
    merged, alone = (load_file(out[name] / "model.safetensors") for name in ("merged", "alone-merged"))
    assert merged.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.allclose(merged[name], value, atol=1e-4), name
