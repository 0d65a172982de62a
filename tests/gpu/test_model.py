"""The model on a GPU: the golden numbers, half precision, compilation, CUDA graphs, and no waiting for the device."""

import copy

import pytest
import torch

from tests.conftest import smooth_picture
from uniflow import UniFlow, UniFlowConfig, UniFlowObjective
from uniflow.data import PictureList, RandomCrops
from uniflow.training import Recipe, Stage, Trainer
from uniflow_kernels import attention, backend
from uniflow_kernels.ops.attention import BACKENDS, PACKAGES, attend_on
from uniflow_kernels.triton_kernels import why_not_launched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("exact_float32"),
]


@pytest.fixture
def noise(golden):
    return golden["in.noise"].view(2, 16, 588).cuda()


def relative_error(actual, expected):
    return ((actual.cpu().double() - expected.double()).abs().max() / expected.abs().max()).item()


def test_golden_numbers(golden_model, golden, noise):
    model = golden_model.cuda()
    with torch.inference_mode():
        images = golden["in.pixel_values"].cuda()
        for i, state in enumerate(model.hidden_states(images)):
            assert relative_error(state, golden[f"out.hidden_states.{i}"]) < 1e-5
        latents = model.encode(images)
        assert relative_error(latents, golden["out.latent"]) < 1e-5
        assert relative_error(model.condition(latents), golden["out.condition"]) < 1e-5
        for name, options in {
            "linear_1": {"steps": 1},
            "linear_4": {"steps": 4},
            "pow_0.25_4": {"steps": 4, "schedule": "pow_0.25"},
            "linear_4_cfg_2": {"steps": 4, "cfg": 2.0},
        }.items():
            image = model.decode(latents, noise=noise, **options)
            assert relative_error(image, golden[f"out.image.{name}"]) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_on_a_cpu(golden_model, golden, noise, dtype):
    """The 2x rule against float64, with the CPU's result in the same dtype as plain PyTorch."""
    images = golden["in.pixel_values"]
    with torch.inference_mode():
        exact = golden_model.double()(images.double(), noise=noise.cpu().double())
        plain = golden_model.to(dtype)(images, noise=noise.cpu())
        ours = golden_model.cuda()(images.cuda(), noise=noise)
    assert relative_error(ours, exact) <= 2 * relative_error(plain, exact) + 1e-3


def test_patches_are_embedded_as_by_the_convolution(golden_model, golden, within_twice):
    """A product of rows of 588 numbers, which is no multiple of 16 bytes in bfloat16."""
    embeddings, images = golden_model.embeddings, golden["in.pixel_values"]
    exact = copy.deepcopy(embeddings).double()(images.double())
    embeddings, images = embeddings.cuda().bfloat16(), images.cuda().bfloat16()
    assert embeddings.takes_patches()
    with torch.no_grad(), backend("eager"):
        plain = embeddings(images)
    with torch.no_grad():
        within_twice(embeddings(images).cpu(), plain.cpu(), exact)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_whole(golden_model, golden, noise, mode):
    model = golden_model.cuda()
    images = golden["in.pixel_values"].cuda()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.inference_mode():
        for _ in range(3):  # CUDA graphs are recorded in the second call and replayed in the third
            assert relative_error(compiled(images, noise=noise, steps=4), golden["out.image.linear_4"]) < 1e-4


def test_decode_in_a_cuda_graph(golden_model, golden, noise):
    model, latents = golden_model.cuda(), golden["out.latent"].cuda()

    def decode():
        return model.decode(latents, steps=4, cfg=2.0, noise=noise)

    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            decode()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            image = decode()
        image.zero_()
        graph.replay()
    assert relative_error(image, golden["out.image.linear_4_cfg_2"]) < 1e-5


def test_neither_encode_nor_decode_waits_for_the_device(golden_model, golden, noise):
    model, images = golden_model.cuda(), golden["in.pixel_values"].cuda()
    with torch.inference_mode():
        model(images, noise=noise, steps=2, cfg=2.0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(images, noise=noise, steps=2, cfg=2.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_training_step(golden_model, golden):
    objective = UniFlowObjective(golden_model.cuda()).train()
    optimizer = torch.optim.AdamW(objective.student.parameters(), lr=1e-4, fused=True)
    images = golden["in.pixel_values"].cuda()
    with torch.autocast("cuda", torch.bfloat16):
        losses = objective(images)
    losses.total.backward()
    optimizer.step()
    assert torch.isfinite(losses.total)
    assert all(torch.isfinite(p).all() for p in objective.student.parameters())


def test_a_run_that_leaves_everything_open():
    """In bfloat16, its layers compiled, the teacher in bfloat16 too; its losses are those of a run without."""
    losses = []
    for compile in ("auto", False):
        torch.manual_seed(0)
        objective = UniFlowObjective(UniFlow(UniFlowConfig.preset("tiny", num_hidden_layers=3)).to("cuda"))
        crops = RandomCrops(PictureList({"a.png": smooth_picture((40, 30), 0)}), objective.student.config.image_size)
        trainer = Trainer(objective, crops, Recipe((Stage(4, warmup_steps=0),), batch_size=8, compile=compile))
        losses.append(trainer.run())
        assert trainer.recipe.precision == "bfloat16"
        assert trainer.recipe.compile == (compile == "auto" and why_not_launched() is None)
        assert objective.teacher.dtype == torch.bfloat16
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("path", [*BACKENDS, *PACKAGES])
def test_attention_on_every_path_that_is_there(path):
    if path in PACKAGES:
        pytest.importorskip(PACKAGES[path])
    q, k, v = torch.randn(2, 65, 3, 4, 64, device="cuda").unbind(2)
    exact = attention(q.double(), k.double(), v.double())
    plain = attend_on("math", q.half(), k.half(), v.half())
    ours = attend_on(path, q.half(), k.half(), v.half())
    assert relative_error(ours, exact.cpu()) <= 2 * relative_error(plain, exact.cpu()) + 1e-5
