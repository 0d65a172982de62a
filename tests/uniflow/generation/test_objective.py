"""The loss against its definition, and what it is made of: samples, labels that are left out, times."""

import pytest
import torch

from tests.uniflow.generation.conftest import tiny, write_set
from uniflow.generation import FlowTransformerObjective, LatentSamples
from uniflow.generation.objective import shifted
from uniflow.latent_set import ChannelStatistics, LatentSet


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_the_loss_is_that_of_the_velocity(shift):
    model = tiny(noise_shift=shift)
    model.set_statistics(ChannelStatistics(torch.arange(6.0), 1 + torch.arange(6.0)))
    latents, labels = 3 * torch.randn(5, 16, 6), torch.arange(5) % 3
    torch.manual_seed(1)
    found = FlowTransformerObjective(model, label_dropout=0.0, t_distribution="uniform")(latents, labels)
    torch.manual_seed(1)
    torch.rand(5)  # of the dropout
    noise = torch.randn(latents.shape)
    level = 1 - torch.rand(5).double()
    t = (1 - shift * level / (1 + (shift - 1) * level)).float()
    data = (latents - torch.arange(6.0)) / (1 + torch.arange(6.0))
    way = t[:, None, None]
    expected = (model(way * data + (1 - way) * noise, t, labels) - (data - noise)).square().mean()
    assert torch.allclose(found.total, expected, rtol=1e-5)
    assert found.measured() == {}


def test_labels_are_left_out_as_often_as_said():
    seen = []
    model = tiny()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    torch.manual_seed(0)
    latents, labels = torch.randn(400, 16, 6), torch.arange(400) % 3
    for dropout, least, most in ((0.0, 0, 0), (0.25, 75, 125), (1.0, 400, 400)):
        FlowTransformerObjective(model, dropout)(latents, labels)
        dropped = seen[-1] == 3
        assert least <= int(dropped.sum()) <= most
        assert torch.equal(seen[-1][~dropped], labels[~dropped])
    FlowTransformerObjective(tiny(classes=None))(latents)
    with pytest.raises(ValueError, match="label_dropout: expected a probability"):
        FlowTransformerObjective(model, 1.5)
    with pytest.raises(ValueError, match="t_distribution: expected one of"):
        FlowTransformerObjective(model, t_distribution="normal")


def test_more_shift_is_more_noise():
    t = torch.linspace(0, 1, 5)
    assert torch.equal(shifted(t, 1.0), t)
    moved = shifted(t, 3.0)
    assert moved[[0, -1]].tolist() == [0, 1]
    assert (moved[1:-1] < t[1:-1]).all()


def test_samples_are_the_sets_latents_with_their_labels(latents, tokenizer, tmp_path):
    found = LatentSet(latents)
    samples = LatentSamples(found, seed=3)
    epoch = [samples[position] for position in range(12)]
    numbers = [int(sample.name.split()[1]) for sample in epoch]
    assert sorted(numbers) == list(range(12))
    assert numbers != sorted(numbers)
    mirrored = 0
    for number, sample in zip(numbers, epoch, strict=True):
        latent, label = sample.value
        assert label == found.labels[number]
        straight, flipped = (found.latent(number, each) for each in (False, True))
        assert torch.equal(latent, straight) or torch.equal(latent, flipped)
        mirrored += torch.equal(latent, flipped)
    assert 2 <= mirrored <= 10
    again = LatentSamples(LatentSet(latents), seed=3)[5].value  # depends on the position alone
    assert all(map(torch.equal, again, epoch[5].value))
    assert [int(samples[position].name.split()[1]) for position in range(12, 24)] != numbers
    batch = samples.collate([sample.value for sample in epoch[:4]])
    assert [part.shape for part in batch] == [(4, 16, 6), (4,)]
    (alone,) = LatentSamples(found, flip=False, labels=False)[0].value
    assert alone.shape == (16, 6)
    bare = LatentSet(write_set(tmp_path / "bare", tokenizer, labels=False, flips=False))
    with pytest.raises(ValueError, match=r"flip: .*bare has no latents of mirror images"):
        LatentSamples(bare)
    with pytest.raises(ValueError, match=r"labels: .*bare has none"):
        LatentSamples(bare, flip=False)
