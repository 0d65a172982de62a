"""The compiled encoder: the latents of `encode`; graphs with a stand-in."""

import copy
import pickle

import pytest
import torch

from tests.uniflow_kernels.test_graphs import StandIn, stand_in
from uniflow import encoding

__all__ = ["stand_in"]  # a fixture


def pictures(batch=3, size=(16, 16)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_those_of_encode(tiny, dtype):
    model = tiny().to(dtype)
    encoder = model.compile_encoder(3)
    for images in (pictures(), pictures(1), pictures(2, (8, 24)), pictures(0)):
        latents = encoder(images)
        assert torch.equal(latents, model.encode(images))
        assert latents.dtype == dtype
        assert not latents.requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_copies_and_pickles(tiny, copied):
    encoder = tiny().compile_encoder(2, size=(8, 24))
    expected, other = encoder(pictures(2, (8, 24))), copied(encoder)
    with torch.no_grad():
        encoder.model.chal_proj.c_fc.bias.add_(1)
    assert torch.equal(other(pictures(2, (8, 24))), expected)


def test_replays_see_new_inputs_and_weights_and_stop_for_hooks(tiny, monkeypatch):
    monkeypatch.setattr(encoding, "why_not_graph", lambda device, read: None)
    model = tiny()
    encoder, images = model.compile_encoder(3), pictures()
    results = [encoder(i * images) for i in range(4)]
    assert StandIn.captures == 1
    assert all(torch.equal(latents, model.encode(i * images)) for i, latents in enumerate(results))
    with torch.no_grad():
        model.embeddings.class_embedding.add_(1)
    assert torch.equal(encoder(images), model.encode(images))
    # what only decoding calls may change and be watched; what encoding calls may not
    model.flow_head.double().register_forward_hook(print)
    encoder(images)
    assert StandIn.captures == 1
    model.encoder.layers[0].mlp = torch.nn.Identity()
    for _ in range(3):
        assert torch.equal(encoder(images), model.encode(images))
    assert StandIn.captures == 2
    calls = []
    model.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        encoder(images)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.compile_encoder(0), ValueError, "batch: expected at least 1, got 0"),
        (lambda m: m.compile_encoder(1, (16, 18)), ValueError, r"size: expected positive multiples of the patch \(4\)"),
        (lambda m: m.compile_encoder(1, (0, 16)), ValueError, r"size: expected positive multiples of the patch \(4\)"),
        (lambda m: m.compile_encoder(1)(torch.zeros(1, 3, 16, 18)), ValueError, "images: height and width must be"),
        (lambda m: m.compile_encoder(1)(torch.zeros(3, 16, 16)), ValueError, r"images: expected shape \[B, 3, H, W\]"),
        (
            lambda m: m.compile_encoder(1)(torch.zeros(1, 3, 16, 16).int()),
            TypeError,
            "images: expected normalised floats",
        ),
    ],
)
def test_bad_input_names_the_argument(tiny, call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(tiny())
