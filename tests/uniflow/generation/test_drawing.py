"""Drawing against the sampler's definition: guidance and where it applies, seeds, statistics."""

import pytest
import torch

from tests.uniflow.generation.conftest import tiny
from uniflow.generation import draw_latents, picture_seeds
from uniflow.generation.drawing import usual_schedule
from uniflow.latent_set import ChannelStatistics
from uniflow_kernels import seeded_noise
from uniflow_kernels.solvers import Plan

SEEDS = torch.tensor([3, 1 << 62, 7])


@pytest.fixture(scope="module")
def model():
    made = tiny()
    made.set_statistics(ChannelStatistics(torch.arange(6.0), 1 + torch.arange(6.0)))
    return made


def start():
    return seeded_noise(3 * 16, 6, SEEDS).view(3, 16, 6)


def test_guidance_leads_away_from_no_label_where_it_applies(model):
    labels = torch.tensor([0, 1, 2])
    found = draw_latents(model, SEEDS, labels, Plan(2, cfg=3.0, cfg_interval=(0.0, 2.0)))
    x = start()
    with torch.no_grad():
        x = x + 0.5 * model(x, torch.tensor(0.0), labels)  # an infinite sigma is above the interval
        given, none = (model(x, torch.tensor(0.5), each) for each in (labels, None))
        x = x + 0.5 * (none + 3 * (given - none))
    assert torch.allclose(found, x * (1 + torch.arange(6.0)) + torch.arange(6.0), atol=1e-4)


def test_a_picture_depends_on_its_seed_and_label_alone(model):
    labels = torch.tensor([0, 1, 2])
    plan = Plan(3, solver="heun", cfg=2.0)
    together = draw_latents(model, SEEDS, labels, plan)
    alone = draw_latents(model, SEEDS[1:2], labels[1:2], plan)
    assert torch.allclose(alone, together[1:2], atol=1e-4)
    assert not torch.allclose(draw_latents(model, SEEDS, labels.flip(0), plan)[0], together[0], atol=1e-2)
    unlabelled = draw_latents(model, SEEDS, None, plan)  # guided away from itself: not at all
    assert torch.allclose(unlabelled, draw_latents(model, SEEDS, None, plan._replace(cfg=1.0)), atol=1e-4)
    cold = draw_latents(model, SEEDS, labels, Plan(1), temperature=0.0)
    assert torch.allclose(cold[0], draw_latents(model, SEEDS[1:], labels[:2], Plan(1), temperature=0.0)[0], atol=1e-4)


def test_seeds_are_those_of_the_number():
    latents, decoder = picture_seeds(7, range(100, 104))
    assert torch.equal(picture_seeds(7, [102])[0], latents[2:3])
    others = torch.cat([latents, decoder, *picture_seeds(8, range(100, 104))])
    assert len(set(others.tolist())) == 16
    assert others.min() >= 0


def test_the_usual_schedule_is_that_of_the_training():
    assert usual_schedule(tiny()) == "linear"
    assert usual_schedule(tiny(noise_shift=2.5)) == "shifted_2.5"


def test_what_cannot_be_drawn_is_refused(model):
    with pytest.raises(ValueError, match="labels: expected numbers from 0 to 2, got 0 to 4"):
        draw_latents(model, SEEDS, torch.tensor([0, 1, 4]), Plan(1))
    with pytest.raises(ValueError, match="labels: the generator was made without classes"):
        draw_latents(tiny(classes=None), SEEDS, torch.arange(3), Plan(1))
    with pytest.raises(ValueError, match="cfg: expected 1 for a generator without classes"):
        draw_latents(tiny(classes=None), SEEDS, None, Plan(1, cfg=2.0))
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        draw_latents(model, SEEDS, None, Plan(0))
