import numpy as np
import pytest
import torch

from uniflow import EncoderTeacher
from uniflow.evaluation.probing import Labelled, PooledLayers, linear_accuracy, neighbour_accuracy, split_by_class

datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def digits():
    """Pixels of 600 digits to learn of, and of 200 others."""
    data = datasets.load_digits()
    features, labels = data.data.astype(np.float32)[:800], data.target[:800]
    return Labelled(features[:600], labels[:600]), Labelled(features[600:], labels[600:])


def test_layers_are_pooled_over_the_patches_or_the_class_token(tiny):
    model = tiny()
    images = torch.randn(2, 3, 16, 24)
    encoder = EncoderTeacher.copy_of(model)
    states = model.hidden_states(images)
    depth = len(states) - 1
    mean = PooledLayers(encoder, [depth, 1])(images)
    assert torch.allclose(mean, torch.stack([states[layer][:, 1:].mean(1) for layer in (1, depth)]), atol=1e-6)
    taken = PooledLayers(encoder, pooling="class")
    assert taken.layers == tuple(sorted({-(-depth * quarter // 4) for quarter in (1, 2, 3, 4)}))
    assert torch.allclose(taken(images), torch.stack([states[layer][:, 0] for layer in taken.layers]), atol=1e-6)
    assert PooledLayers(encoder.lowered(torch.bfloat16))(images).dtype == torch.float32


def test_layers_behind_the_last_that_is_asked_do_not_run(tiny):
    encoder = EncoderTeacher.copy_of(tiny())
    encoder.encoder.layers[1] = torch.nn.Identity()  # which takes no more than one argument
    encoder.encoder.layers[1].forward = None
    assert PooledLayers(encoder, [1])(torch.randn(1, 3, 16, 16)).shape[0] == 1


def test_layers_and_poolings_that_there_are_not(tiny):
    encoder = EncoderTeacher.copy_of(tiny())
    depth = len(encoder.encoder.layers)
    for layers in ([0], [depth + 1], []):
        with pytest.raises(ValueError, match=f"layers: expected numbers from 1 to {depth}, got"):
            PooledLayers(encoder, layers)
    with pytest.raises(ValueError, match="pooling: expected one of mean, class, got 'max'"):
        PooledLayers(encoder, pooling="max")
    encoder.embeddings.prefix_tokens = 0
    with pytest.raises(ValueError, match="the encoder has no class token"):
        PooledLayers(encoder, pooling="class")


def test_neighbours_vote_by_their_cosine(digits):
    """Against the formula, written out; few neighbours and many."""
    seen, unseen = digits
    one, other = (each.features / np.linalg.norm(each.features, axis=1, keepdims=True) for each in digits)
    cosines = other.astype(np.float64) @ one.T.astype(np.float64)
    found = {}
    for count in (1, 20, 200):
        nearest = np.argsort(-cosines, axis=1)[:, :count]
        voices = np.zeros((len(cosines), 10))
        for row in range(len(cosines)):
            np.add.at(voices[row], seen.labels[nearest[row]], np.exp(cosines[row, nearest[row]] / 0.07))
        found[count] = neighbour_accuracy(seen, unseen, count)
        assert found[count] == pytest.approx(100 * (voices.argmax(1) == unseen.labels).mean())
    assert found[200] < found[1]  # so that the count matters here
    with pytest.raises(ValueError, match="neighbours: expected 1 to 600, the pictures that were seen, got 601"):
        neighbour_accuracy(seen, unseen, 601)


def test_the_linear_classifier_does_not_depend_on_the_features_scale(digits):
    """Standardised: features of very different ranges count alike; what carries nothing gives chance."""
    seen, unseen = digits
    accuracy = linear_accuracy(seen, unseen)
    assert 80 < accuracy < 100
    scales = np.geomspace(1e-3, 1e3, 64).astype(np.float32)
    scaled = [Labelled(each.features * scales + 5, each.labels) for each in digits]
    assert linear_accuracy(*scaled) == pytest.approx(accuracy, abs=1)
    noise = np.random.default_rng(0).normal(size=(800, 4)).astype(np.float32)
    assert linear_accuracy(Labelled(noise[:600], seen.labels), Labelled(noise[600:], unseen.labels)) < 30


@pytest.mark.parametrize("c", [1e-4, 1.0])
def test_the_linear_classifier_is_the_best_one_for_its_penalty(digits, c):
    """Against torch, on the loss as it is written: the bias has no penalty, C weighs the errors."""
    seen, unseen = (Labelled(each.features[:200, 10:40], each.labels[:200]) for each in digits)
    mean, deviation = seen.features.mean(0, dtype=np.float64), seen.features.std(0, dtype=np.float64)
    x, y = (torch.from_numpy((each.features - mean) / np.where(deviation > 0, deviation, 1)) for each in (seen, unseen))
    weight = torch.zeros(10, 30, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_change=0, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        errors = torch.nn.functional.cross_entropy(x @ weight.T + bias, torch.from_numpy(seen.labels), reduction="sum")
        value = errors + weight.square().sum() / (2 * c)
        value.backward()
        return value

    optimizer.step(loss)
    named = (y @ weight.T + bias).argmax(1).numpy()
    assert linear_accuracy(seen, unseen, c) == pytest.approx(100 * (named == unseen.labels).mean())


def test_a_large_penalty_forgets(digits):
    seen, unseen = digits
    assert linear_accuracy(seen, unseen, c=1e-4) < linear_accuracy(seen, unseen) - 2
    with pytest.warns(UserWarning, match="failed to converge"):
        linear_accuracy(seen, unseen, iterations=2)


def test_every_class_is_split_alike():
    labels = np.repeat([0, 1, 2], (10, 20, 30))
    seen, held_out = split_by_class(labels, 0.2, seed=2**40)
    assert sorted([*seen, *held_out]) == list(range(60))
    assert np.bincount(labels[held_out]).tolist() == [2, 4, 6]
    again, other = split_by_class(labels, 0.2, 2**40)[1], split_by_class(labels, 0.2, 1)[1]
    assert held_out.tolist() == again.tolist() != other.tolist()
    with pytest.raises(ValueError, match="expected at least 2 pictures of each class, got 1 of class 1"):
        split_by_class(np.array([0, 0, 0, 1]), 0.5, 0)
