"""Decoder on a GPU: golden pictures from graphs, other shapes, streams and threads, memory, no waiting."""

import threading

import pytest
import torch

from uniflow import UniFlow, UniFlowConfig, denormalize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    yield
    torch.set_float32_matmul_precision(before)


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
    for _ in range(2):
        pictures = decoder(golden["out.latent"], noise=noise).cpu()
        assert (pictures - denormalize(expected).clamp(0, 1)).abs().max() < 1e-5 * expected.abs().max()
    assert len(decoder._graphs) == 1


def test_replays_are_equal_to_eager_and_see_new_weights():
    model = small()
    decoder = model.compile_decoder(4, steps=2, cfg=2.0)
    for step in range(3):
        latents, noise = inputs(model, 4)
        with torch.no_grad():
            model.decoder_pos_embed.add_(0.1 * step)
            eager = decoder._decode(latents, noise.__getitem__, (448, 448))
        assert torch.equal(decoder(latents, noise=noise), eager)
    assert len(decoder._graphs) == 1


def test_other_batches_and_sizes_run_and_get_graphs_when_they_come_back():
    model = small()
    decoder = model.compile_decoder(4)
    for graphs in (1, 2, 2):
        latents, noise = inputs(model, 2, 512)
        with torch.no_grad():
            eager = decoder._decode(latents, noise.__getitem__, (224, 448))
        assert torch.equal(decoder(latents, noise=noise, size=(224, 448)), eager)
        assert len(decoder._graphs) == graphs


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_stays_within_its_bound(dtype, cfg):
    model = small(dtype)
    latents, noise = inputs(model, 16)
    needed = 1024 * max(model.bytes_per_token(cfg != 1.0))
    for memory in (3 * needed, needed - 1):
        with torch.no_grad():
            model.decode(latents[:1], noise=noise[:1], cfg=cfg, max_memory=memory)  # workspaces of libraries
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            images = model.decode(latents, steps=2, noise=noise, cfg=cfg, max_memory=memory)
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
    given = [inputs(model, 2) for _ in range(4)]
    expected = [decoder(latents, noise=noise) for latents, noise in given]
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [decoder(given[i][0], noise=given[i][1]) for _ in range(10)]
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
    decoder(latents, noise=noise)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder(latents, noise=noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")
