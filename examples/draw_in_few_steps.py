"""Does a head that draws in one or two steps draw as well as one that takes twenty? On the digits of read_and_draw.py.

A model that draws digits is trained by flow matching. Another one is trained so for three quarters of the steps, and
its head tuned for the last quarter by mean flow or self-distillation, without guidance and with guidance built in, so
that drawing needs no second branch. Scored as there: the share that a classifier recognises, and the distance to real
digits, by the steps of the head, and in one step with two tokens at a time. Seconds are the processor's, to draw all.

    python -m examples.draw_in_few_steps --out out/few_steps      # needs uniflow-kernels[demo,hf]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.svm import SVC

from examples import read_and_draw as digits
from uniflow import Trainer, normalize
from uniflow.unifluid import UniFluid, UniFluidConfig, UniFluidObjective, draw_pictures
from uniflow.unifluid.captions import CaptionedPictures, every_text
from uniflow.unifluid.texts import make_text_tokenizer
from uniflow.unifluid.tokens import UniFlowTokens

GUIDED = 2.0
TUNED = 0.25  # share of the steps


class Way(NamedTuple):
    """How a model's head is tuned, see `UniFluidObjective`, and at which scales of guidance it is drawn with."""

    head: str
    share_equal: float
    guidance: float
    scales: tuple[float, ...]


FLOW = "flow matching"
WAYS = {
    "mean flow": Way("mean_flow", 0.5, 1.0, (1.0,)),
    "mean flow, guidance built in": Way("mean_flow", 0.5, GUIDED, (1.0,)),
    "self-distillation": Way("self_distillation", 0.75, 1.0, (1.0, GUIDED)),
    "self-distillation, guidance built in": Way("self_distillation", 0.75, GUIDED, (1.0,)),
}


class Digits:
    """What a seed's models have in common: pictures, their tokenizer, who judges drawings."""

    def __init__(self, seed: int, tokenizer_steps: int) -> None:
        self.seed = seed
        self.train, _ = digits.digits()
        self.texts = make_text_tokenizer(every_text(self.train), 300)
        self.tokenizer = UniFlowTokens(digits.train_tokenizer(self.train, tokenizer_steps, seed), steps=1)
        self.judge = SVC(gamma=0.001).fit(digits.Pixels()(self.train.pixels).numpy(), self.train.labels.numpy())

    def model(self) -> UniFluid:
        """A new one, that only draws."""
        backbone = {**digits.TRANSFORMER, "vocab_size": len(self.texts)}
        tokens = self.tokenizer
        config = UniFluidConfig(backbone, tokens.channels, tokens.grid, digits.HEAD_WIDTH, digits.HEAD_DEPTH)
        torch.manual_seed(self.seed)
        model = UniFluid(config, self.texts)
        model.set_statistics(tokens.encode(normalize(self.train.pixels)))
        return model

    def fit(self, model: UniFluid, steps: int, seed: int, **how: float) -> UniFluid:
        """Train it."""
        size = (digits.SIZE, digits.SIZE)
        samples = CaptionedPictures(self.train, self.texts, size, size, 32, seed, reading_share=0.0)
        recipe = digits.recipe(steps, digits.BATCH, 1e-3, seed)
        Trainer(UniFluidObjective(model, self.tokenizer, **how), samples, recipe).run()
        return model.eval()

    def score(self, model: UniFluid, head_steps: int, cfg: float, steps: int | None = None) -> dict[str, float]:
        """Of digits drawn: the share that is recognised in percent, their distance, and how long they took."""
        labels = torch.arange(len(digits.NAMES)).repeat_interleave(digits.DRAWN)
        captions = [f"a {digits.NAMES[label]}" for label in labels]
        generator, began = torch.Generator().manual_seed(self.seed), time.process_time()
        pictures = draw_pictures(
            model, self.tokenizer, captions, generator, cfg=cfg, head_steps=head_steps, steps=steps
        )
        seconds = time.process_time() - began
        right = torch.from_numpy(self.judge.predict(digits.Pixels()(pictures).numpy())) == labels
        return {
            "recognised, %": 100 * right.float().mean().item(),
            "distance": digits.distance(pictures, self.train.pixels),
            "seconds": seconds,
        }


def run(seed: int, steps: int, tokenizer_steps: int) -> dict[str, dict[str, float]]:
    """The scores of all ways to draw, by what they are."""
    given, scores = Digits(seed, tokenizer_steps), {}

    def add(name: str, model: UniFluid, scales: tuple[float, ...], counts: Sequence[int]) -> None:
        for cfg in scales:
            guided = ", guided" if cfg != 1.0 else ""
            for count in counts:
                scores[f"{name}{guided}, {count}"] = given.score(model, count, cfg)
            scores[f"{name}{guided}, 1, two tokens"] = given.score(model, 1, cfg, model.config.tokens // 2)
        print(f"seed {seed}: {name}: done after {time.process_time():.0f} s", flush=True)

    add(FLOW, given.fit(given.model(), steps, seed), (1.0, GUIDED), (20, 4, 2, 1))
    tuned = int(TUNED * steps)
    first = given.fit(given.model(), steps - tuned, seed)
    for name, way in WAYS.items():
        how = {"share_equal": way.share_equal, "guidance": way.guidance}
        model = given.fit(first.for_intervals(way.head), tuned, seed + 1, **how)
        add(name, model, way.scales, (4, 2, 1))
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run every seed, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of each model")
    parser.add_argument("--tokenizer-steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("out/few_steps"), help="folder for the table")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # models so small gain nothing from a second one
    runs = []
    for seed in range(options.seeds):
        runs.append(run(seed, options.steps, options.tokenizer_steps))
        (options.out / "table.md").write_text(digits.table(runs) + "\n", encoding="utf-8")
    print(f"\n{digits.table(runs)}\n\ntable in {options.out}")


if __name__ == "__main__":
    main()
