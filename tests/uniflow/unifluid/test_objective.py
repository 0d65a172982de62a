import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from uniflow.flow import sample_t
from uniflow.unifluid.captions import Drawings, Readings
from uniflow.unifluid.drawing import draw_tokens
from uniflow.unifluid.objective import UniFluidObjective
from uniflow.unifluid.orders import draw_groups, draw_orders
from uniflow.unifluid.slots import FEATURES, TOKENS
from uniflow.unifluid.texts import padded, prompt_ids

N = 12


class Tokens(nn.Module):
    """An image tokenizer: a picture of 6x8 pixels in patches of 2, five numbers each."""

    channels, grid, image_size = 5, (3, 4), (6, 8)

    def encode(self, images):
        patches = F.pixel_unshuffle(images, 2).flatten(2).transpose(1, 2)
        return patches[..., :5]

    def fingerprint(self):
        return "tokens"


class Vision(nn.Module):
    width, image_size, merge = 7, (6, 8), 1

    def forward(self, images):
        return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)[..., 5:]

    def fingerprint(self):
        return "vision"


@pytest.fixture
def batch(texts, asked):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 6, 8), dtype=torch.uint8, generator=generator)
    answer = torch.tensor([[False, True, True], [True, True, True]])
    return Drawings(images, *texts), Readings(images.flip(0), *asked(N), answer)


def no_drawings(drawings):
    return Drawings(*(part[:0] for part in drawings[:3]))


def no_readings(readings):
    return Readings(*(part[:0] for part in readings))


def test_the_losses_are_what_they_are_said_to_be(make_model, batch):
    model = make_model()
    objective = UniFluidObjective(model, Tokens(), Vision(), image_weight=0.25, head_repeats=3)
    torch.manual_seed(5)
    losses = objective(*batch)
    torch.testing.assert_close(losses.total, losses.text + 0.25 * losses.image)
    measured = {name: value.item() for name, value in losses.measured().items()}
    assert measured == {"text": losses.text.item(), "image": losses.image.item(), "image_weight": 0.25}

    # image: k draws of time and noise for each token, one after the other in plain PyTorch
    torch.manual_seed(5)
    drawings, readings = batch
    from uniflow import normalize

    with torch.no_grad():
        tokens = Tokens().encode(normalize(drawings.images))
        order = draw_orders(2, N, "random", torch.device("cpu"))
        groups = draw_groups(2, N, torch.device("cpu"))
        states = model.draw_states(tokens, drawings.ids, drawings.real, order, groups)
        ordered = torch.stack([row[places] for row, places in zip(tokens, order, strict=True)])
        noise = torch.randn(6, N, 5)
        t = sample_t((6, N), "lognormal")
        errors = []
        for draw in range(3):
            x0, time = noise[2 * draw : 2 * draw + 2], t[2 * draw : 2 * draw + 2, :, None]
            x_t = time * ordered + (1 - time) * x0
            velocity = model.head(x_t.flatten(0, 1), 1000 * time.flatten(), states.flatten(0, 1)).view_as(x_t)
            errors.append((velocity - (ordered - x0)).square().mean())
        torch.testing.assert_close(losses.image, torch.stack(errors).mean())

        # text: each answer's ids from what stands before them
        features = Vision()(normalize(readings.images))
        total, count = 0.0, 0
        for row in range(2):
            for column in torch.nonzero(readings.answer[row])[:, 0] - 3:
                stop = N + 5 + column + 1
                ids, real = readings.ids[row : row + 1, :stop], readings.real[row : row + 1, :stop]
                logits = model.answer_logits(features[row : row + 1], ids, real, 1)[0]
                total, count = total + F.cross_entropy(logits, ids[0, -1:]), count + 1
        torch.testing.assert_close(losses.text, total / count)


