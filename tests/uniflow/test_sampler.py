"""Sampler and decoder: the pictures of `decode`, in pieces and streams, within its memory; graphs with a stand-in."""

import copy
import os
import pickle
import threading
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import reference
from tests.conftest import randomize
from tests.live_bytes import LiveBytes
from tests.uniflow_kernels.test_graphs import StandIn, stand_in
from uniflow import UniFlow, UniFlowConfig, sampler
from uniflow.encoder import encoding_bytes_per_token
from uniflow.normalization import denormalize, normalize, to_uint8
from uniflow.sampler import decoding_bytes_per_token, noise_of
from uniflow_kernels import backend, seeded_noise

__all__ = ["stand_in"]  # a fixture

GOLDEN = {
    "linear_1": {"steps": 1},
    "linear_4": {"steps": 4},
    "pow_0.25_4": {"steps": 4, "schedule": "pow_0.25"},
    "linear_4_cfg_2": {"steps": 4, "cfg": 2.0},
}


def bytes_per_token(model, guided):
    return decoding_bytes_per_token(model.config, model.dtype, guided)


def inputs(model, batch=3, size=(16, 16)):
    generator = torch.Generator().manual_seed(0)
    tokens = size[0] * size[1] // 16
    return torch.randn(batch, tokens, 8, generator=generator), torch.randn(batch, tokens, 48, generator=generator)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("pieces", [False, True])
def test_golden_images(golden_model, golden, name, pieces):
    noise = golden["in.noise"].view(2, 16, 588)
    expected = golden[f"out.image.{name}"]
    memory = 16 * max(bytes_per_token(golden_model, "cfg" in name)) if pieces else None
    decoder = golden_model.compile_decoder(2, dtype=torch.float32, max_memory=memory, **GOLDEN[name])
    pictures = decoder(golden["out.latent"], noise=noise)
    exact = denormalize(expected).clamp(0, 1)
    assert (pictures - exact).abs().max() < 1e-5 * expected.abs().max()
    images = golden_model.decode(golden["out.latent"], noise=noise, max_memory=memory, **GOLDEN[name])
    assert (images - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"steps": 3, "solver": "heun", "cfg": 2.0, "cfg_interval": (0.1, 5.0)}])
def test_pictures_are_those_of_decode(tiny, options):
    model = tiny()
    latents, noise = inputs(model)
    with torch.no_grad():
        images = model.decode(latents, noise=noise, temperature=0.9, **options)
    decoder = model.compile_decoder(3, temperature=0.9, **options)
    assert (decoder(latents, noise=noise).int() - to_uint8(images).int()).abs().max() <= 1
    assert decoder(latents, noise=noise).dtype == torch.uint8
    floats = model.compile_decoder(3, temperature=0.9, dtype=torch.float32, **options)(latents, noise=noise)
    assert torch.allclose(floats, denormalize(images).clamp(0, 1), atol=1e-5)
    assert not floats.requires_grad


@torch.no_grad()
@pytest.mark.parametrize(("steps", "cfg"), [(1, 1.0), (4, 2.0)])
def test_decoding_holds_no_more_than_the_releases_code(steps, cfg):
    """But for the times, which are embedded beforehand, and the null condition, each a row of the head's width."""
    model = randomize(UniFlow(UniFlowConfig.preset("tiny")))
    config, peaks = model.config, []
    latents, noise = torch.randn(1, config.tokens, config.latent_ch), torch.randn(1, config.tokens, config.patch_values)
    plain = partial(reference.decode, model, latents, noise, steps, cfg)
    for decode in (partial(model.decode, latents, steps, cfg=cfg, noise=noise), plain):
        decode()
        with LiveBytes() as live:
            decode()
        peaks.append(live.peak)
    assert peaks[0] <= peaks[1] + (steps + 1) * config.head_width * 4


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (32, 8)])
def test_pieces_change_nothing(tiny, size):
    """Pictures one by one, and lines of patches one by one."""
    model = tiny()
    latents, noise = inputs(model, size=size)
    tokens, (in_blocks, in_head) = latents.shape[1], bytes_per_token(model, False)
    across = size[1] // 4
    one_picture = tokens * max(in_blocks, in_head)
    one_line = max(tokens * in_blocks, tokens * 64 * 4 + across * in_head)
    assert one_line < one_picture
    calls = []
    model.flow_head.net.input_proj.register_forward_hook(lambda module, args, out: calls.append(out.shape[:-1].numel()))
    with torch.no_grad():
        whole = model.decode(latents, noise=noise, size=size)
        for memory, rows in ((3 * one_picture, [3 * tokens]), (one_picture, [tokens] * 3)):
            calls.clear()
            assert torch.allclose(model.decode(latents, noise=noise, size=size, max_memory=memory), whole, atol=1e-5)
            assert calls == rows
        calls.clear()
        assert torch.allclose(model.decode(latents, noise=noise, size=size, max_memory=one_line), whole, atol=1e-5)
        assert sum(calls) == 3 * tokens
        assert max(calls) < tokens
    with pytest.raises(ValueError, match=f"max_memory: a picture of {size[0]}x{size[1]} needs at least"):
        model.decode(latents, noise=noise, size=size, max_memory=one_line - 1)


