"""Sampling heads that were trained to predict noise, as MAR's are: DDPM, DDIM, and DPM-Solver++ by way of diffusers.

Time runs the other way than in `uniflow_kernels.solvers`: timestep 0 is nearly the data, the last one noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor

from uniflow_kernels import FlowHead
from uniflow_kernels.modules.sampling import Conditioned, check_dtype, check_floating, normal, replayed
from uniflow_kernels.solvers import guide

METHODS = ("ddpm", "ddim", "dpm-solver++")
BETAS = ("cosine", "linear")

# x and a timestep to the noise in x, and where the head was trained to give it the variance's place v in [-1, 1]
Predictor = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Diffusion:
    """A diffusion of 1000 steps (or another number) and which of them a sampler takes.

    Args:
        steps: how many steps are sampled: all, or as many spread evenly from the first to the last (MAR's respacing of
            one number, as in "100").
        betas: "cosine" (Nichol & Dhariwal 2021, what MAR uses) or "linear" (Ho et al. 2020).
        trained_steps: how many the head was trained on.

    Raises:
        ValueError: for an unknown name, or steps that are not in [1, trained_steps].
    """

    steps: int = 100
    betas: str = "cosine"
    trained_steps: int = 1000

    def __post_init__(self) -> None:
        if self.betas not in BETAS:
            raise ValueError(f"betas: expected one of {', '.join(BETAS)}, got {self.betas!r}")
        if not 1 <= self.steps <= self.trained_steps:
            raise ValueError(f"steps: expected between 1 and {self.trained_steps}, got {self.steps}")

    def trained_betas(self) -> list[float]:
        """The variance that each trained step adds."""
        n = self.trained_steps
        if self.betas == "linear":  # 1e-4 to 0.02 for 1000 steps
            return [(0.1 + (20 - 0.1) * i / max(1, n - 1)) / n for i in range(n)]
        signal = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        return [min(1 - signal[i + 1] / signal[i], 0.999) for i in range(n)]

    def timesteps(self) -> list[int]:
        """The sampled steps, ascending."""
        if self.steps == 1:
            return [0]
        return [round(i * (self.trained_steps - 1) / (self.steps - 1)) for i in range(self.steps)]

    def signals(self) -> list[float]:
        """At each of `timesteps`, the share of the data's variance in x: the product of all 1 - beta up to it."""
        signal, at = 1.0, []
        for beta in self.trained_betas():
            signal *= 1 - beta
            at.append(signal)
        return [at[timestep] for timestep in self.timesteps()]


