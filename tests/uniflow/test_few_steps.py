"""A tokenizer whose flow head has two times: made, trained, tuned, saved, read and sampled."""

import json

import pytest
import torch

from uniflow import UniFlow, UniFlowConfig, UniFlowObjective
from uniflow.cli import run
from uniflow.normalization import denormalize
from uniflow.sampler import decoding_bytes_per_token
from uniflow_kernels import mean_flow_loss, patchify, self_distillation_loss

LOSSES = {"mean_flow": mean_flow_loss, "self_distillation": self_distillation_loss}


@pytest.fixture
def two(tiny):
    """A model of two times, tuned a little, so that both time embeddings differ."""
    model = tiny().for_intervals()
    with torch.no_grad():
        for parameter in model.flow_head.net.time_embed[1].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def test_tuning_begins_with_the_velocity_that_there_was(tiny):
    model = tiny()
    tuned = model.for_intervals()
    assert (model.config.flow_times, tuned.config.flow_times) == (1, 2)
    x, condition, t = torch.randn(2, 16, 48), torch.randn(2, 16, 64), torch.rand(2, 16)
    for time in (t, t[:, 0], t[0, 0]):
        torch.testing.assert_close(tuned.velocity(x, time, condition), model.velocity(x, time, condition))
    assert tuned.for_intervals().config.flow_times == 2


def test_steps_end_where_the_mean_velocity_leads(two):
    """Against the flow head's own forward, and in the compiled decoder, in pieces and with guidance."""
    latents, noise = torch.randn(2, 16, 8), torch.randn(2, 16, 48)
    net, condition = two.flow_head.net, two.condition(latents).flatten(0, 1)
    with torch.no_grad():
        for steps in (1, 2, 4):
            x = noise.flatten(0, 1)
            for step in range(steps):
                times = torch.tensor([1000 * step / steps, 1000 * (step + 1) / steps])
                x = x + net(x, times, condition) / steps
            images = two.decode(latents, steps=steps, noise=noise)
            torch.testing.assert_close(patchify(images, 4).flatten(0, 1), x, rtol=1e-4, atol=1e-4)
            for cfg in (1.0, 2.0):
                images = two.decode(latents, steps=steps, noise=noise, cfg=cfg)
                one_picture = 16 * max(decoding_bytes_per_token(two.config, two.dtype, cfg != 1.0))
                pieces = two.decode(latents, steps=steps, noise=noise, cfg=cfg, max_memory=one_picture)
                torch.testing.assert_close(pieces, images, rtol=1e-4, atol=1e-4)
                decoder = two.compile_decoder(2, steps=steps, cfg=cfg, dtype=torch.float32)
                pictures = denormalize(images).clamp(0, 1)
                torch.testing.assert_close(decoder(latents, noise=noise), pictures, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="solver: expected euler, since the head knows where a step ends, got heun"):
        two.decode(latents, solver="heun")


