"""Does a generator of latents draw what it is told, and what does it depend on? On the digits of read_and_draw.py.

A tokenizer makes four tokens of 16 channels of a digit, and a small `FlowTransformer` learns to draw them by class:
with three heads, at as many parameters; on latents that are not standardised; on those of a tokenizer that learnt to
decode noisy ones (`latent_noise`); on pixels, without a tokenizer, which have the same shape; and with a transformer
narrower than a token. Scored is what a classifier recognises of drawn digits, and their Fréchet distance to real ones,
by guidance and steps.

    python -m examples.generate_digits --out out/generate_digits      # needs uniflow-kernels[demo,hf]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from sklearn.svm import SVC
from torch import Tensor

from examples import read_and_draw as digits
from examples.win_win import RandomRows
from uniflow import Recipe, Trainer, UniFlow, normalize
from uniflow.generation import (
    FlowTransformer,
    FlowTransformerConfig,
    FlowTransformerObjective,
    draw_latents,
    picture_seeds,
)
from uniflow.latent_set import ChannelStatistics
from uniflow.normalization import to_uint8
from uniflow.pictures import save_picture
from uniflow.training import Stage
from uniflow_kernels import patchify, unpatchify
from uniflow_kernels.solvers import Plan

PATCH, CHANNELS = 4, 16  # patches of 2, as read_and_draw.py has them, would take three times as long
TOKENIZER = replace(digits.TOKENIZER, patch_size=PATCH, latent_ch=CHANNELS)
WIDTH = 64
LATENT_NOISE = 0.8  # RAE's
DRAWN, SHOWN = 30, 8  # of each digit, to score and on the contact sheet
GUIDED, STEPS = 2.0, 20

FLOW = {"head": "flow", "depth": 4, "head_depth": 2}
WIDE = {"head": "wide", "depth": 4, "head_depth": 1}
LINEAR = {"head": "linear", "depth": 5}
NARROW = {"width": 12, "heads": 3}  # less than a token's channels


class Space(NamedTuple):
    """What is drawn: the training digits' [n, 4, 16], and how digits, uint8 [B, 3, 8, 8], come of such and of seeds."""

    rows: Tensor
    decode: Callable[[Tensor, Tensor], Tensor]


class Way(NamedTuple):
    """In which space a generator draws, whether it is standardised there, and fields of its config."""

    space: str
    standardised: bool
    shape: dict[str, Any]


MAIN = "latents, flow head"
WAYS = {
    MAIN: Way("latents", True, FLOW),
    "latents, wide head": Way("latents", True, WIDE),
    "latents, linear head": Way("latents", True, LINEAR),
    "latents, not standardised": Way("latents", False, FLOW),
    "latents of a tokenizer with latent_noise": Way("noisy latents", True, FLOW),
    "pixels, no tokenizer": Way("pixels", True, FLOW),
    "narrow transformer, flow head": Way("latents", True, FLOW | NARROW),
    "narrow transformer, linear head": Way("latents", True, LINEAR | NARROW),
}
PLANS = {
    **{f"cfg {cfg:g}, {STEPS} steps": Plan(STEPS, cfg=cfg) for cfg in (1.0, 1.5, GUIDED, 3.0, 5.0)},
    f"cfg {GUIDED:g} at sigma 0.2 to 5, {STEPS} steps": Plan(STEPS, cfg=GUIDED, cfg_interval=(0.2, 5.0)),
    **{f"cfg {cfg:g}, {steps} steps": Plan(steps, cfg=cfg) for cfg in (1.0, GUIDED) for steps in (50, 8, 4, 2, 1)},
    **{f"cfg 1, {steps} of Heun": Plan(steps, solver="heun") for steps in (10, 4, 2)},
}


def latents_of(train: digits.Digits, tokenizer: UniFlow) -> Space:
    """Of a tokenizer, which decodes in one step."""

    @torch.no_grad()
    def decode(latents: Tensor, seeds: Tensor) -> Tensor:
        return to_uint8(tokenizer.decode(latents, steps=1, seed=seeds))

    with torch.no_grad():
        return Space(tokenizer.encode(normalize(train.pixels)), decode)