def sample(
    head: FlowHead,
    condition: Tensor,
    diffusion: Diffusion,
    method: str = "ddpm",
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    cfg: float = 1.0,
    null_condition: Tensor | None = None,
    temperature: float = 1.0,
    eta: float = 0.0,
) -> Tensor:
    """Draw rows from a head that predicts noise.

    Args:
        head: out_channels is in_channels, or twice that: the second half is then where the variance lies between its
            bounds (learn_sigma in MAR); the timestep is an integer.
        condition: [M, z_channels].
        diffusion: betas and respacing.
        method: "ddpm"; "ddim"; or "dpm-solver++", of second order, which needs diffusers.
        noise: [M, in_channels] to start from; drawn if not given.
        generator: to draw it and the noise of the steps with, on any device.
        cfg: guidance scale of the predicted noise; 1 is none.
        null_condition: [M, z_channels] or [1, z_channels], what guidance leads away from.
        temperature: what the noise of the steps is multiplied by (MAR's); the first noise is not.
        eta: of DDIM: 0 adds no noise, 1 as much as DDPM's lower bound.

    Returns:
        [M, in_channels], in the condition's dtype; the state is float32.

    Raises:
        ModuleNotFoundError: for "dpm-solver++" without diffusers, naming the extra.
        TypeError: as of `FlowHead.sample`.
        ValueError: for an unknown method, a head of other channels, guidance without a null condition, eta out of
            range, shapes that do not fit.

    Source: `p_sample` and `ddim_sample` of MAR's diffusion (from ADM), and `forward_with_cfg` of its head: the guided
    noise goes with the conditional variance.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if head.out_channels not in (head.in_channels, 2 * head.in_channels):
        raise ValueError(
            f"head: expected out_channels {head.in_channels} or {2 * head.in_channels}, got {head.out_channels}"
        )
    if cfg != 1.0 and null_condition is None:
        raise ValueError("null_condition: expected a tensor, since cfg is not 1")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected a number in [0, 1], got {eta}")
    shape = (*condition.shape[:-1], head.in_channels)
    if noise is None:
        noise = normal(shape, condition.device, generator)
    elif noise.shape != shape:
        raise ValueError(f"noise: expected shape {shape}, got {tuple(noise.shape)}")
    check_floating("noise", noise)
    check_dtype("condition", condition, head.cond_embed)
    if null_condition is not None:
        check_dtype("null_condition", null_condition, head.cond_embed)
    x = noise.to(torch.promote_types(condition.dtype, torch.float32))
    null_condition = None if cfg == 1.0 else null_condition
    if method == "dpm-solver++":
        predict = predictor(head, condition, diffusion.timesteps(), cfg, null_condition)
        return dpm_solver(predict, x, diffusion).to(condition.dtype)
    # all noise is drawn before the first step, which a CUDA graph needs
    draws = 0 if method == "ddim" and eta == 0 else diffusion.steps - 1
    drawn = torch.stack(list(islice(_drawn(x, generator), draws))) if draws else None

    def steps_of(x: Tensor, condition: Tensor, null_condition: Tensor | None, drawn: Tensor | None) -> Tensor:
        predict = predictor(head, condition, diffusion.timesteps(), cfg, null_condition)
        noises = iter(() if drawn is None else drawn)
        if method == "ddpm":
            x = ddpm(predict, x, diffusion, temperature, noises)
        else:
            x = ddim(predict, x, diffusion, eta, temperature, noises)
        return x.to(condition.dtype)

    return replayed(head, steps_of, (x, condition, null_condition, drawn), (diffusion, method, cfg, temperature, eta))


def noise_loss(head: FlowHead, embedded: Tensor, data: Tensor, diffusion: Diffusion) -> Tensor:
    """The training loss of a head that predicts noise, and its variance where it has channels for it.

    Timesteps and noise are drawn. The variance learns from the variational bound, through which no gradient reaches
    the predicted noise.

    Args:
        head: out_channels is in_channels, or twice that.
        embedded: `head.cond_embed` of the conditions: [..., W], broadcastable to the rows of data.
        data: [..., in_channels], float.
        diffusion: the betas; all of its trained steps are drawn from.

    Returns:
        In float32: the mean over all rows; a scalar.

    Source: Ho et al. 2020, eq. 14; for the variance Nichol & Dhariwal 2021, eq. 16, with the weight 1 of MAR.
    """
    timesteps = torch.randint(diffusion.trained_steps, data.shape[:-1], device=data.device)
    of_data, of_noise, share, low, high = _table(diffusion, data.device)[:, timesteps, None]
    data, noise = data.float(), torch.randn(data.shape, dtype=torch.float32, device=data.device)
    x = of_data * data + of_noise * noise
    output = head.from_embedding(x.to(embedded.dtype), head.time_embed(timesteps) + embedded).float()
    predicted, *rest = output.split(head.in_channels, dim=-1)
    loss = (predicted - noise).square().mean()
    if not rest:
        return loss
    log_variance = torch.lerp(low, high, (rest[0] + 1) / 2)
    seen = (x - of_noise * predicted.detach()) / of_data
    error = (share * (data - seen)).square() * torch.exp(-log_variance)
    divergence = 0.5 * (log_variance - low + torch.exp(low - log_variance) - 1 + error)
    likelihood = 0.5 * (math.log(2 * math.pi) + log_variance + error)
    return loss + torch.where(timesteps[..., None] == 0, likelihood, divergence).mean() / math.log(2)


@lru_cache(16)
def _table(diffusion: Diffusion, device: torch.device) -> Tensor:
    """For every trained timestep: factors of data and noise in x, and of the data in the mean of the step before it.

    Then the lowest and highest logarithm of the variance; [5, trained_steps].
    """
    beta = torch.tensor(diffusion.trained_betas(), dtype=torch.float64, device="cpu")
    signal = (1 - beta).cumprod(0)
    previous = torch.cat([signal.new_ones(1), signal[:-1]])
    share = beta * previous.sqrt() / (1 - signal)
    low = (beta * (1 - previous) / (1 - signal)).log()
    low[0] = low[1]  # that of the first step would be minus infinity
    return torch.stack([signal.sqrt(), (1 - signal).sqrt(), share, low, beta.log()]).float().to(device)


def predictor(
    head: FlowHead, condition: Tensor, timesteps: list[int], cfg: float = 1.0, null_condition: Tensor | None = None
) -> Predictor:
    """What the methods call, of a head under a condition; see `sample`."""
    conditioned = Conditioned(head, condition, timesteps, None if cfg == 1.0 else null_condition)

    def predict(x: Tensor, timestep: int) -> tuple[Tensor, Tensor | None]:
        outputs = [conditioned(x, timestep)] if cfg == 1.0 else conditioned.both(x, timestep)
        noise, *rest = outputs[0].split(head.in_channels, dim=-1)
        if cfg != 1.0:
            noise = guide(noise, outputs[1][..., : head.in_channels], cfg)
        return noise, rest[0] if rest else None

    return predict


def ddpm(
    predict: Predictor,
    x: Tensor,
    diffusion: Diffusion,
    temperature: float = 1.0,
    noises: Iterator[Tensor] | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020) from noise x, with the variance that the head gives, else the lower bound.

    The logarithm of the variance lies between those of the lower bound, beta * (1 - previous) / (1 - signal), and of
    beta (Nichol & Dhariwal 2021, eq. 15). `noises` gives that of each step but the last; drawn if not given.
    """
    noises = _drawn(x) if noises is None else noises
    for timestep, signal, previous in _steps_down(diffusion):
        alpha = signal / previous
        beta = 1 - alpha
        noise, place = predict(x, timestep)
        data = _data(x, noise, signal)
        mean = data * (beta * previous**0.5 / (1 - signal)) + x * ((1 - previous) * alpha**0.5 / (1 - signal))
        if previous == 1.0:
            return mean
        low, high = math.log(beta * (1 - previous) / (1 - signal)), math.log(beta)
        deviation = math.exp(0.5 * low)
        if place is None:
            x = mean + temperature * deviation * next(noises)
        else:
            share = (place.to(x.dtype) + 1) / 2
            x = mean + temperature * deviation * torch.exp(0.5 * (high - low) * share) * next(noises)
    return x


