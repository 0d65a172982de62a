import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import check_reset
from uniflow import UniFlow, UniFlowConfig
from uniflow.encoder import resize_position_embedding
from uniflow_kernels import patchify


def images(*size, batch=2, seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


# embeddings


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_embeddings_by_a_product_are_those_by_a_convolution(tiny, within_twice, size):
    """In half precision, with positions of the trained grid and of another one; a hook on the convolution fires."""
    embeddings = tiny().embeddings
    x, called = images(*size), []
    exact = copy.deepcopy(embeddings).double()(x.double())
    embeddings, x = embeddings.bfloat16(), x.bfloat16()
    found = embeddings(x)
    assert torch.equal(embeddings(x, patchify(x, 4)), found)
    embeddings.patch_embedding.register_forward_hook(lambda *_: called.append(1))
    within_twice(found, embeddings(x), exact)
    assert called == [1]
    assert not embeddings.takes_patches()


# any size


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (8, 24), (32, 20), (4, 4)])
def test_any_size_that_the_patch_divides(tiny, size):
    model = tiny()
    tokens = size[0] * size[1] // 16
    latents = model.encode(images(*size))
    assert latents.shape == (2, tokens, 8)
    assert [tuple(state.shape) for state in model.hidden_states(images(*size))] == [(2, 1 + tokens, 64)] * 3
    assert model.condition(latents, size).shape == (2, tokens, 64)
    assert model.decode(latents, size=size, steps=2).shape == (2, 3, *size)
    assert model(images(*size)).shape == (2, 3, *size)


def test_a_square_needs_no_size_and_others_do(tiny):
    model = tiny()
    latents = model.encode(images(24, 24))
    assert torch.equal(model.condition(latents), model.condition(latents, (24, 24)))
    with pytest.raises(ValueError, match="size: 12 tokens form no square"):
        model.decode(model.encode(images(8, 24)))
    with pytest.raises(ValueError, match="size: 8x16 has 8 patches of 4, got 12 tokens"):
        model.decode(model.encode(images(8, 24)), size=(8, 16))


def test_height_and_width_are_not_confused(tiny):
    """With positions interpolated for 2x6, a picture's transposed grid would give other numbers."""
    model = tiny()
    latents = model.encode(images(8, 24))
    assert not torch.allclose(model.condition(latents, (8, 24)), model.condition(latents, (24, 8)), atol=1e-3)


def test_positions_at_the_trained_size_are_unchanged_to_the_bit():
    embedding = torch.randn(1, 16, 8).to(torch.bfloat16)
    assert resize_position_embedding(embedding, (4, 4)) is embedding


@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (3, 7)])
def test_positions_are_interpolated_bicubically(grid):
    embedding = torch.randn(1, 16, 8)
    expected = F.interpolate(embedding.view(1, 4, 4, 8).permute(0, 3, 1, 2), size=grid, mode="bicubic")
    assert torch.allclose(resize_position_embedding(embedding, grid), expected.flatten(2).transpose(1, 2))
    assert resize_position_embedding(embedding.half(), grid).dtype == torch.float16


def test_all_three_position_embeddings_are_used_and_interpolated(tiny):
    model = tiny()
    names = ("embeddings.position_embedding", "global_block_pos_embed", "decoder_pos_embed")
    parameters = dict(model.named_parameters())
    for size in ((16, 16), (8, 24)):
        model.zero_grad()
        model(images(*size)).square().sum().backward()
        for name in names:
            assert parameters[name].grad.abs().sum() > 0, (name, size)


# sampling


def test_sampling_is_reproducible(tiny):
    model = tiny()
    latents = model.encode(images(16, 16))
    one, two = (model.decode(latents, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    other = model.decode(latents, generator=torch.Generator().manual_seed(8))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(model.decode(latents, seed=7), one)


def plain_decode(model, latents, noise, steps, cfg=1.0, guided=lambda t: True, solver="euler"):
    """The release's sampler: a time for every row, a null condition for every row, two full passes."""
    condition = model.condition(latents).flatten(0, 1)
    net, x, dt = model.flow_head.net, noise.flatten(0, 1), 1 / steps

    def velocity(x, t):
        times = torch.full((len(x),), 1000 * t)
        v = net(x, times, condition)
        if cfg != 1.0 and guided(t):
            null = net(x, times, torch.zeros_like(condition))
            v = null + cfg * (v - null)
        return v

    for t in (i / steps for i in range(steps)):
        v = velocity(x, t)
        if solver == "heun":
            v = (v + velocity(x + dt * v, t + dt)) / 2
        if solver == "midpoint":
            v = velocity(x + dt / 2 * v, t + dt / 2)
        x = x + dt * v
    x = x.view(len(latents), 4, 4, 3, 4, 4)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), 3, 16, 16)


@pytest.mark.parametrize("cfg", [1.0, 0.0, 1.5, 4.0])
@pytest.mark.parametrize("steps", [1, 5])
def test_decode_equals_the_plain_sampler(tiny, cfg, steps):
    model = tiny()
    latents, noise = model.encode(images(16, 16)), torch.randn(2, 16, 48)
    expected = plain_decode(model, latents, noise, steps, cfg)
    assert torch.allclose(model.decode(latents, steps=steps, cfg=cfg, noise=noise), expected, rtol=1e-4, atol=1e-4)


