"""DDPM, DDIM and DPM-Solver++ against closed forms, against diffusers where it is installed, and on a head."""

import math
import sys
from itertools import pairwise

import pytest
import torch

from tests.conftest import randomize
from tests.uniflow_kernels.test_graphs import StandIn, stand_in
from uniflow.diffusion import METHODS, Diffusion, ddim, ddpm, dpm_solver, noise_loss, predictor, sample
from uniflow_kernels import FlowHead
from uniflow_kernels.modules import sampling

__all__ = ["stand_in"]  # a fixture

PROCESSES = [Diffusion(100), Diffusion(37, "linear"), Diffusion(7), Diffusion(1000, "linear"), Diffusion(1)]


def test_betas():
    linear = Diffusion(betas="linear").trained_betas()
    assert (linear[0], linear[-1]) == (pytest.approx(1e-4), pytest.approx(0.02))
    assert linear[500] - linear[499] == pytest.approx((0.02 - 1e-4) / 999)
    cosine = Diffusion(1000)
    signals = cosine.signals()
    first = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    for i in (0, 10, 500, 990):  # before the last betas, which are cut at 0.999
        expected = math.cos(((i + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / first
        assert signals[i] == pytest.approx(expected, rel=1e-6)
    assert max(cosine.trained_betas()) == 0.999


def test_respacing():
    """MAR's: evenly from the first to the last, rounded; the signal at a kept step is what it was."""
    assert Diffusion(1000).timesteps() == list(range(1000))
    hundred = Diffusion(100)
    assert hundred.timesteps()[:3] == [0, 10, 20]
    assert hundred.timesteps()[-3:] == [979, 989, 999]
    everything = Diffusion(1000).signals()
    assert hundred.signals() == [everything[t] for t in hundred.timesteps()]


def signal_at(process):
    return dict(zip(process.timesteps(), process.signals(), strict=True))


def of_one_point(process, point):
    """The exact noise of data that is always the same point."""
    signal = signal_at(process)
    return lambda x, t: ((x - signal[t] ** 0.5 * point) / (1 - signal[t]) ** 0.5, None)


def of_a_gaussian(process, deviation):
    """The exact noise of data from N(0, deviation^2)."""
    signal = signal_at(process)
    return lambda x, t: (x * (1 - signal[t]) ** 0.5 / (signal[t] * deviation**2 + 1 - signal[t]), None)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("method", [ddpm, ddim, lambda *a: ddim(*a, eta=1.0)], ids=["ddpm", "ddim", "eta"])
def test_data_of_one_point_is_found_exactly(process, method):
    point, noise = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    assert torch.allclose(method(of_one_point(process, point), noise, process), point, atol=1e-6)


def test_ddim_scales_gaussian_data_by_a_known_factor():
    process = Diffusion(20, "linear")
    noise, deviation = torch.randn(100, dtype=torch.float64), 0.5
    signals, factor = [1.0, *process.signals()], 1.0
    for previous, signal in reversed(list(pairwise(signals))):
        spread = signal * deviation**2 + 1 - signal
        factor *= ((previous * signal) ** 0.5 * deviation**2 + ((1 - previous) * (1 - signal)) ** 0.5) / spread
    out = ddim(of_a_gaussian(process, deviation), noise, process)
    assert torch.allclose(out, factor * noise, rtol=1e-9)
    # with all steps it is the flow that carries N(0, 1) to the data
    process = Diffusion(1000, "linear")
    assert torch.allclose(ddim(of_a_gaussian(process, deviation), noise, process), deviation * noise, rtol=0.01)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_ddpm_of_gaussian_data_has_the_variance_that_follows(temperature):
    process, deviation = Diffusion(20, "linear"), 0.5
    signals, variance = [1.0, *process.signals()], 1.0
    for previous, signal in reversed(list(pairwise(signals))):
        alpha, spread = signal / previous, signal * deviation**2 + 1 - signal
        # the posterior mean given x, with the data's mean signal^0.5 * deviation^2 / spread * x
        factor = (1 - alpha) * previous**0.5 / (1 - signal) * signal**0.5 * deviation**2 / spread
        factor += (1 - previous) * alpha**0.5 / (1 - signal)
        variance = factor**2 * variance + temperature**2 * (1 - alpha) * (1 - previous) / (1 - signal)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(200_000, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    out = ddpm(of_a_gaussian(process, deviation), start, process, temperature)
    assert out.var().item() == pytest.approx(variance, rel=0.02)


def test_the_learned_variance_lies_between_its_bounds():
    """With place -1 and 1 at the ends; the noise of each step is divided out by the closed form of one step."""
    process = Diffusion(2, "linear")
    (low_signal, signal), x = process.signals(), torch.zeros(50_000, dtype=torch.float64)
    beta = 1 - signal / low_signal
    bounds = {-1.0: beta * (1 - low_signal) / (1 - signal), 1.0: beta}
    bounds[0.0] = (bounds[-1.0] * bounds[1.0]) ** 0.5
    for place, variance in bounds.items():
        seen = []

        def predict(x, t, place=place, seen=seen):
            seen.append(x)
            return torch.zeros_like(x), torch.full_like(x, place)

        torch.manual_seed(0)
        ddpm(predict, x, process)
        assert seen[1].var().item() == pytest.approx(variance, rel=0.03)


# a head


def make_head(learned=True, seed=0):
    return randomize(FlowHead(6, 32, 12 if learned else 6, 20, 2), seed)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("betas", ["cosine", "linear"])
def test_ddpm_is_that_of_diffusers(learned, betas):
    diffusers = pytest.importorskip("diffusers")
    head, process, condition = make_head(learned), Diffusion(10, betas), torch.randn(5, 20)
    scheduler = diffusers.DDPMScheduler(
        trained_betas=process.trained_betas(),
        variance_type="learned_range" if learned else "fixed_small",
        clip_sample=False,
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == process.timesteps()[::-1]
    start, generator = torch.randn(5, 6), torch.Generator().manual_seed(3)
    with torch.no_grad():
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(head(x, float(t), condition), t, x, generator=generator).prev_sample
        out = sample(head, condition, process, noise=start, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(out, x, rtol=1e-3, atol=1e-3 * x.abs().max().item())


class EveryNinth(Diffusion):
    """The spacing at which the scheduler's previous timestep, a fixed number away, is the next one that it takes."""

    def timesteps(self):
        return list(range(0, 90, 9))


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_is_that_of_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    head, process, condition = make_head(False), EveryNinth(10, "linear", 90), torch.randn(5, 20)
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=90, trained_betas=process.trained_betas(), clip_sample=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == process.timesteps()[::-1]
    start, generator = torch.randn(5, 6), torch.Generator().manual_seed(3)
    with torch.no_grad():
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(head(x, float(t), condition), t, x, eta=eta, generator=generator).prev_sample
        out = sample(head, condition, process, "ddim", noise=start, generator=torch.Generator().manual_seed(3), eta=eta)
    assert torch.allclose(out, x, rtol=1e-3, atol=1e-3 * x.abs().max().item())


def test_dpm_solver_is_of_second_order():
    """Of Gaussian data, which N(0, 1) is carried to: twice the steps quarter its error, and halve DDIM's."""
    pytest.importorskip("diffusers")
    noise, errors = torch.randn(100, dtype=torch.float64), {}
    for steps in (100, 200):
        process = Diffusion(steps, "linear")
        predict = of_a_gaussian(process, 2.0)
        for method in (ddim, dpm_solver):
            errors[method, steps] = (method(predict, noise, process) / noise - 2.0).abs().max().item()
    assert 1.9 < errors[ddim, 100] / errors[ddim, 200] < 2.1
    assert 3.5 < errors[dpm_solver, 100] / errors[dpm_solver, 200] < 6
    assert errors[dpm_solver, 200] < 0.1 * errors[ddim, 200]
    point = torch.randn(100, dtype=torch.float64)
    assert torch.allclose(dpm_solver(of_one_point(process, point), noise, process), point, atol=1e-5)


def test_dpm_solver_on_a_head():
    pytest.importorskip("diffusers")
    head, condition, start = make_head().double(), torch.randn(5, 20).double(), torch.randn(5, 6).double()
    with torch.no_grad():
        out = sample(head, condition, Diffusion(5), "dpm-solver++", noise=start, cfg=2.0, null_condition=condition[:1])
        predict = predictor(head, condition, Diffusion(5).timesteps(), 2.0, condition[:1])
        assert torch.equal(out, dpm_solver(predict, start, Diffusion(5)))


def test_without_diffusers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'uniflow-kernels\[diffusers\]'"):
        sample(make_head(), torch.randn(1, 20), Diffusion(2), "dpm-solver++")


def test_guidance_is_of_the_noise_alone():
    """As in MAR's forward_with_cfg: guided noise, the conditional variance."""
    head, x = make_head(), torch.randn(5, 6)
    condition, null = torch.randn(5, 20), torch.randn(5, 20)
    with torch.no_grad():
        noise, place = predictor(head, condition, [7], 3.0, null)(x, 7)
        given, unguided = head(x, 7.0, condition), head(x, 7.0, null)[:, :6]
    assert torch.allclose(noise, unguided + 3 * (given[:, :6] - unguided), atol=1e-4)
    assert torch.allclose(place, given[:, 6:], atol=1e-4)


@pytest.mark.parametrize("method", METHODS[:2])
def test_draws_are_reproducible_and_in_the_heads_dtype(method):
    head, condition = make_head().bfloat16(), torch.randn(5, 20).bfloat16()
    with torch.no_grad():
        one, two, other = (
            sample(head, condition, Diffusion(3), method, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
        )
    assert one.dtype == torch.bfloat16
    assert one.shape == (5, 6)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("method", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5)])
@torch.no_grad()
def test_replays_equal_the_first_call(monkeypatch, method, eta):
    monkeypatch.setattr(sampling, "why_not_graph", lambda device, read: None)
    head, condition, null = make_head(), torch.randn(5, 20), torch.randn(1, 20)
    how = {"method": method, "eta": eta, "cfg": 2.0, "null_condition": null}
    for seed in (1, 2):
        first, *others = (
            sample(head, condition, Diffusion(4), generator=torch.Generator().manual_seed(seed), **how)
            for _ in range(3)
        )
        assert all(torch.equal(first, other) for other in others)
    assert StandIn.captures == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, c: Diffusion(betas="sigmoid"), "betas: expected one of cosine, linear"),
        (lambda h, c: Diffusion(0), "steps: expected between 1 and 1000, got 0"),
        (lambda h, c: Diffusion(1001), "steps: expected between 1 and 1000, got 1001"),
        (lambda h, c: sample(h, c, Diffusion(2), "euler"), "method: expected one of ddpm, ddim, dpm-solver"),
        (lambda h, c: sample(h, c, Diffusion(2), cfg=2.0), "null_condition: expected a tensor"),
        (lambda h, c: sample(h, c, Diffusion(2), "ddim", eta=1.5), r"eta: expected a number in \[0, 1\]"),
        (lambda h, c: sample(h, c, Diffusion(2), noise=torch.zeros(4, 6)), r"noise: expected shape \(5, 6\)"),
        (lambda h, c: sample(FlowHead(6, 32, 7, 20, 1), c, Diffusion(2)), "head: expected out_channels 6 or 12, got 7"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(make_head(), torch.randn(5, 20))


@pytest.mark.parametrize("draw", [sample, lambda head, c, _, **how: head.sample(c, 2, **how)])
def test_what_is_of_another_kind_is_refused(draw):
    head, condition, steps = make_head(learned=False), torch.randn(5, 20), Diffusion(2)
    with pytest.raises(TypeError, match=r"^generator: expected one torch.Generator, got list"):
        draw(head, condition, steps, generator=[torch.Generator()] * 5)
    with pytest.raises(TypeError, match=r"^condition: expected a floating point dtype, got torch.complex64"):
        draw(head, condition.to(torch.complex64), steps)
    with pytest.raises(TypeError, match=r"^noise: expected a floating point dtype, got torch.complex64"):
        draw(head, condition, steps, noise=torch.zeros(5, 6, dtype=torch.complex64))
    null = torch.zeros(1, 20)
    with pytest.raises(TypeError, match=r"^condition: expected torch.float32, the dtype of .* got torch.bfloat16"):
        draw(head, condition.bfloat16(), steps)
    with pytest.raises(TypeError, match=r"^null_condition: expected torch.float32, the dtype of .* got torch.float64"):
        draw(head, condition, steps, cfg=2.0, null_condition=null.double())
    with torch.autocast("cpu", torch.bfloat16):  # which brings all of them to one dtype
        assert draw(head, condition.bfloat16(), steps, cfg=2.0, null_condition=null).dtype == torch.bfloat16


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("betas", ["cosine", "linear"])
def test_the_training_loss_is_its_definition(learned, betas):
    """Row by row in float64 from the posterior q(x_{t-1} | x_t, x_0), as the papers write it."""
    torch.manual_seed(0)
    head = randomize(FlowHead(3, 16, 6 if learned else 3, 5, 2))
    data, condition = torch.randn(2, 200, 3), torch.randn(200, 5)
    process = Diffusion(1000, betas)
    torch.manual_seed(1)
    loss = noise_loss(head, head.cond_embed(condition), data, process)
    torch.manual_seed(1)
    timesteps = torch.randint(1000, (2, 200))
    timesteps_seen, noise = timesteps.flatten().tolist(), torch.randn(2, 200, 3).flatten(0, 1).double()
    signal, beta = process.signals(), process.trained_betas()
    c = condition.expand(2, 200, 5).flatten(0, 1)
    x0 = data.flatten(0, 1).double()
    level = torch.tensor([signal[t] for t in timesteps_seen], dtype=torch.float64)[:, None]
    x = level.sqrt() * x0 + (1 - level).sqrt() * noise
    with torch.no_grad():
        output = head(x.float(), timesteps.flatten(), c).double()
    expected = 0.0
    for row, t in enumerate(timesteps_seen):
        predicted = output[row, :3]
        expected += (predicted - noise[row]).square().mean()
        if not learned:
            continue
        before = signal[t - 1] if t else 1.0
        variance = beta[t] * (1 - before) / (1 - signal[t])
        low = math.log(variance if t else beta[1] * (1 - signal[0]) / (1 - signal[1]))
        log_variance = low + (output[row, 3:] + 1) / 2 * (math.log(beta[t]) - low)
        guess = (x[row] - (1 - signal[t]) ** 0.5 * predicted) / signal[t] ** 0.5

        def mean(of, row=row, t=t, before=before):
            first = before**0.5 * beta[t] / (1 - signal[t])
            return first * of + (1 - beta[t]) ** 0.5 * (1 - before) / (1 - signal[t]) * x[row]

        model = torch.distributions.Normal(mean(guess), torch.exp(0.5 * log_variance))
        if t == 0:
            bound = -model.log_prob(x0[row])
        else:
            posterior = torch.distributions.Normal(mean(x0[row]), math.exp(0.5 * low))
            bound = torch.distributions.kl_divergence(posterior, model)
        expected += bound.mean() / math.log(2)
    assert loss.item() == pytest.approx(float(expected) / 400, rel=1e-3)


def test_the_variance_learns_without_moving_the_noise():
    torch.manual_seed(0)
    gradients = []
    for out_channels in (3, 6):
        torch.manual_seed(0)
        head = randomize(FlowHead(3, 16, 6, 5, 2))
        if out_channels == 3:  # the same head without its second half
            whole, head.final_layer.linear = head.final_layer.linear, torch.nn.Linear(16, 3)
            head.out_channels = 3
            with torch.no_grad():
                head.final_layer.linear.weight.copy_(whole.weight[:3])
                head.final_layer.linear.bias.copy_(whole.bias[:3])
        torch.manual_seed(1)
        data, condition = torch.randn(50, 3), torch.randn(50, 5)
        noise_loss(head, head.cond_embed(condition), data, Diffusion()).backward()
        gradients.append(head.final_layer.linear.weight.grad)
    torch.testing.assert_close(gradients[1][:3], gradients[0])
    assert gradients[1][3:].abs().max() > 0
