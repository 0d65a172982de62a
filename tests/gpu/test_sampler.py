"""Decoder on a GPU: golden pictures from graphs, other shapes, streams and threads, memory, no waiting."""

import threading

import pytest
import torch

from uniflow import UniFlow, UniFlowConfig, denormalize
from uniflow.sampler import decoding_bytes_per_token, noise_of
from uniflow_kernels import backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("exact_float32"),
]


def small(dtype=torch.bfloat16, **changes):
    config = UniFlowConfig.preset("base", num_hidden_layers=1, global_blocks_depth=2, num_decoder_layers=3, **changes)
    model = UniFlow(config)
    with torch.no_grad():
        for parameter in model.flow_head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.to("cuda", dtype).eval()


def inputs(model, batch, tokens=1024):
    latents = torch.randn(batch, tokens, model.config.latent_ch, device="cuda").to(model.dtype)
    return latents, torch.randn(batch, tokens, model.config.patch_values, device="cuda")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear_1", {"steps": 1}),
        ("linear_4", {"steps": 4}),
        ("pow_0.25_4", {"steps": 4, "schedule": "pow_0.25"}),
        ("linear_4_cfg_2", {"steps": 4, "cfg": 2.0}),
    ],
)
def test_golden_images_from_a_graph(golden_model, golden, name, options):
    model = golden_model.cuda()
    noise = golden["in.noise"].view(2, 16, 588)
    decoder = model.compile_decoder(2, dtype=torch.float32, **options)
    assert len(decoder._graphs) == 1
    expected = golden[f"out.image.{name}"]
    for _ in range(3):
        pictures = decoder(golden["out.latent"], noise=noise).cpu()
        assert (pictures - denormalize(expected).clamp(0, 1)).abs().max() < 1e-5 * expected.abs().max()
    assert len(decoder._graphs) == 2  # one makes its noise, one is given it


def test_replays_are_equal_to_eager_and_see_new_weights_and_seeds():
    model = small()
    decoder = model.compile_decoder(4, steps=2, cfg=2.0)
    for step in range(3):
        latents, _ = inputs(model, 4)
        seeds = torch.arange(4, device="cuda") + step
        with torch.no_grad():
            model.decoder_pos_embed.add_(0.1 * step)
            eager = decoder.sampler(latents, seeds, (448, 448))
        assert torch.equal(decoder(latents, seed=seeds), eager)
    assert len(decoder._graphs) == 1
    drawn = [decoder(latents) for _ in range(2)]
    assert not torch.equal(*drawn)


def test_noise_is_the_same_on_the_cpu_and_on_every_backend():
    start, tokens = torch.tensor([2**62 + 1, 0]), slice(5, 1029)
    expected = noise_of(start, tokens, 588)
    for name in ("eager", "triton"):
        with backend(name):
            assert (noise_of(start.cuda(), tokens, 588).cpu() - expected).abs().max() < 1e-6


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_generators_noise_does_not_depend_on_batches_and_pieces(device):
    model = small(torch.float32)
    latents, _ = inputs(model, 4)
    seeded = torch.Generator(device).manual_seed
    needed = 1024 * max(decoding_bytes_per_token(model.config, model.dtype, False))
    with torch.inference_mode():
        whole = model.decode(latents, generator=seeded(5))
        for memory in (needed, needed - 1):
            assert torch.allclose(model.decode(latents, generator=seeded(5), max_memory=memory), whole, atol=1e-4)
        generator = seeded(5)
        parts = [model.decode(part, generator=generator) for part in latents.split(3)]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-4)


def test_other_batches_and_sizes_run_and_get_graphs_when_they_come_back():
    model = small()
    decoder = model.compile_decoder(4)
    for graphs in (1, 2, 2):
        latents, noise = inputs(model, 2, 512)
        with torch.no_grad():
            eager = decoder.sampler(latents, noise, (224, 448))
        assert torch.equal(decoder(latents, noise=noise, size=(224, 448)), eager)
        assert len(decoder._graphs) == graphs


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_stays_within_its_bound(dtype, cfg):
    model = small(dtype)
    latents, _ = inputs(model, 16)
    seeds = torch.arange(16, device="cuda")
    needed = 1024 * max(decoding_bytes_per_token(model.config, model.dtype, cfg != 1.0))
    for memory in (3 * needed, needed - 1):
        with torch.no_grad():
            model.decode(latents[:1], seed=seeds[:1], cfg=cfg, max_memory=memory)  # workspaces of libraries
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            images = model.decode(latents, steps=2, seed=seeds, cfg=cfg, max_memory=memory)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before - images.nbytes <= memory


def test_a_stream_gives_each_batch_and_computes_the_next_before():
    model = small()
    decoder = model.compile_decoder(4)
    batches = [inputs(model, batch)[0].cpu() for batch in (4, 4, 4, 2)]
    generator = torch.Generator().manual_seed(3)
    expected = [decoder(batch, generator=generator).cpu() for batch in batches]
    taken = []
    given = (taken.append(i) or batch for i, batch in enumerate(batches))
    for i, pictures in enumerate(decoder.stream(given, torch.Generator().manual_seed(3))):
        assert pictures.is_pinned()
        assert torch.equal(pictures, expected[i])
        assert taken == list(range(min(i + 2, 4)))


def test_streams_and_threads():
    model = small()
    decoder = model.compile_decoder(2)
    drawn = [inputs(model, 2) for _ in range(4)]
    given = [(latents, {"noise": noise} if i % 2 else {"seed": i}) for i, (latents, noise) in enumerate(drawn)]
    expected = [decoder(latents, **start) for latents, start in given]
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [decoder(given[i][0], **given[i][1]) for _ in range(10)]
            torch.cuda.current_stream().synchronize()
        wrong.extend(i for result in results if not torch.equal(result, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_replay_does_not_wait_for_the_device():
    model = small()
    decoder = model.compile_decoder(2)
    latents, noise = inputs(model, 2)
    starts = [{}, {"noise": noise}, {"seed": 5}, {"seed": torch.tensor([5, 6])}]
    starts += [{"generator": torch.Generator(device).manual_seed(5)} for device in ("cpu", "cuda")]
    for start in starts:
        for _ in range(2):  # the second of a kind is captured
            decoder(latents, **start)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for start in starts:
            decoder(latents, **start)
            with torch.inference_mode():
                model.decode(latents, **start)
    finally:
        torch.cuda.set_sync_debug_mode("default")