def test_drawings_see_their_sources(make_model, batch):
    model = make_model(sources="both", backbone={"max_position_embeddings": 128})
    objective = UniFluidObjective(model, Tokens(), Vision())
    from uniflow import normalize

    images = batch[0].images
    slots = torch.tensor([[FEATURES] * N + [TOKENS] * N] * 2)
    ids, real = torch.cat([slots, batch[0].ids], 1), torch.cat([torch.ones(2, 2 * N).bool(), batch[0].real], 1)
    torch.manual_seed(5)
    loss = objective(Drawings(images, ids, real, images.flip(0), images.flip(1)), no_readings(batch[1])).image
    torch.manual_seed(5)
    with torch.no_grad():
        tokens = model.normalized(Tokens().encode(normalize(images)))
        order, groups = draw_orders(2, N, "random", torch.device("cpu")), draw_groups(2, N, torch.device("cpu"))
        seen = Vision()(normalize(images.flip(1))), model.normalized(Tokens().encode(normalize(images.flip(0))))
        states = model.draw_states(tokens, ids, real, order, groups, *seen)
        ordered = tokens.gather(1, order.unsqueeze(-1).expand_as(tokens))
        expected = objective._loss_at_times(states, ordered)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="drawings: the objective was made without vision, expected no sources"):
        UniFluidObjective(model, Tokens())(Drawings(images, ids, real, images, images), no_readings(batch[1]))


