"""Runs that change their size on the way."""

import pytest
import torch

from tests.conftest import smooth_picture
from tests.uniflow.training.conftest import Heard, small_objective
from tests.uniflow.training.test_another_objective import Fit, train
from uniflow import CheckpointError, UniFlow, UniFlowObjective
from uniflow.data import PictureList, RandomCrops
from uniflow.evaluation.validation import ReconstructionValidator
from uniflow.training import Recipe, Stage
from uniflow.training.sizes import sizes_of

STAGES = (Stage(2, warmup_steps=0), Stage(2, warmup_steps=0, image_size=24), Stage(1, "decoder", warmup_steps=0))


def dinov2_objective(folder):
    """Around a random DINOv2 of 28 px, trained at 16; its teacher is the folder's."""
    transformers = pytest.importorskip("transformers")
    if not folder.exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 4}
        transformers.Dinov2Model(transformers.Dinov2Config(**sizes, drop_path_rate=0.1)).save_pretrained(folder)
    torch.manual_seed(1)
    student = UniFlow.from_encoder(folder, latent_ch=8, global_blocks_depth=1, num_decoder_layers=1)
    objective = UniFlowObjective(student)
    objective.resize(16)
    return objective


@pytest.mark.parametrize("options", [{}, {"workers": 1, "precision": "bfloat16"}])
def test_interrupted_where_the_size_changes_and_resumed_to_the_bit(make, tmp_path, options):
    options = {"ema_decay": 0.9, **options}
    heard, seen = Heard(), []
    picture = tmp_path / "a.png"
    smooth_picture((40, 30), 1).save(picture)
    whole = make(
        *STAGES,
        objective=dinov2_objective(tmp_path / "dinov2"),
        out=tmp_path,
        logs=[heard],
        validator=ReconstructionValidator([picture], 1),
        validate_every=2,
        save_every=1,
        keep=9,
        **options,
    )
    whole.objective.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    losses = whole.run()
    assert seen == [16, 16, 24, 24, 24]
    assert [validation.samples.shape[-1] for validation in heard.validations] == [16, 24]
    for step, size in ((1, 16), (2, 24), (3, 24), (5, 24)):
        folder = tmp_path / "checkpoints" / f"step-{step:08}"
        for held in (folder, folder / "ema"):
            model = UniFlow.from_pretrained(held)
            assert model.config.image_size == model.config.encoder["config"]["image_size"] == size
            assert model.decoder_pos_embed.shape[1] == (size // 4) ** 2
        again = make(*STAGES, objective=dinov2_objective(tmp_path / "dinov2"), **options)
        again.resume(folder)
        assert again.run() == losses[step:]
        for name, parameter in whole.student.named_parameters():
            assert torch.equal(parameter, again.student.get_parameter(name))
            assert torch.equal(whole.average.values[name], again.average.values[name])


def test_a_run_that_was_finished_goes_on_at_another_size(make, tmp_path):
    """As if it had always had that stage; but not at another size in the midst of one."""
    make(STAGES[0], out=tmp_path, ema_decay=0.9, save_every=1).run()
    whole = make(*STAGES, ema_decay=0.9)
    losses = whole.run()
    again = make(*STAGES, ema_decay=0.9)
    again.resume(tmp_path / "checkpoints" / "step-00000002")
    assert again.run() == losses[2:]
    other = make(Stage(2, warmup_steps=0, image_size=24), ema_decay=0.9)
    with pytest.raises(CheckpointError, match=r"another image_size \(24, was 16\): that stage has begun"):
        other.resume(tmp_path / "checkpoints" / "step-00000001")


def test_another_size_of_the_model_is_no_way_on_within_a_stage(make, tmp_path):
    make(Stage(2), out=tmp_path, save_every=1).run()
    objective = small_objective()
    objective.resize(24)
    with pytest.raises(CheckpointError, match=r"another image_size \(24, was 16\): that stage has begun"):
        make(Stage(3), objective=objective).resume(tmp_path / "checkpoints" / "step-00000001")


def test_sizes_that_no_run_can_have(make):
    with pytest.raises(ValueError, match=r"stages.1.image_size: expected a multiple of the patch \(4\), got 18"):
        make(Stage(1), Stage(1, image_size=18))
    with pytest.raises(ValueError, match=r"stages.0.image_size: a Fit has none to choose"):
        train(Stage(1, image_size=16), objective=Fit())
    crops = RandomCrops(PictureList({"a.png": smooth_picture((40, 30), 0)}), 16)
    recipe = Recipe(STAGES, parallel="fsdp")
    with pytest.raises(ValueError, match=r"with parallel: fsdp a run has one image_size, got \[16, 24, 24\]"):
        sizes_of(recipe, small_objective(), crops)
    with pytest.raises(ValueError, match="image_size: expected more than 0, got 0"):
        Stage(1, image_size=0)