def test_guidance_interval(tiny):
    model = tiny()
    latents, noise = model.encode(images(16, 16)), torch.randn(2, 16, 48)
    # noise levels of 4 steps: 1, .75, .5, .25; sigma 1 to 3 is noise level .5 to .75
    guided = model.decode(latents, steps=4, cfg=3.0, cfg_interval=(1.0, 3.0), noise=noise)
    expected = plain_decode(model, latents, noise, 4, 3.0, lambda t: 0.25 <= t <= 0.5)
    assert torch.allclose(guided, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        model.decode(latents, steps=4, cfg=3.0, cfg_interval=(0.0, math.inf), noise=noise),
        model.decode(latents, steps=4, cfg=3.0, noise=noise),
    )
    never = model.decode(latents, steps=4, cfg=3.0, cfg_interval=(0.0, 0.01), noise=noise)
    assert torch.equal(never, model.decode(latents, steps=4, noise=noise))


@pytest.mark.parametrize("solver", ["heun", "midpoint"])
def test_solvers_with_guidance_and_its_interval(tiny, solver):
    model = tiny()
    latents, noise = model.encode(images(16, 16)), torch.randn(2, 16, 48)
    for interval, guided in ((None, lambda t: True), ((0.5, 3.0), lambda t: 0.25 <= t <= 2 / 3)):
        out = model.decode(latents, 4, cfg=2.0, cfg_interval=interval, noise=noise, solver=solver)
        expected = plain_decode(model, latents, noise, 4, 2.0, guided, solver)
        assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(out, model.decode(latents, 4, cfg=2.0, noise=noise), rtol=1e-2, atol=1e-2)


def test_temperature_multiplies_the_noise(tiny):
    model = tiny()
    latents, noise = model.encode(images(16, 16)), torch.randn(2, 16, 48)
    expected = model.decode(latents, noise=0.5 * noise)
    assert torch.equal(model.decode(latents, noise=noise, temperature=0.5), expected)
    drawn = model.decode(latents, generator=torch.Generator().manual_seed(7), temperature=0.0)
    assert torch.equal(drawn, model.decode(latents, noise=torch.zeros_like(noise)))


@pytest.mark.parametrize("t", [torch.tensor(0.3), torch.tensor([0.3, 0.3]), torch.full((2, 16), 0.3)])
def test_velocity_takes_t_per_batch_image_or_token(tiny, t):
    model = tiny()
    condition, x = model.condition(model.encode(images(16, 16))), torch.randn(2, 16, 48)
    expected = model.flow_head.net(x.flatten(0, 1), torch.full((32,), 300.0), condition.flatten(0, 1))
    assert torch.allclose(model.velocity(x, t, condition).flatten(0, 1), expected, atol=1e-4)