@pytest.mark.parametrize("sources", ["features", "tokens", "both"])
def test_without_sources_the_same_parameters_have_a_gradient(make_model, batch, sources):
    # else processes of which one has a source and the other has none would wait for each other
    model = make_model(sources=sources, backbone={"max_position_embeddings": 128})
    objective = UniFluidObjective(model, Tokens(), Vision())
    images, ids, real = batch[0][:3]
    marks = [FEATURES] * (N * (sources != "tokens")) + [TOKENS] * (N * (sources != "features"))
    before = torch.tensor([marks] * 2)
    with_sources = Drawings(
        images, torch.cat([before, ids], 1), torch.cat([before < 0, real], 1), images.flip(0), images.flip(1)
    )
    found = []
    for drawings in (with_sources, Drawings(images, ids, real, images[:0], images[:0])):
        model.zero_grad()
        objective(drawings, no_readings(batch[1])).total.backward()
        found.append({name: p.grad.abs().max().item() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    only_of_sources = {name for name, largest in found[1].items() if largest == 0 < found[0][name]}
    assert {name.split(".")[0] for name in only_of_sources} - {"backbone"} == {
        *({"vision_proj"} if sources != "tokens" else ()),
        *({"source_embedding"} if sources != "features" else ()),
    }


def test_either_part_may_be_empty(make_model, batch):
    drawings, readings = batch
    objective = UniFluidObjective(make_model(), Tokens(), Vision(), image_weight=2.0)
    losses = objective(drawings, no_readings(readings))
    assert losses.text == 0
    torch.testing.assert_close(losses.total, 2 * losses.image)
    losses = objective(no_drawings(drawings), readings)
    assert losses.image == 0
    torch.testing.assert_close(losses.total, losses.text)
    assert objective(no_drawings(drawings), no_readings(readings)).total == 0


@pytest.mark.parametrize(
    ("head", "order"), [("flow", "random"), ("flow", "raster"), ("ddpm", "random"), ("self_distillation", "random")]
)
def test_training_lowers_both_losses(make_model, batch, head, order):
    model = make_model(head=head, order=order)
    model.head.reset_parameters()
    objective = UniFluidObjective(model, Tokens(), Vision())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    history = []
    for _ in range(60):
        losses = objective(*batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append((losses.text.item(), losses.image.item()))
    first, last = torch.tensor(history[:10]).mean(0), torch.tensor(history[-10:]).mean(0)
    assert last[0] < 0.2 * first[0]
    assert last[1] < 0.85 * first[1]


@pytest.mark.parametrize("head", ["mean_flow", "self_distillation"])
def test_a_head_for_few_steps_learns_between_two_times(make_model, batch, head):
    objective = UniFluidObjective(make_model(head=head), Tokens(), head_repeats=3)
    seen = []
    objective.student.head.time_embed.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    objective(batch[0], no_readings(batch[1])).total.backward()
    times = torch.cat(seen)
    assert times.shape[1] == 2
    assert (times[:, 0] < times[:, 1]).any()
    assert all(p.grad is not None and p.grad.any() for p in objective.student.head.parameters())
    assert objective.student.place_embedding.grad.any()


def test_conditions_are_not_copied_for_the_repeats(make_model, batch, monkeypatch):
    objective = UniFluidObjective(make_model(), Tokens(), head_repeats=4)
    rows = []
    objective.student.head.cond_embed.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape))
    objective(batch[0], no_readings(batch[1]))
    assert rows == [(2, N, 32)]


@pytest.mark.parametrize("backbone", [{}, {"model_type": "gpt2"}], ids=["llama", "gpt2"])
def test_checkpointing_changes_no_number_and_keeps_less(make_model, batch, backbone):
    """Dropout of GPT-2 is drawn again as it was."""

    kept = {}
    for checkpointing in (False, True):
        model = make_model(backbone).train()
        model.gradient_checkpointing_enable(checkpointing)
        torch.manual_seed(0)
        numbers = 0

        def count(tensor):
            nonlocal numbers
            numbers += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            losses = UniFluidObjective(model, Tokens(), Vision())(*batch)
        losses.total.backward()
        kept[checkpointing] = numbers, losses.total.detach(), [p.grad for p in model.parameters()]
    assert kept[True][0] < 0.6 * kept[False][0]
    torch.testing.assert_close(kept[True][1:], kept[False][1:], rtol=1e-5, atol=1e-6)


def test_bad_input(make_model, batch):
    with pytest.raises(ValueError, match="head_repeats: expected at least 1"):
        UniFluidObjective(make_model(), Tokens(), head_repeats=0)
    with pytest.raises(ValueError, match="t_distribution"):
        UniFluidObjective(make_model(), Tokens(), t_distribution="sometimes")
    with pytest.raises(ValueError, match="tokenizer: gives 3x4 tokens of 5 channels, expected 2x6 of 5"):
        UniFluidObjective(make_model(grid=(2, 6)), Tokens())
    with pytest.raises(ValueError, match="tokenizer: has other weights"):
        UniFluidObjective(make_model(tokenizer="another"), Tokens())
    with pytest.raises(ValueError, match="vision: gives features of 7 channels, expected 9"):
        UniFluidObjective(make_model(vision_channels=9), Tokens(), Vision())
    with pytest.raises(ValueError, match="vision: merges 1 patches a side, expected 2"):
        UniFluidObjective(make_model(vision_merge=2), Tokens(), Vision())
    with pytest.raises(ValueError, match="vision: has other weights"):
        UniFluidObjective(make_model(vision="another"), Tokens(), Vision())
    with pytest.raises(ValueError, match="made without vision"):
        UniFluidObjective(make_model(), Tokens())(*batch)
    UniFluidObjective(make_model(tokenizer="tokens", vision="vision"), Tokens(), Vision())


def test_an_untrained_head_has_the_loss_of_saying_nothing(make_model, batch):
    # v = 0 at the start: the mean square of x1 - x0, which is about 1 + that of the tokens
    model = make_model()
    model.head.reset_parameters()
    objective = UniFluidObjective(model, Tokens(), head_repeats=64)
    from uniflow import normalize

    tokens = Tokens().encode(normalize(batch[0].images))
    expected = 1 + tokens.square().mean().item()
    torch.manual_seed(0)
    loss = objective(batch[0], no_readings(batch[1])).image.item()
    assert math.isclose(loss, expected, rel_tol=0.05)


@pytest.mark.parametrize("head", ["flow", "ddpm"])
def test_the_same_bits_whatever_the_defaults_are(make_model, batch, text_tokenizer, same_bits, head):
    model = make_model(head=head)
    objective = UniFluidObjective(model, Tokens(), Vision())

    def call():
        prompts = padded([prompt_ids(text_tokenizer, text) for text in ("a seven", None)], text_tokenizer)
        drawn = draw_tokens(model, *prompts, 2, head_steps=2, generator=torch.Generator().manual_seed(1))
        return [*prompts, drawn, *(value.detach() for value in objective(*batch).measured().values())]

    same_bits(call)
