"""Does one model that reads and draws do either better than two models? UniFluid's question, made small.

A tiny UniFlow learns to tokenize scikit-learn's handwritten digits (8x8 pixels, 16 tokens). Its frozen tokens and
features are what four transformers are trained on for as many steps: one that draws digits from captions ("a seven")
and reads them ("which digit?"); one that only draws; one that only reads; and one that does both but draws in raster
order. Every step of a single task has as many examples of it as one of both tasks. Scored are drawn digits, by a
classifier trained on real ones and by their Fréchet distance to these, and answers about digits never seen.

    python examples/read_and_draw.py --out out/read_and_draw      # needs uniflow-kernels[demo,hf]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from uniflow import Recipe, Trainer, UniFlow, UniFlowConfig, UniFlowObjective, normalize
from uniflow.data import PictureList, RandomCrops
from uniflow.pictures import save_picture
from uniflow.training import Stage
from uniflow.unifluid import UniFluid, UniFluidConfig, UniFluidObjective, answer, draw_pictures
from uniflow.unifluid.captions import CaptionedPictures, Kind, Texts, every_text
from uniflow.unifluid.conversations import about_a_picture, question_ids
from uniflow.unifluid.features import VisionFeatures
from uniflow.unifluid.slots import picture_slots
from uniflow.unifluid.texts import make_text_tokenizer, padded
from uniflow.unifluid.tokens import UniFlowTokens

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "which digit?"
SIZE = 8
TRAINED_ON = 1397  # of 1,797; the others are asked about
TOKENIZER = UniFlowConfig(
    image_size=SIZE,
    patch_size=2,
    hidden_size=64,
    vit_hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    latent_ch=8,
    global_blocks_depth=1,
    num_decoder_layers=2,
    initializer_range=0.1,  # about 1/sqrt(width)
)
TRANSFORMER = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
HEAD_WIDTH, HEAD_DEPTH = 128, 3
BATCH = 32  # examples of a task in a step
DRAWN = 30  # of each digit, to score
SHOWN = 8  # of each digit, on the contact sheet
GUIDED = 2.0


class Way(NamedTuple):
    """What a model is trained for: the share of readings, the order it draws in, the weight of image tokens."""

    reading_share: float
    order: str = "random"
    image_weight: float = 1.0


WAYS = {
    "both": Way(0.5),
    "draws only": Way(0.0),
    "reads only": Way(1.0),
    "both, raster order": Way(0.5, "raster"),
}


class Digits(PictureList):
    """Digits as pictures with captions and questions."""

    def __init__(self, pictures: np.ndarray, labels: np.ndarray) -> None:
        scaled = (pictures * 255 / 16).round().astype(np.uint8)
        super().__init__({f"digit {i}": Image.fromarray(pixels).convert("RGB") for i, pixels in enumerate(scaled)})
        self.labels = torch.from_numpy(labels)
        self.pixels = torch.from_numpy(scaled).unsqueeze(1).expand(-1, 3, -1, -1)

    def texts(self, number: int) -> Texts:
        """Its name in a caption, and as an answer."""
        name = NAMES[int(self.labels[number])]
        return Texts(f"a {name}", QUESTION, name)

    def further(self, number: int, kind: Kind) -> list[Image.Image]:
        """None: a digit is drawn from its caption, and asked about alone."""
        return []


def digits() -> tuple[Digits, Digits]:
    """Those to train on and those to ask about, the same ones every time."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    seen, unseen = order[:TRAINED_ON], order[TRAINED_ON:]
    return Digits(data.images[seen], data.target[seen]), Digits(data.images[unseen], data.target[unseen])


def recipe(steps: int, batch: int, learning_rate: float, seed: int) -> Recipe:
    """Warmup and cosine."""
    return Recipe((Stage(steps, learning_rate=learning_rate, warmup_steps=20),), batch_size=batch, seed=seed)


def train_tokenizer(train: PictureList, steps: int, seed: int, config: UniFlowConfig = TOKENIZER) -> UniFlow:
    """For reconstruction alone: its encoder knows nothing yet that distillation could keep."""
    torch.manual_seed(seed)
    model = UniFlow(config)
    crops = RandomCrops(train, SIZE, seed, smallest=1.0, flip=False)
    Trainer(UniFlowObjective(model, distill_weight=0.0), crops, recipe(steps, 64, 2e-3, seed)).run()
    return model.eval()


def train_model(
    way: Way, train: Digits, tokenizer: UniFlowTokens, vision: VisionFeatures, steps: int, seed: int
) -> UniFluid:
    """A UniFluid for one or both tasks."""
    texts = make_text_tokenizer(every_text(train), 300)
    config = UniFluidConfig(
        {**TRANSFORMER, "vocab_size": len(texts)},
        tokenizer.channels,
        tokenizer.grid,
        HEAD_WIDTH,
        HEAD_DEPTH,
        order=way.order,
        vision_channels=vision.width,
    )
    torch.manual_seed(seed)
    model = UniFluid(config, texts)
    model.set_statistics(tokenizer.encode(normalize(train.pixels)))
    size, share = (SIZE, SIZE), way.reading_share
    samples = CaptionedPictures(train, texts, size, size, 32, seed, share, features=vision.tokens)
    batch = 2 * BATCH if 0 < share < 1 else BATCH
    objective = UniFluidObjective(model, tokenizer, vision, image_weight=way.image_weight)
    Trainer(objective, samples, recipe(steps, batch, 1e-3, seed)).run()
    return model.eval()


