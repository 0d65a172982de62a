"""A vision encoder that a stage trains: gradients, what changes when, checkpoints with it, and what is refused."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.conftest import randomize, smooth_picture
from tests.uniflow.test_cli import contents, fails, ok
from tests.uniflow.unifluid.test_cli import RECIPE, last, losses, place, resumed, run_file  # noqa: F401
from tests.uniflow.unifluid.test_features import siglip
from uniflow.checkpoint import CheckpointError
from uniflow.normalization import normalize
from uniflow.training import Recipe, Stage, Trainer
from uniflow.unifluid import UniFluid, UniFluidObjective
from uniflow.unifluid.captions import CaptionedPictures, CaptionFolder
from uniflow.unifluid.features import VisionFeatures
from uniflow.unifluid.objective import read_vision
from uniflow.unifluid.tokens import UniFlowTokens


def encoder(kind, tiny):
    return VisionFeatures(tiny(image_size=8) if kind == "uniflow" else siglip(), merge=2)


@pytest.fixture(params=["uniflow", "siglip"])
def kind(request):
    return request.param


@pytest.fixture
def owning(make_model, tiny):
    """A model with an encoder of its own."""

    def make(kind="uniflow", **changes):
        vision = encoder(kind, tiny)
        own = {"vision_channels": vision.width, "vision_merge": 2, "vision_encoder": vision.fields}
        return make_model(encoder=vision, **{"token_channels": 8, "grid": (2, 2), **own, **changes})

    return make


@pytest.fixture
def samples(tmp_path, text_tokenizer):
    """Pictures to read, and to draw from each other."""
    lines = []
    for number in range(4):
        smooth_picture((20, 9 + 8 * number), number).save(tmp_path / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": "which digit?", "answer": "seven" if number % 2 else "one"})
        lines.append({"image": f"{number}.png", "caption": "a seven", "source": "0.png"})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def make(size=(8, 8), features=1, **how):
        return CaptionedPictures(CaptionFolder(tmp_path), text_tokenizer, (8, 8), size, 40, features=features, **how)

    return make


def test_an_encoder_of_its_own_sees_the_same(kind, owning, tiny):
    vision, model = encoder(kind, tiny), owning(kind)
    images = normalize(torch.rand(3, 3, *vision.image_size, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(model.vision(images), vision(images))
    assert model.vision(images).requires_grad
    assert not vision(images).requires_grad
    assert vision(images[:0]).shape == model.vision(images[:0]).shape == (0, *vision(images).shape[1:])
    model.vision(images).sum().backward()
    reached = {name for name, parameter in model.vision.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    model.vision(images[:0]).sum().backward()  # of no pictures the same parameters have one, of zeros
    assert reached == {name for name, p in model.vision.named_parameters() if p.grad is not None and not p.grad.any()}
    assert not any(module.training for module in model.train().vision.modules())
    with torch.autocast("cpu", torch.bfloat16):  # as the rest of the model, which a frozen one beside it is not
        lower = model.vision(images)
        assert lower.dtype == torch.float32
        assert not torch.equal(lower, vision(images))
        assert torch.allclose(lower, vision(images), rtol=0.05, atol=0.2)
    model.vision.requires_grad_(False)
    assert not model.vision(images).requires_grad


def test_the_loss_is_that_of_a_plain_composition(kind, owning, samples, tiny):
    model, tokenizer = owning(kind), UniFlowTokens(tiny(image_size=8))
    objective = UniFluidObjective(model, tokenizer)
    own = samples(model.vision.image_size, model.vision.tokens, reading_share=1, tiles=3)
    _, readings = own.collate([own[position].value for position in range(3)])
    drawings = own.collate([])[0]
    loss = objective(drawings, readings).total
    grads = torch.autograd.grad(loss, [*model.vision.parameters()])
    assert all(grad.abs().max() > 0 for grad in grads)

    # the encoder's modules one after the other, squares of patches put together by hand
    images = normalize(readings.images)
    tokens = model.vision.embeddings(images)
    for layer in model.vision.encoder.layers:
        tokens = layer(tokens)
    side = model.vision.image_size[0] // 4 if kind == "siglip" else 2
    patches = tokens[:, -side * side :].unflatten(1, (side, side))
    squares = torch.cat([patches[:, a::2, b::2] for a in (0, 1) for b in (0, 1)], -1).flatten(1, 2)
    last_ids = readings.answer.shape[1]
    logits = model.answer_logits(squares, readings.ids, readings.real, last_ids)
    expected = F.cross_entropy(logits[readings.answer], readings.ids[:, -last_ids:][readings.answer])
    torch.testing.assert_close(loss, expected)
    others = torch.autograd.grad(expected, [*model.vision.parameters()])
    torch.testing.assert_close(grads, others, rtol=1e-4, atol=1e-6)

    # recomputed in the backward pass: the same
    model.gradient_checkpointing_enable()
    model.train()
    again = torch.autograd.grad(objective(drawings, readings).total, [*model.vision.parameters()])
    torch.testing.assert_close(grads, again, rtol=1e-5, atol=1e-7)


STAGES = (
    Stage(2, warmup_steps=0),
    Stage(2, warmup_steps=0, vision_learning_rate=1e-2, final_learning_rate=1e-3),
    Stage(1, warmup_steps=0),
)


def test_a_step_changes_it_only_in_a_stage_that_says_so(owning, samples, tiny):
    """Until then all is as with a frozen encoder in a folder of its own; it has no gradients and no moments."""
    tokenizer = UniFlowTokens(tiny(image_size=8))
    model, beside = owning(), owning()
    vision = VisionFeatures(tiny(image_size=8), merge=2)
    beside.vision, beside.config = None, replace(beside.config, vision_encoder=None)
    steps, seen = [], []
    for student, given in ((model, None), (beside, vision)):
        recipe = Recipe(STAGES if given is None else (STAGES[0],), batch_size=4, ema_decay=0.5)
        trainer = Trainer(UniFluidObjective(student, tokenizer, given), samples(), recipe)
        step = trainer._step

        def watched(spent, trainer=trainer, student=student, step=step):
            made = step(spent)
            if student.vision is not None:
                own = {*student.vision.parameters()}
                seen.append([parameter.detach().clone() for parameter in own])
                steps.append(any(parameter in own for parameter in trainer.trained))
                assert [group["peak"] for group in trainer.optimizer.param_groups if own & {*group["params"]}] == (
                    [1e-2] * 2 if steps[-1] else []
                )
            return made

        trainer._step = watched
        losses_of = trainer.run()
        if given is None:
            first, average = losses_of, trainer.average.values
    assert steps == [False, False, True, True, False]
    assert losses_of == first[:2]
    same = [all(map(torch.equal, one, other)) for one, other in itertools.pairwise(seen)]
    assert same == [True, False, False, True]
    assert not torch.equal(average["vision.embeddings.class_embedding"], model.vision.embeddings.class_embedding)


def test_what_cannot_be(owning, make_model, samples, tiny):
    model, tokenizer = owning(), UniFlowTokens(tiny(image_size=8))
    vision = encoder("uniflow", tiny)
    with pytest.raises(ValueError, match="vision: expected the encoder, as the config's vision_encoder says"):
        make_model(vision_channels=vision.width, vision_encoder=vision.fields)
    with pytest.raises(ValueError, match="vision: expected no encoder, as the config's vision_encoder says"):
        make_model(encoder=vision)
    with pytest.raises(ValueError, match="vision: expected features of 9 channels, of 2 patches a side, got 256 and 2"):
        owning(vision_channels=9)
    with pytest.raises(ValueError, match="vision_encoder: what it sees needs vision_channels"):
        owning(vision_channels=None)
    with pytest.raises(ValueError, match="vision: the model has an encoder of its own, expected none beside it"):
        UniFluidObjective(model, tokenizer, vision)
    shared = tiny(image_size=8)
    with pytest.raises(ValueError, match="vision: the student's encoder is a part of the tokenizer too"):
        UniFluidObjective(
            make_model(
                encoder=VisionFeatures(shared), token_channels=8, grid=(2, 2), vision_channels=64,
                vision_encoder=VisionFeatures(shared).fields,
            ),
            UniFlowTokens(shared),
        )  # fmt: skip
    plain = make_model(token_channels=8, grid=(2, 2), vision_channels=256, vision_merge=2)
    objective = UniFluidObjective(plain, tokenizer, vision)
    message = r"stages\.1\.vision_learning_rate: expected none, since this UniFluid has no vision encoder of its own"
    with pytest.raises(ValueError, match=message):
        Trainer(objective, samples(), Recipe(STAGES, batch_size=4))
    with pytest.raises(ValueError, match="vision_learning_rate: expected at least 0, got -1"):
        Stage(1, vision_learning_rate=-1)
    with pytest.raises(
        ValueError, match="the model has its encoder in its checkpoint, trained with it; expected no fo"
    ):
        read_vision("anywhere", model)
    assert read_vision(None, model) is model.vision


def test_a_folder_holds_it(kind, owning, tmp_path):
    """Trained, it is another one than in the folder that it came from; nothing else is needed to read it."""
    model = owning(kind)
    randomize(model.vision, 5)
    model.save_pretrained(tmp_path)
    read = UniFluid.from_pretrained(tmp_path)
    images = normalize(torch.rand(2, 3, *model.vision.image_size, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(read.vision(images), model.vision(images))
    half = UniFluid.from_pretrained(tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.vision.parameters()} == {torch.bfloat16}
    assert half.vision(images).dtype == torch.float32

    config = json.loads((tmp_path / "config.json").read_text())
    fields = config["vision_encoder"]
    deep = {**fields, "num_hidden_layers": 10**5 if kind == "uniflow" else 3}
    for changed, error, message in (
        (3, ValueError, "vision_encoder: expected fields of a UniFlowConfig, got 3"),
        ({**fields, "colour": 1}, ValueError, "vision_encoder: .*unexpected keyword argument 'colour'"),
        ({**fields, "image_size": -1}, ValueError, "image_size: expected"),
        ({**fields, "hidden_size": 1 << 16, "vit_hidden_size": 1 << 16}, ValueError, "does not hold|hidden_size"),
        (deep, ValueError, "num_hidden_layers: expected"),
        (None, CheckpointError, r"unexpected \(\d+\): vision\.embeddings"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "vision_encoder": changed}))
        with pytest.raises(error, match=message):
            UniFluid.from_pretrained(tmp_path)


def test_the_command(capsys, run_file, place):  # noqa: F811
    """Trained in its second stage, gone on with to the bit, asked and drawn with; never by the folder's old weights."""
    lines = [json.loads(line) for line in (place / "data" / "captions.jsonl").read_text().splitlines()]
    lines = [line | {"source": lines[number - 1]["image"]} for number, line in enumerate(lines)]
    (place / "data" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    siglip().save_pretrained(place / "siglip")
    stages = "[{steps: 1, warmup_steps: 0}, {steps: 2, warmup_steps: 0, vision_learning_rate: 1.0e-2}]"
    recipe = RECIPE.replace("[{steps: 4, warmup_steps: 0}]", stages)
    recipe = recipe.replace("validate_every: 2", "validate_every: 9")
    changes = {"vision": place / "siglip", "recipe": f"{{{recipe}, ema_decay: 0.9}}"}
    model = '{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, '
    model += '"num_attention_heads": 2, "max_position_embeddings": 128}'
    changes["model"] = f"{{config: {model}, head_width: 32, head_depth: 1, vocabulary: 300, vision_merge: 2}}"
    ok(capsys, "unifluid", "train", run_file(**changes))
    run = place / "run"
    whole, end = losses(run), contents(last(run))
    ok(capsys, "unifluid", "train", *resumed(capsys, run_file, place, 2, **changes))
    assert losses(run) == whole
    for name in ("model.safetensors", "ema/model.safetensors"):
        assert contents(last(run))[name] == end[name]
    states = [load_file(run / f"checkpoints/step-0000000{step}/model.safetensors") for step in (1, 2)]
    for name, value in VisionFeatures(siglip()).state_dict().items():
        before, after = (state[f"vision.{name}"] for state in states)
        assert torch.equal(before, value)
        assert not torch.equal(before, after)
    ask = ["unifluid", "ask", place / "data" / "0.png", "-q", "which colour?", "--longest", 4, "--checkpoint"]
    assert ok(capsys, *ask, last(run)).count("\t") == 1
    wrong = fails(capsys, *ask, last(run), "--vision", place / "siglip")
    assert "vision: the model has its encoder in its checkpoint, trained with it; expected no folder" in wrong
    draw = ["unifluid", "generate", "a red square", "--source", place / "data" / "1.png", "--checkpoint", last(run)]
    draw += ["--tokenizer", place / "tokenizer", "--head-steps", 2, "--count", 1, "--out", place / "drawn"]
    ok(capsys, *draw)

    # without such a stage it would be a model that looks into the folder
    plain = {"recipe": changes["recipe"].replace(", vision_learning_rate: 1.0e-2", "")}
    wrong = fails(capsys, "unifluid", "train", run_file(**changes | plain), "--resume", "auto")
    assert "recipe.stages.1.vision_learning_rate (none, was 0.01): that stage has begun" in wrong
    wrong = fails(capsys, "unifluid", "train", *resumed(capsys, run_file, place, 1, **changes | plain))
    assert "does not hold this model: its config.json has another vision_encoder" in wrong