def ddim(
    predict: Predictor,
    x: Tensor,
    diffusion: Diffusion,
    eta: float = 0.0,
    temperature: float = 1.0,
    noises: Iterator[Tensor] | None = None,
) -> Tensor:
    """Implicit sampling (Song et al. 2021, eq. 12) from noise x; with eta = 0 it takes no `noises`."""
    noises = _drawn(x) if noises is None else noises
    for timestep, signal, previous in _steps_down(diffusion):
        noise, _ = predict(x, timestep)
        data = _data(x, noise, signal)
        variance = eta**2 * (1 - previous) / (1 - signal) * (1 - signal / previous)
        x = previous**0.5 * data + (1 - previous - variance) ** 0.5 * noise
        if variance:
            x = x + temperature * variance**0.5 * next(noises)
    return x


def dpm_solver(predict: Predictor, x: Tensor, diffusion: Diffusion) -> Tensor:
    """DPM-Solver++ of second order (Lu et al. 2022) from noise x, by the scheduler of diffusers; it draws nothing.

    Raises:
        ModuleNotFoundError: without diffusers, naming the extra.
    """
    try:
        from diffusers import DPMSolverMultistepScheduler
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "dpm-solver++ needs diffusers: pip install 'uniflow-kernels[diffusers]'", name=error.name
        ) from None
    scheduler = DPMSolverMultistepScheduler(diffusion.trained_steps, trained_betas=diffusion.trained_betas())
    scheduler.set_timesteps(timesteps=diffusion.timesteps()[::-1])
    for timestep in reversed(diffusion.timesteps()):
        noise, _ = predict(x, timestep)
        x = scheduler.step(noise.to(x.dtype), timestep, x).prev_sample
    return x


def _steps_down(diffusion: Diffusion) -> list[tuple[int, float, float]]:
    """Each sampled timestep from the last to the first, its signal and that of the step that it leads to."""
    signals = diffusion.signals()
    return list(zip(diffusion.timesteps(), signals, [1.0, *signals[:-1]], strict=True))[::-1]


def _data(x: Tensor, noise: Tensor, signal: float) -> Tensor:
    """The data that x holds beside the noise."""
    return (x - (1 - signal) ** 0.5 * noise) / signal**0.5


def _drawn(x: Tensor, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    while True:
        yield normal(x.shape, x.device, generator, x.dtype)