class Pixels(nn.Module):
    """The 64 pixels of a digit as its features."""

    num_features = SIZE * SIZE

    def forward(self, pictures: Tensor) -> Tensor:
        """Uint8 [B, 3, 8, 8] to [B, 64], in [0, 16] as scikit-learn has them."""
        return pictures.float().mean(1).flatten(1) * 16 / 255


def distance(pictures: Tensor, others: Tensor) -> float:
    """Fréchet distance between two sets of digits, uint8 [B, 3, 8, 8], by their pixels."""
    metric = FrechetInceptionDistance(Pixels())
    metric.update(others, real=True)
    metric.update(pictures, real=False)
    return float(metric.compute())


def score_drawings(model: UniFluid, tokenizer: UniFlowTokens, train: Digits, judge: SVC, seed: int) -> dict[str, float]:
    """Of digits drawn without and with guidance: the share that is recognised in percent, and the distance."""
    labels = torch.arange(len(NAMES)).repeat_interleave(DRAWN)
    captions = [f"a {NAMES[label]}" for label in labels]
    scores = {}
    for cfg, name in ((1.0, ""), (GUIDED, ", guided")):
        generator = torch.Generator().manual_seed(seed)
        pictures = draw_pictures(model, tokenizer, captions, generator, cfg=cfg)
        recognised = torch.from_numpy(judge.predict(Pixels()(pictures).numpy())) == labels
        scores[f"recognised{name}, %"] = 100 * recognised.float().mean().item()
        scores[f"distance{name}"] = distance(pictures, train.pixels)
    return scores


def score_answers(model: UniFluid, vision: VisionFeatures, unseen: Digits) -> dict[str, float]:
    """How many answers about digits never seen are right, in percent."""
    question = question_ids(model.text_tokenizer, about_a_picture(QUESTION), [picture_slots(vision.tokens)])
    ids, real = padded([question] * len(unseen), model.text_tokenizer)
    answers = answer(model, vision(normalize(unseen.pixels)), ids, real, longest=8)
    right = [text == NAMES[label] for text, label in zip(answers, unseen.labels, strict=True)]
    return {"answers, %": 100 * float(np.mean(right))}


def run(seed: int, steps: int, tokenizer_steps: int, out: Path, ways: dict[str, Way]) -> dict[str, dict[str, float]]:
    """A tokenizer, and a model in each of the ways."""
    train, unseen = digits()
    judge = SVC(gamma=0.001).fit(Pixels()(train.pixels).numpy(), train.labels.numpy())
    tokenizer = UniFlowTokens(train_tokenizer(train, tokenizer_steps, seed), steps=1)
    vision = VisionFeatures(tokenizer.model)
    right = judge.predict(Pixels()(unseen.pixels).numpy()) == unseen.labels.numpy()
    scores = {
        "digits never seen": {
            "recognised, %": 100 * float(right.mean()),
            "distance": distance(unseen.pixels, train.pixels),
        }
    }
    for name, way in ways.items():
        began = time.perf_counter()
        model = train_model(way, train, tokenizer, vision, steps, seed)
        scores[name] = {}
        if way.reading_share < 1:
            scores[name] |= score_drawings(model, tokenizer, train, judge, seed)
        if way.reading_share > 0:
            scores[name] |= score_answers(model, vision, unseen)
        if seed == 0 and name == "both":
            save_sheet(model, tokenizer, out / "sheet.png")
        said = ", ".join(f"{what} {value:.1f}" for what, value in scores[name].items())
        print(f"seed {seed}: {name}: {said} ({time.perf_counter() - began:.0f} s)", flush=True)
    return scores


def save_sheet(model: UniFluid, tokenizer: UniFlowTokens, path: Path) -> None:
    """Drawn digits, a row for each caption, enlarged."""
    captions = [f"a {name}" for name in NAMES for _ in range(SHOWN)]
    pictures = draw_pictures(model, tokenizer, captions, torch.Generator().manual_seed(0), cfg=GUIDED)
    enlarged = pictures.repeat_interleave(4, 2).repeat_interleave(4, 3)
    save_picture(rearrange(enlarged, "(rows n) c h w -> c (rows h) (n w)", n=SHOWN), path)


def table(runs: list[dict[str, dict[str, float]]]) -> str:
    """Mean and standard deviation over the seeds, in Markdown."""
    columns = list(dict.fromkeys(column for scores in runs[0].values() for column in scores))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in runs[0]:
        cells = []
        for column in columns:
            values = [scores[name][column] for scores in runs if column in scores[name]]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run every seed, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400, help="of each model")
    parser.add_argument("--tokenizer-steps", type=int, default=400)
    parser.add_argument(
        "--image-weights", type=float, nargs="+", help="both tasks with each of these, instead of the four"
    )
    parser.add_argument("--out", type=Path, default=Path("out/read_and_draw"), help="folder for sheet and table")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    ways = {f"image_weight {w:g}": Way(0.5, image_weight=w) for w in options.image_weights or ()} or WAYS
    one_seed = partial(run, steps=options.steps, tokenizer_steps=options.tokenizer_steps, out=options.out, ways=ways)
    # models so small gain nothing from a second thread, seeds do from a second process
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        runs = list(pool.map(one_seed, range(options.seeds)))
    (options.out / "table.md").write_text(table(runs) + "\n", encoding="utf-8")
    print(f"\n{table(runs)}\n\nsheet and table in {options.out}")


if __name__ == "__main__":
    main()