def test_a_folder_says_what_it_is(two, tiny, tmp_path):
    two.config.num_sampling_steps = 2
    two.save_pretrained(tmp_path / "two")
    said = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (said["model_type"], said["flow_times"]) == ("uniflow_few_steps", 2)
    assert "architectures" not in said
    read = UniFlow.from_pretrained(tmp_path / "two")
    assert read.config.to_dict() == said
    latents = torch.randn(1, 16, 8)
    assert torch.equal(read.decode(latents, seed=1), two.decode(latents, seed=1))
    assert torch.equal(read.decode(latents, seed=1), two.decode(latents, steps=2, seed=1))
    model = tiny()
    model.config.extra = {"auto_map": {"AutoModel": "modeling_uniflow.UniFlowVisionModel"}, "model_type": "uniflow"}
    assert "auto_map" in model.config.to_dict()
    said = model.for_intervals().config.to_dict()  # the official code would give its time embedding random numbers
    assert said["model_type"] == "uniflow_few_steps"
    assert "auto_map" not in said
    model.save_pretrained(tmp_path / "one")
    said = json.loads((tmp_path / "one" / "config.json").read_text())
    assert said["model_type"] == "uniflow"
    assert "flow_times" not in said
    # its encoder serves others, and weights of one time are not taken for it
    assert UniFlow.from_encoder(tmp_path / "two", latent_ch=8, flow_times=2).config.flow_times == 2
    (tmp_path / "two" / "model.safetensors").write_bytes((tmp_path / "one" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="time_embed"):
        UniFlow.from_pretrained(tmp_path / "two")


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("per_image", [False, True])
def test_losses_are_their_definitions(two, kind, per_image):
    images, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 16, 48)
    times = torch.rand(2, 2 if per_image else 16, 2).sort(-1).values
    times = times[:, 0] if per_image else times
    objective = UniFlowObjective(two, distill_weight=0.0, flow_weight=0.5, flow_loss=kind, chunk_tokens=8)
    ours = objective(images, times, noise)
    condition, each = two.condition(two.encode(images)), times.view(2, -1, 2).expand(2, 16, 2)
    expected = LOSSES[kind](two.flow_head.net, condition, patchify(images, 4), each, noise)
    torch.testing.assert_close(ours.flow, expected.detach())
    leaves = list(two.parameters())
    found = torch.autograd.grad(ours.total, leaves, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(0.5 * expected, leaves, allow_unused=True, materialize_grads=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=1e-3)


def test_times_are_drawn_with_the_share_that_is_asked_for(two, monkeypatch):
    given = []
    monkeypatch.setattr(two.flow_head, "loss", lambda condition, images, t, *rest: given.append(t) or t.sum())
    for share, per in ((1.0, "token"), (0.0, "image")):
        UniFlowObjective(two, distill_weight=0.0, flow_loss="mean_flow", share_equal=share, t_per=per)(
            torch.randn(2, 3, 16, 16)
        )
    tokens, pictures = given
    assert tokens.shape == (2, 16, 2)
    assert torch.equal(tokens[..., 0], tokens[..., 1])
    assert pictures.shape == (2, 2)
    assert (pictures[:, 0] < pictures[:, 1]).all()


def test_it_learns_one_step(tiny):
    """Tuned on one picture, one step comes nearer to it than before, by either objective."""
    torch.manual_seed(0)
    images = torch.rand(1, 3, 16, 16).expand(8, -1, -1, -1)
    for kind in LOSSES:
        model = UniFlow(tiny().config).for_intervals().train()
        objective = UniFlowObjective(model, distill_weight=0.0, flow_loss=kind, t_distribution="uniform")
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
        error = lambda: (model(images[:1], steps=1, seed=3) - images[:1]).square().mean().item()  # noqa: E731, B023
        with torch.no_grad():
            before = error()
        for _ in range(20):
            optimizer.zero_grad()
            objective(images).total.backward()
            optimizer.step()
        with torch.no_grad():
            assert error() < 0.7 * before


def test_bad_choices(tiny, two):
    with pytest.raises(ValueError, match="flow_loss: expected one of flow_matching, mean_flow, self_distillation, got"):
        UniFlowObjective(two, flow_loss="consistency")
    with pytest.raises(
        ValueError, match=r"flow_loss: flow_matching is not for a flow head whose config has flow_times 2"
    ):
        UniFlowObjective(two)
    with pytest.raises(
        ValueError, match=r"flow_loss: mean_flow is not .* flow_times 1; UniFlow.for_intervals\(\) makes"
    ):
        UniFlowObjective(tiny(), flow_loss="mean_flow")
    with pytest.raises(ValueError, match="share_equal: expected a number in"):
        UniFlowObjective(two, flow_loss="mean_flow", share_equal=2.0)
    with pytest.raises(ValueError, match="flow_times: expected an integer of at most 2, got 3"):
        UniFlowConfig.preset("tiny", flow_times=3)


def test_the_command_tunes_a_checkpoint_and_goes_on(tiny, tmp_path, picture_folder):
    """From scratch too; a resumed run is the one that never stopped."""
    tiny().save_pretrained(tmp_path / "start")
    sizes = "{image_size: 16, num_decoder_layers: 1}"
    for name, model in (("tuned", f"checkpoint: {tmp_path / 'start'}"), ("new", f"preset: tiny, config: {sizes}")):
        file = tmp_path / f"{name}.yaml"
        file.write_text(
            f"model: {{{model}}}\ndata: {{folder: {picture_folder}}}\n"
            "objective: {flow_loss: self_distillation, share_equal: 0.5, distill_weight: 0}\n"
            "recipe: {stages: [{steps: 2}], batch_size: 2, save_every: 1}\n"
        )
        out = tmp_path / name
        assert run(["train", str(file), "--out", str(out)]) == 0
        first, last = (out / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
        trained = UniFlow.from_pretrained(last)
        assert trained.config.flow_times == 2
        was = trained.state_dict()
        assert run(["train", str(file), "--out", str(out), "--resume", str(first), "--force"]) == 0
        now = UniFlow.from_pretrained(last).state_dict()
        assert all(torch.equal(now[key], was[key]) for key in was)