def pixels_of(train: digits.Digits) -> Space:
    """The grey values of patches, from -1 to 1."""

    def decode(rows: Tensor, _: Tensor) -> Tensor:
        grey = unpatchify(rows, PATCH).clamp(-1, 1)
        return ((grey + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)

    return Space(patchify(train.pixels[:, :1].float() / 127.5 - 1, PATCH), decode)


def train_generator(way: Way, rows: Tensor, labels: Tensor, steps: int, seed: int) -> FlowTransformer:
    """The average of the weights over the last part of its training."""
    grid = (digits.SIZE // PATCH, digits.SIZE // PATCH)
    torch.manual_seed(seed)
    shape = {"width": WIDTH, "heads": 4, "head_width": WIDTH, **way.shape}
    model = FlowTransformer(FlowTransformerConfig(CHANNELS, grid, len(digits.NAMES), **shape))
    if way.standardised:
        model.set_statistics(ChannelStatistics(rows.mean((0, 1)), rows.std((0, 1))))
    stage = Stage(steps, learning_rate=3e-3, warmup_steps=50)
    recipe = Recipe((stage,), batch_size=64, seed=seed, ema_decay=0.99)
    trainer = Trainer(FlowTransformerObjective(model), RandomRows(seed, rows, labels), recipe)
    trainer.run()
    assert trainer.average is not None
    model.load_state_dict({**model.state_dict(), **trainer.average.values})
    return model.eval()


class Judge:
    """Who scores digits: a classifier trained on the real ones, and the distance to them."""

    def __init__(self, train: digits.Digits) -> None:
        self.train, self.pixels = train, digits.Pixels()
        self.classifier = SVC(gamma=0.001).fit(self.pixels(train.pixels).numpy(), train.labels.numpy())

    def scores(self, pictures: Tensor, labels: Tensor, addition: str = "") -> dict[str, float]:
        """The share that is recognised in percent, and the Fréchet distance."""
        right = torch.from_numpy(self.classifier.predict(self.pixels(pictures).numpy())) == labels
        return {
            f"recognised{addition}, %": 100 * right.float().mean().item(),
            f"distance{addition}": digits.distance(pictures, self.train.pixels),
        }


def draw(model: FlowTransformer, space: Space, plan: Plan, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """So many digits of each class, one class after the other in turn, and their labels."""
    numbers = range(count * len(digits.NAMES))
    seeds, of_decoder = picture_seeds(seed, numbers)
    labels = torch.arange(len(numbers)) % len(digits.NAMES)
    return space.decode(draw_latents(model, seeds, labels, plan), of_decoder), labels


def run(seed: int, steps: int, tokenizer_steps: int, out: Path) -> tuple[dict[str, dict[str, float]], ...]:
    """Tokenizers, and a generator in each of the ways; scores by way, and of the first way by plan."""
    train, unseen = digits.digits()
    judge = Judge(train)
    tokenizer = digits.train_tokenizer(train, tokenizer_steps, seed, TOKENIZER)
    noisy = digits.train_tokenizer(train, tokenizer_steps, seed, replace(TOKENIZER, latent_noise=LATENT_NOISE))
    spaces = {
        "latents": latents_of(train, tokenizer),
        "noisy latents": latents_of(train, noisy),
        "pixels": pixels_of(train),
    }
    ways = {"digits never seen": judge.scores(unseen.pixels, unseen.labels)}
    for name, space in list(spaces.items())[:2]:
        reconstructed = space.decode(space.rows, picture_seeds(seed, range(len(space.rows)))[1])
        ways[f"reconstructions, {name}"] = judge.scores(reconstructed, train.labels)
    plans: dict[str, dict[str, float]] = {}
    for name, way in WAYS.items():
        space, began = spaces[way.space], time.process_time()
        model = train_generator(way, space.rows, train.labels, steps, seed)
        seconds = time.process_time() - began
        ways[name] = {}
        for addition, cfg in (("", 1.0), (", guided", GUIDED)):
            ways[name] |= judge.scores(*draw(model, space, Plan(STEPS, cfg=cfg), DRAWN, seed), addition)
        ways[name] |= {"thousand parameters": sum(p.numel() for p in model.parameters()) / 1e3, "seconds": seconds}
        said = ", ".join(f"{what} {value:.1f}" for what, value in ways[name].items())
        print(f"seed {seed}: {name}: {said}", flush=True)
        if name == MAIN:
            plans = {said: judge.scores(*draw(model, space, plan, DRAWN, seed)) for said, plan in PLANS.items()}
            if seed == 0:
                save_sheet(draw(model, space, Plan(STEPS, cfg=GUIDED), SHOWN, seed)[0], out / "sheet.png")
    return ways, plans


def save_sheet(pictures: Tensor, path: Path) -> None:
    """Drawn digits, a row for each class, enlarged."""
    enlarged = pictures.repeat_interleave(4, 2).repeat_interleave(4, 3)
    save_picture(rearrange(enlarged, "(n rows) c h w -> c (rows h) (n w)", rows=len(digits.NAMES)), path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run every seed, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="of each generator")
    parser.add_argument("--tokenizer-steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("out/generate_digits"), help="folder for sheet and tables")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    one_seed = partial(run, steps=options.steps, tokenizer_steps=options.tokenizer_steps, out=options.out)
    # models so small gain nothing from a second thread, seeds do from a second process
    runs: list[tuple[dict[str, dict[str, float]], ...]] = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for made in pool.map(one_seed, range(options.seeds)):
            runs.append(made)
            tables = "\n\n".join(digits.table(list(part)) for part in zip(*runs, strict=True))
            (options.out / "tables.md").write_text(tables + "\n", encoding="utf-8")
    print(f"\n{tables}\n\nsheet and tables in {options.out}")


if __name__ == "__main__":
    main()
