"""The recipes in examples/: each value says where it is from, and what they describe trains."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import GOLDEN, smooth_picture
from tests.uniflow.unifluid.test_features import siglip
from tests.uniflow.unifluid.test_tokens import autoencoder
from uniflow import UniFlow
from uniflow.cli import run
from uniflow.training.logs import count_flops
from uniflow.training.recipe import Run, read_run
from uniflow.unifluid import UniFluid, UniFluidConfig
from uniflow.unifluid.captions import Drawings, Readings
from uniflow.unifluid.config import Lora
from uniflow.unifluid.objective import UniFluidObjective
from uniflow.unifluid.recipe import UniFluidRun
from uniflow.unifluid.texts import make_text_tokenizer

transformers, yaml = pytest.importorskip("transformers"), pytest.importorskip("yaml")

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = ("uniflow_internvit.yaml", "uniflow_dinov2.yaml")
UNIFLUID = "unifluid_2b.yaml"
SIZE = 28  # pixels; half of what both encoders below were made for


def internvit(folder):
    """That of the golden checkpoint, alone."""
    folder.mkdir()
    encoder = UniFlow.from_pretrained(GOLDEN).state_dict()
    kept = {key: value for key, value in encoder.items() if key.startswith(("embeddings.", "encoder."))}
    save_file(kept, folder / "model.safetensors")
    config = json.loads((GOLDEN / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "intern_vit_6b"}))


def dinov2(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)


@pytest.mark.parametrize("name", [*RECIPES, UNIFLUID])
def test_each_value_says_where_it_is_from(name):
    for line in (EXAMPLES / name).read_text().splitlines():
        if re.match(r"[\s-]*\w+: *[^\s#]", line):
            assert re.search(r"  # (paper|release|folder|ours)\b", line), line


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_paper_says(name):
    run = read_run(EXAMPLES / name, Run)
    recipe, objective = run.recipe, run.objective
    assert {stage.train for stage in recipe.stages} == {"all"}
    assert sum(stage.steps for stage in recipe.stages) == 70_000
    assert abs(recipe.batch_size - 550) < 15
    for processes in (1, 8, 16):
        recipe.micro_batches(processes)
    assert (objective.beta, objective.flow_weight, objective.distill_weight) == (2.0, 1.0, 1.0)
    assert (run.model.config["global_blocks_depth"], run.model.config["latent_ch"]) == (6, 64)


@pytest.mark.parametrize(("name", "make"), list(zip(RECIPES, (internvit, dinov2), strict=True)))
def test_a_step_of_each_stage(name, make, tmp_path, capsys):
    """With a small encoder, small batches and everything else as it stands."""
    make(tmp_path / "encoder")
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        smooth_picture((80, 70), number).save(tmp_path / "pictures" / f"{number}.png")
    recipe = yaml.safe_load((EXAMPLES / name).read_text())
    recipe["model"] |= {"encoder": str(tmp_path / "encoder"), "image_size": SIZE}
    recipe["data"].pop("shards")
    recipe["data"] |= {"folder": str(tmp_path / "pictures"), "validation": str(tmp_path / "pictures")}
    recipe["recipe"] |= {"batch_size": 2, "micro_batch_size": 1, "workers": 0, "log_every": 1, "validate_every": 1}
    for stage in recipe["recipe"]["stages"]:
        stage["steps"] = 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**recipe, "tensorboard": False}))
    assert run(["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    reports = [line for line in lines if "loss" in line]
    assert len(reports) == len(recipe["recipe"]["stages"])
    for report in reports:
        assert report["gradient_norm"] > 0
        assert len(report["weights"]) == 3  # the teacher's layers
        assert report["encoder_learning_rate"] is not None
    latest = max((tmp_path / "run" / "checkpoints").iterdir())
    config = UniFlow.from_pretrained(latest).config
    assert config.image_size == SIZE
    assert (config.latent_ch, config.global_blocks_depth, config.num_decoder_layers) == (64, 6, 12)


def test_what_the_paper_of_unifluid_says():
    run = read_run(EXAMPLES / UNIFLUID, UniFluidRun)
    (stage,) = run.recipe.stages
    assert (stage.steps, stage.learning_rate, stage.train) == (1_000_000, 1e-4, "all")
    assert (run.recipe.batch_size, run.model.order, run.model.head) == (2048, "random", "ddpm")
    for processes in (8, 16, 64):
        run.recipe.micro_batches(processes)


@pytest.mark.parametrize("lora", [None, Lora()], ids=["all", "adapters"])
def test_what_the_docs_count_of_2b(lora):
    """Parameters and FLOPs of docs/unifluid.md, counted again on the meta device: nothing is computed."""
    tokenizer = make_text_tokenizer(["a seven"], 300)
    sizes = {"token_channels": 16, "grid": (16, 16), "head_width": 1024, "head_depth": 6, "head": "ddpm"}
    with torch.device("meta"):
        config = UniFluidConfig(transformers.Gemma2Config().to_dict(), **sizes, vision_channels=1152, lora=lora)
        model = UniFluid(config, tokenizer)
        embedding, layer = model.backbone.get_input_embeddings(), model.layers()[0]
        ids, real = torch.empty(1, 64, dtype=torch.int64), torch.empty(1, 64, dtype=torch.bool)
        drawings = Drawings(torch.empty(1, 3, 256, 256, dtype=torch.uint8), ids, real)
        slots = (torch.cat([ids] * 5, 1), torch.cat([real] * 5, 1))  # 256 features before the text
        readings = Readings(torch.empty(1, 3, 224, 224, dtype=torch.uint8), *slots, real[:, :16])
    docs = " ".join((EXAMPLES.parent / "docs" / "unifluid.md").read_text().split())
    if lora is None:
        for part in (model, layer, embedding, model.head):
            assert f"| {sum(parameter.numel() for parameter in part.parameters()):,} |" in docs
    else:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
        assert f" {trained:,} parameters are trained, and the other {frozen:,} stay" in docs
    objective = UniFluidObjective(model, Gives(256, 16), Gives(256, 1152))
    none = Drawings(*(part[:0] for part in drawings[:3])), Readings(*(part[:0] for part in readings))
    draw, read = (count_flops(objective, batch) / 1e12 for batch in ((drawings, none[1]), (none[0], readings)))
    which = "" if lora is None else ", adapters"
    assert f"| forward and backward{which} | {draw:.2f} | {read:.2f} |" in docs


class Gives(torch.nn.Module):
    """Tokens, or features, of so many channels, of a grid of 16 x 16."""

    def __init__(self, count, channels):
        super().__init__()
        self.count, self.channels, self.width, self.grid, self.merge = count, channels, channels, (16, 16), 1

    def forward(self, images):
        return torch.empty(len(images), self.count, self.channels, device=images.device)

    encode = forward


def test_a_step_of_unifluid(tmp_path, capsys):
    """Around a small Gemma 2, with a small autoencoder and SigLIP, in small batches; the rest as it stands."""
    torch.manual_seed(0)
    tokenizer = make_text_tokenizer(["a seven", "which digit?"], 300)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    config = transformers.Gemma2Config(**sizes, **heads, vocab_size=len(tokenizer))
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    autoencoder().save_pretrained(tmp_path / "autoencoder")
    siglip().save_pretrained(tmp_path / "siglip")
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        smooth_picture((40, 32), number).save(tmp_path / "pictures" / f"{number}.png")
    said = {"caption": "a seven", "question": "which digit?", "answer": "seven"}
    lines = [json.dumps({"image": f"{number}.png", **said}) for number in range(2)]
    (tmp_path / "pictures" / "captions.jsonl").write_text("\n".join(lines))
    run_file = yaml.safe_load((EXAMPLES / UNIFLUID).read_text())
    run_file |= {"tokenizer": str(tmp_path / "autoencoder"), "vision": str(tmp_path / "siglip"), "image_size": [8, 8]}
    run_file["model"] |= {name: str(tmp_path / "language") for name in ("backbone", "text_tokenizer")}
    run_file["model"] |= {"head_width": 32, "head_depth": 1}
    run_file["data"].pop("shards")
    run_file["data"] |= {"folder": str(tmp_path / "pictures"), "validation": str(tmp_path / "pictures")}
    run_file["samples"] |= {"steps": 2, "head_steps": 2}
    run_file["recipe"] |= {"batch_size": 4, "micro_batch_size": 2, "workers": 0, "log_every": 1, "validate_every": 1}
    run_file["recipe"]["parallel"] = "ddp"  # fsdp needs torchrun
    run_file["recipe"]["stages"][0]["steps"] = 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**run_file, "tensorboard": False}))
    command = ["unifluid", "train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
    assert run(command) == 0, capsys.readouterr().err
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (report,) = [line for line in log if "loss" in line]
    assert report["loss"] == pytest.approx(report["text"] + report["image"], rel=1e-2)
    assert report["gradient_norm"] > 0
    latest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert UniFluid.from_pretrained(latest).config.head == "ddpm"