def test_runs_under_inference_mode_and_trains_afterwards(tiny):
    model = tiny()
    with torch.inference_mode():
        out = model.decode(model.encode(images(16, 16)), cfg=2.0)
    assert out.is_inference()
    model(images(16, 16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_no_pictures(tiny):
    model = tiny()
    assert model(images(16, 16, batch=0)).shape == (0, 3, 16, 16)


def complex_at(place):
    """What `velocity` takes, one of it complex."""
    given = [torch.zeros(1, 16, 48), torch.zeros(1), torch.zeros(1, 16, 64)]
    return [tensor.to(torch.complex64) if i == place else tensor for i, tensor in enumerate(given)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.encode(torch.zeros(3, 16, 16)), ValueError, r"images: expected shape \[B, 3, H, W\]"),
        (lambda m: m.encode(torch.zeros(1, 1, 16, 16)), ValueError, r"images: expected shape \[B, 3, H, W\]"),
        (
            lambda m: m.encode(torch.zeros(1, 3, 16, 18)),
            ValueError,
            r"images: .* multiples of the patch \(4\), got 16x18",
        ),
        (lambda m: m.encode(torch.zeros(1, 3, 0, 16)), ValueError, "images: .* got 0x16"),
        (lambda m: m.encode(torch.zeros(1, 3, 16, 16).byte()), TypeError, "images: expected normalised floats"),
        (lambda m: m.decode(torch.zeros(1, 16, 9)), ValueError, r"latents: expected shape \[B, N, 8\]"),
        (lambda m: m.decode(torch.zeros(1, 16, 8), noise=torch.zeros(16, 48)), ValueError, "noise: expected shape"),
        (lambda m: m.decode(torch.zeros(1, 16, 8), steps=0), ValueError, "steps: expected at least 1"),
        (lambda m: m.decode(torch.zeros(1, 16, 8), schedule="cosine"), ValueError, "schedule: "),
        (lambda m: m.decode(torch.zeros(1, 16, 8), solver="rk4"), ValueError, "solver: expected one of euler"),
        (
            lambda m: m.velocity(torch.zeros(1, 16, 48), torch.zeros(2), torch.zeros(1, 16, 64)),
            ValueError,
            "t: expected a scalar",
        ),
        (
            lambda m: m.velocity(torch.zeros(1, 15, 48), torch.zeros(1), torch.zeros(1, 16, 64)),
            ValueError,
            "x: expected",
        ),
        (
            lambda m: m.velocity(torch.zeros(1, 16, 48), torch.zeros(1), torch.zeros(1, 16, 63)),
            ValueError,
            r"condition: expected shape \[B, N, 64\]",
        ),
        (lambda m: m.condition(torch.zeros(1, 16, 8, dtype=torch.complex64)), TypeError, "latents: expected a float"),
        (lambda m: m.decode(torch.zeros(1, 16, 8, dtype=torch.complex64)), TypeError, "latents: expected a float"),
        *(
            (lambda m, i=i: m.velocity(*complex_at(i)), TypeError, f"{name}: expected (a float|real).*complex64")
            for i, name in enumerate(("x", "t", "condition"))
        ),
    ],
)
def test_wrong_input_names_the_argument(tiny, call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(tiny())


# the ways people use modules


def gradients(model, x):
    torch.manual_seed(3)  # of DropPath and dropout
    out = model(x, noise=torch.ones(2, 16, 48))
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def test_gradient_checkpointing_changes_no_number(tiny):
    model = tiny(drop_path_rate=0.3).train()
    kept = gradients(model, images(16, 16))
    model.gradient_checkpointing_enable()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        recomputed = gradients(model, images(16, 16))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    model.gradient_checkpointing_enable(False)
    assert {layer.keeps for layer in model.layers()} == {"everything"}
    assert not model.flow_head.net.grad_checkpointing


def test_drop_path_acts_in_training_only(tiny):
    model = tiny(drop_path_rate=0.9)
    rates = [layer.drop_path1.rate for layer in model.encoder.layers]
    assert rates == [0.0, pytest.approx(0.9)]
    x = images(16, 16)
    assert torch.equal(model.eval().encode(x), model.eval().encode(x))
    torch.manual_seed(0)
    assert not torch.equal(model.train().encode(x), model.eval().encode(x))


def test_copies_and_pickles(tiny):
    model, x = tiny(), images(16, 16)
    expected = model.encode(x)
    assert torch.equal(copy.deepcopy(model).encode(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model)).encode(x), expected)


def test_autocast_in_bfloat16_is_close(tiny):
    model, x = tiny(), images(16, 16)
    noise = torch.randn(2, 16, 48)
    exact = model.double()(x.double(), noise=noise.double())
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, noise=noise)
    assert (out - exact).abs().max() / exact.abs().max() < 0.05


@torch.no_grad()
def test_guidance_in_one_pass_under_autocast(tiny):
    model, noise = tiny(), torch.randn(2, 16, 48)
    latents = model.encode(images(16, 16))
    exact = model.double().decode(latents.double(), 3, cfg=2.0, noise=noise.double())
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model.decode(latents, 3, cfg=2.0, noise=noise)
    assert (out - exact).abs().max() / exact.abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_take_float32_images(tiny, dtype):
    model = tiny().to(dtype)
    latents = model.encode(images(16, 16))
    assert latents.dtype == dtype
    assert model.decode(latents.float()).dtype == dtype


def test_flash_attn_can_be_turned_off(tiny):
    model = tiny(use_flash_attn=False)
    assert not model.encoder.layers[0].attn.allow_flash_attn
    assert not model.global_blocks[0].attn.allow_flash_attn


# the start of training


def test_a_new_model_predicts_zero_velocity_and_has_sincos_positions():
    model = UniFlow(UniFlowConfig.preset("tiny"))
    noise = torch.randn(1, 64, 48)
    out = model(images(32, 32, batch=1), noise=noise)
    assert torch.equal(out, model.decode(torch.zeros(1, 64, 16), noise=noise))
    position = model.decoder_pos_embed.view(8, 8, 128)
    # the first half tells columns apart, the second rows
    assert torch.allclose(position[0, :, :64], position[5, :, :64])
    assert torch.allclose(position[:, 0, 64:], position[:, 5, 64:])
    assert torch.allclose(position[3, 2, 0], torch.tensor(2.0).sin())
    assert torch.allclose(position[3, 2, 64], torch.tensor(3.0).sin())


def test_random_weights_follow_the_seed():
    torch.manual_seed(5)
    one = UniFlow(UniFlowConfig.preset("tiny"))
    torch.manual_seed(5)
    two = UniFlow(UniFlowConfig.preset("tiny"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.isfinite(p).all() for p in one.parameters())


@pytest.mark.parametrize(
    "changes", [{}, {"norm_type": "rms_norm", "qk_normalization": True, "initializer_factor": 0.1}]
)
def test_reset_parameters_leaves_nothing_as_it_was(changes):
    check_reset(lambda: UniFlow(UniFlowConfig.preset("tiny", **changes)))


def test_a_model_made_without_memory_can_be_started(tiny):
    with torch.device("meta"):
        model = UniFlow(UniFlowConfig.preset("tiny"))
    model.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(model(images(32, 32))).all()