WIDE = {"image_size": 28, "patch_size": 14, "hidden_size": 192, "vit_hidden_size": 192}


@pytest.mark.parametrize(
    ("shape", "dtype", "cfg", "solver", "batch"),
    [
        ({}, torch.float32, 1.0, "euler", 64),
        ({}, torch.float32, 2.0, "heun", 4),
        ({}, torch.bfloat16, 2.0, "midpoint", 4),
        (WIDE, torch.float32, 1.0, "heun", 4),
        (WIDE, torch.bfloat16, 1.0, "euler", 4),
        (WIDE, torch.float32, 2.0, "euler", 4),
        ({**WIDE, "flow_width": 640}, torch.float32, 2.0, "euler", 4),
        ({**WIDE, "flow_width": 64}, torch.bfloat16, 1.0, "euler", 4),
    ],
)
def test_memory_stays_within_its_bound(tiny, shape, dtype, cfg, solver, batch):
    """The bytes of all live tensors, those of noise too: without a bound, with one for some pictures, and for lines."""
    model = tiny(**shape).to(dtype)
    tokens = model.config.tokens
    latents = torch.randn(batch, tokens, 8).to(dtype)
    per_token = max(bytes_per_token(model, cfg != 1.0))
    peaks = []
    for memory in (None, batch // 2 * tokens * per_token, tokens * per_token - 1 if batch < 64 else None):
        decoder = model.compile_decoder(batch, steps=2, cfg=cfg, solver=solver, temperature=0.9, max_memory=memory)
        with LiveBytes() as live, backend("eager"):  # compiled parts hold less
            pictures = decoder(latents, generator=torch.Generator().manual_seed(0))
        peaks.append(live.peak - pictures.nbytes)
        assert peaks[-1] <= (memory or batch * tokens * per_token)
    whole, some, lines = peaks
    assert whole > batch * tokens * per_token / 2  # the estimate is no guess from far above
    assert some < 0.6 * whole
    assert batch == 64 or lines < some


@pytest.mark.parametrize(("shape", "dtype"), [({}, torch.float32), (WIDE, torch.bfloat16)])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_memory_in_fp8(tiny, shape, dtype, cfg):
    model = tiny(**shape).to(dtype).lower("fp8")
    latents = torch.randn(64, model.config.tokens, 8).to(dtype)
    bound = 64 * model.config.tokens * max(decoding_bytes_per_token(model.config, dtype, cfg != 1.0, "fp8"))
    outputs, width = 8 * model.config.vit_hidden_size, model.config.vit_hidden_size
    weights = outputs * width * (4 + 4 + 1 + 1)  # in 8 bits, and while they are made so or multiplied in float32
    with LiveBytes() as live:
        pictures = model.compile_decoder(64, steps=2, cfg=cfg)(latents, seed=0)
    assert bound / 3 < live.peak - pictures.nbytes <= bound + weights
    few = model.compile_decoder(64, steps=2, cfg=cfg, max_memory=bound // 4)
    assert few.sampler.at_a_time(64, (4, 4))[0] <= 16


def test_precision_of_a_decoder_and_of_a_model(golden_folder, golden_model, golden):
    latents, noise = golden["out.latent"], golden["in.noise"].view(2, 16, 588)
    asked = golden_model.compile_decoder(2, steps=2, precision="fp8", dtype=torch.float32)(latents, noise=noise)
    plain = golden_model.compile_decoder(2, steps=2, dtype=torch.float32)(latents, noise=noise)
    assert 0.001 < (asked - plain).norm() / plain.norm() < 0.1
    model = type(golden_model).from_pretrained(golden_folder, precision="fp8")
    assert torch.equal(model.compile_decoder(2, steps=2, dtype=torch.float32)(latents, noise=noise), asked)
    with torch.inference_mode():
        assert torch.allclose(denormalize(model.decode(latents, steps=2, noise=noise)).clamp(0, 1), asked, atol=1e-5)
    with pytest.raises(ValueError, match="precision: 'fp8' cannot serve: it is for inference and has no gradient"):
        model.decode(latents)
    for wrong in (
        golden_model.compile_decoder,
        lambda _, **how: type(golden_model).from_pretrained(golden_folder, **how),
    ):
        with pytest.raises(ValueError, match="precision: expected one of fp8"):
            wrong(1, precision="int4")


@pytest.mark.parametrize("shape", [{}, WIDE, {"intermediate_size": 512}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_encoding_stays_within_its_bound(tiny, shape, dtype, precision):
    model = tiny(**shape).to(dtype).at_precision(precision)
    size = model.config.image_size
    pictures = torch.randint(256, (4, 3, size, size), dtype=torch.uint8)
    with torch.inference_mode(), LiveBytes() as live:
        model.encode(normalize(pictures))
    bound = 4 * (1 + model.config.tokens) * encoding_bytes_per_token(model.config, model.dtype, precision)
    largest = max(weight.numel() for layer in model.encoder.layers for weight in layer.parameters())
    weights = 0 if precision is None else largest * (4 + 4 + 1 + 1)  # as in decoding
    assert bound / 2.5 < live.peak <= bound + weights


def test_a_pictures_noise_is_that_of_its_seed(tiny):
    model = tiny()
    latents, _ = inputs(model)
    seeds = torch.tensor([5, 2**62 + 1, 0])
    noise = torch.stack([seeded_noise(16, 48, int(seed)) for seed in seeds])
    with torch.no_grad():
        expected = model.decode(latents, noise=noise)
        assert torch.equal(model.decode(latents, seed=seeds), expected)
        part = model.decode(latents[1:2], seed=seeds[1:2])
        assert torch.allclose(part, expected[1:2], atol=1e-5)
        assert torch.equal(model.decode(latents, seed=seeds, temperature=0.5), model.decode(latents, noise=0.5 * noise))
    decoder = model.compile_decoder(3)
    assert torch.equal(decoder(latents, seed=seeds), decoder(latents, noise=noise))


def test_a_number_stands_for_a_generator_and_the_default_one_for_none(tiny):
    model = tiny()
    latents, _ = inputs(model)
    seed = torch.Generator().manual_seed
    decoder = model.compile_decoder(3, dtype=torch.float32)
    for decode in (lambda **how: model.decode(latents, **how).detach(), lambda **how: decoder(latents, **how)):
        assert torch.equal(decode(seed=5), decode(generator=seed(5)))
        assert torch.equal(decode(seed=5), decode(seed=np.int64(5)))
        assert not torch.equal(decode(seed=5), decode(seed=6))
        torch.manual_seed(5)
        drawn = [decode() for _ in range(2)]
        assert not torch.equal(*drawn)
        torch.manual_seed(5)
        assert torch.equal(decode(), drawn[0])


def test_noise_does_not_depend_on_batches_and_pieces(tiny):
    """A generator's pictures are the same as one batch, as two, one by one and line by line."""
    model = tiny()
    latents, _ = inputs(model, batch=4)
    seed = torch.Generator().manual_seed
    decoder = model.compile_decoder(4, dtype=torch.float32)
    expected = decoder(latents, generator=seed(5))
    in_blocks, in_head = bytes_per_token(model, False)
    for memory in (16 * max(in_blocks, in_head), max(16 * in_blocks, 16 * 64 * 4 + 4 * in_head)):
        small = model.compile_decoder(4, dtype=torch.float32, max_memory=memory)
        assert torch.allclose(small(latents, generator=seed(5)), expected, atol=1e-5)
    generator = seed(5)
    parts = [decoder(part, generator=generator) for part in latents.split(3)]
    assert torch.allclose(torch.cat(parts), expected, atol=1e-5)


def test_noise_does_not_depend_on_the_backend():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("tests/gpu runs the kernels on a GPU")
    start, tokens = torch.tensor([7, 2**40]), slice(3, 9)
    with backend("triton"):
        ours = noise_of(start, tokens, 48)
    assert torch.allclose(ours, noise_of(start, tokens, 48), rtol=0, atol=1e-6)


def test_other_batches_and_sizes(tiny):
    model = tiny()
    decoder = model.compile_decoder(3, size=(16, 16))
    for batch, size in ((3, (16, 16)), (1, (16, 16)), (2, (8, 24)), (0, (16, 16))):
        latents, noise = inputs(model, batch, size)
        with torch.no_grad():
            expected = to_uint8(model.decode(latents, noise=noise, size=size))
        pictures = decoder(latents, noise=noise, size=size)
        assert pictures.shape == (batch, 3, *size)
        assert batch == 0 or (pictures.int() - expected.int()).abs().max() <= 1


def test_a_stream_gives_batches_in_order_and_takes_what_it_needs(tiny):
    model = tiny()
    decoder = model.compile_decoder(2)
    batches = [inputs(model, 2)[0], (inputs(model, 1, (8, 24))[0], (8, 24)), 2 * inputs(model, 2)[0]]
    generator = torch.Generator().manual_seed(1)
    expected = [decoder(batches[0], generator=generator)]
    expected.append(decoder(batches[1][0], generator=generator, size=(8, 24)))
    expected.append(decoder(batches[2], generator=generator))
    taken = []
    stream = decoder.stream(
        (taken.append(i) or batch for i, batch in enumerate(batches)), torch.Generator().manual_seed(1)
    )
    assert taken == []
    for i, pictures in enumerate(stream):
        assert torch.equal(pictures, expected[i])
        assert len(taken) <= i + 2
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda decoder: pickle.loads(pickle.dumps(decoder))])
def test_copies_and_pickles(tiny, copied):
    model = tiny()
    decoder = model.compile_decoder(2, size=(8, 24), steps=2, temperature=0.9, max_memory=10**6, dtype=torch.float32)
    latents, noise = inputs(model, 2, (8, 24))
    expected, other = decoder(latents, noise=noise), copied(decoder)
    assert torch.equal(other(latents, noise=noise), expected)
    with torch.no_grad():
        model.decoder_pos_embed.add_(1)
    assert torch.equal(other(latents, noise=noise), expected)


def test_from_several_threads(tiny):
    model = tiny()
    decoder = model.compile_decoder(2)
    latents, noise = inputs(model, 2)
    given = [(i * latents, {"noise": i * noise} if i % 2 else {"seed": i}) for i in range(4)]
    expected = [decoder(latents, **start) for latents, start in given]
    wrong = []

    def work(i):
        results = [decoder(given[i][0], **given[i][1]) for _ in range(5)]
        wrong.extend(i for result in results if not torch.equal(result, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_module_is_walked_through_before_a_replay(tiny, monkeypatch):
    monkeypatch.setattr(sampler, "why_not_graph", lambda device, read: None)
    model = tiny()
    decoder, (latents, noise) = model.compile_decoder(3), inputs(model)
    for _ in range(2):
        decoder(latents, noise=noise)
    monkeypatch.setattr(StandIn, "__call__", lambda self, inputs: self.inputs[0])
    for name in ("named_modules", "named_children", "named_parameters"):
        monkeypatch.setattr(torch.nn.Module, name, None)
    decoder(latents, noise=noise)


def test_replays_see_new_inputs_and_weights_and_stop_for_hooks(tiny, monkeypatch):
    monkeypatch.setattr(sampler, "why_not_graph", lambda device, read: None)
    model = tiny()
    latents, noise = inputs(model)
    decoder, plain = model.compile_decoder(3), tiny().compile_decoder(3)
    for i in range(4):
        assert torch.equal(decoder(i * latents, noise=noise), decoder.sampler(i * latents, noise, (16, 16)))
    assert StandIn.captures == 1
    for i in range(4):
        seeds = torch.tensor([i, 2, 3])
        assert torch.equal(decoder(latents, seed=seeds), decoder.sampler(latents, seeds, (16, 16)))
    assert StandIn.captures == 2
    drawn = [decoder(latents) for _ in range(2)]
    assert not torch.equal(*drawn)
    before = decoder(latents, noise=noise)
    with torch.no_grad():
        model.chal_unproj.c_fc.bias.add_(1)
    assert not torch.equal(decoder(latents, noise=noise), before)
    assert torch.equal(copy.deepcopy(model).compile_decoder(3)(latents, noise=noise), decoder(latents, noise=noise))
    before = decoder(latents, noise=noise)
    model.flow_head.net.precision = "fp8"
    for _ in range(3):
        assert not torch.equal(decoder(latents, noise=noise), before)
    model.flow_head.net.precision = None
    assert torch.equal(decoder(latents, noise=noise), before)
    # what only encoding calls may change and be watched; what decoding calls may not
    captures, calls = StandIn.captures, []
    model.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.encoder.double()
    decoder(latents, noise=noise)
    assert StandIn.captures == captures
    before = decoder(latents, noise=noise)
    model.global_blocks[0].mlp = torch.nn.Identity()
    for _ in range(3):
        assert not torch.equal(decoder(latents, noise=noise), before)
    assert StandIn.captures == captures + 1
    model.global_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        decoder(latents, noise=noise)
    assert len(calls) == 3
    assert plain(latents, noise=noise).shape == (3, 3, 16, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.compile_decoder(0), ValueError, "batch: expected at least 1, got 0"),
        (lambda m: m.compile_decoder(1, (16, 18)), ValueError, r"size: expected positive multiples of the patch \(4\)"),
        (lambda m: m.compile_decoder(1, steps=0), ValueError, "steps: expected at least 1"),
        (lambda m: m.compile_decoder(1, solver="rk4"), ValueError, "solver: expected one of"),
        (lambda m: m.compile_decoder(1, dtype=torch.int32), TypeError, "dtype: expected a floating point dtype or"),
        (lambda m: m.compile_decoder(1, max_memory=10), ValueError, "max_memory: a picture of 16x16 needs at least"),
        (lambda m: m.compile_decoder(1)(torch.zeros(1, 15, 8)), ValueError, "size: 16x16 has 16 patches of 4, got 15"),
        (lambda m: m.compile_decoder(1)(torch.zeros(1, 16, 9)), ValueError, r"latents: expected shape \[B, N, 8\]"),
        (
            lambda m: m.compile_decoder(1)(torch.zeros(1, 16, 8), noise=torch.zeros(1, 16, 3)),
            ValueError,
            r"noise: expected shape \(1, 16, 48\)",
        ),
        (
            lambda m: m.compile_decoder(1)(torch.zeros(1, 16, 8), generator=torch.Generator(), seed=1),
            ValueError,
            "generator, seed: expected at most one of them",
        ),
        (
            lambda m: m.decode(torch.zeros(1, 16, 8), noise=torch.zeros(1, 16, 48).long()),
            TypeError,
            "noise: expected a f",
        ),
        (lambda m: m.decode(torch.zeros(1, 16, 8), seed=-1), ValueError, r"seed: expected an integer in \[0, 2\^63\)"),
        (
            lambda m: m.decode(torch.zeros(1, 16, 8), seed=torch.zeros(1)),
            TypeError,
            "seed: expected a tensor of torch.int64",
        ),
        (lambda m: m.decode(torch.zeros(1, 16, 8), seed=torch.tensor(1)), ValueError, r"seed: expected shape \(1,\)"),
        *(
            (
                lambda m, seed=seed: m.decode(torch.zeros(1, 16, 8), seed=seed),
                TypeError,
                "seed: expected an integer, or",
            )
            for seed in (1.0, "1", [1])
        ),
        (
            lambda m: m.decode(torch.zeros(1, 16, 8), generator=[torch.Generator()]),
            TypeError,
            "generator: expected one torch.Generator, got list",
        ),
    ],
)
def test_bad_input_names_the_argument(tiny, call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(tiny())
