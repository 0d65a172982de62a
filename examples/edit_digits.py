"""Can a picture be the instruction? UniFluid edits scikit-learn's digits, and draws others in their style.

One transformer, that of read_and_draw.py, learns to draw from a picture and a text: to mirror a digit, to make it bold,
to invert it; and to draw another digit in the style (plain, bold, inverted) of the picture. It sees the features of the
picture and its clean image tokens. Scored on digits never seen: an edit is right if, among what every instruction makes
of all of them, and they themselves, what was drawn is nearest to what this instruction makes of this digit; a drawing
in a style, if a classifier of digits and styles finds both.

    python -m examples.edit_digits --out out/edit_digits      # needs uniflow-kernels[demo,hf]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from sklearn.svm import SVC
from torch import Tensor

from examples.read_and_draw import (
    HEAD_DEPTH,
    HEAD_WIDTH,
    NAMES,
    SIZE,
    TRANSFORMER,
    Digits,
    Pixels,
    digits,
    recipe,
    train_tokenizer,
)
from uniflow import Trainer, normalize
from uniflow.data import PictureList
from uniflow.normalization import to_uint8
from uniflow.pictures import save_picture
from uniflow.unifluid import UniFluid, UniFluidConfig, UniFluidObjective, draw_pictures, see_sources
from uniflow.unifluid.captions import CaptionedPictures, Kind, Texts, every_text
from uniflow.unifluid.features import VisionFeatures
from uniflow.unifluid.slots import source_slots
from uniflow.unifluid.texts import make_text_tokenizer
from uniflow.unifluid.tokens import UniFlowTokens

BATCH = 64
HOW = {"steps": 8, "head_steps": 10}
GUIDED = {"cfg": 1.5, "cfg_source": 1.5}
SHOWN, GREY = 12, 128  # of each row of the contact sheet; what is between its pictures


def bold(pictures: Tensor) -> Tensor:
    """Strokes a pixel wider, upwards and to the left."""
    return F.max_pool2d(F.pad(pictures.float(), (0, 1, 0, 1)), 2, 1).to(pictures.dtype)


EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "mirror it": lambda pictures: pictures.flip(-1),
    "make it bold": bold,
    "invert it": lambda pictures: 255 - pictures,
}
STYLES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda pictures: pictures,
    "bold": EDITS["make it bold"],
    "inverted": EDITS["invert it"],
}


class Edits(PictureList):
    """Pictures with captions, each to be drawn from another picture."""

    def __init__(self, sources: Tensor, captions: Sequence[str], targets: Tensor) -> None:
        super().__init__({f"edit {number}": _image(target) for number, target in enumerate(targets)})
        self.sources, self.captions, self.targets = sources, captions, targets

    def texts(self, number: int) -> Texts:
        """An instruction, and that there is a source."""
        return Texts(self.captions[number], sources=1)

    def further(self, number: int, kind: Kind) -> list[Image.Image]:
        """The source."""
        return [_image(self.sources[number])]


def edits_of(of: Digits) -> Edits:
    """What each instruction makes of every digit."""
    pictures, count = of.pixels, len(of)
    captions = [caption for caption in EDITS for _ in range(count)]
    return Edits(pictures.repeat(len(EDITS), 1, 1, 1), captions, torch.cat([edit(pictures) for edit in EDITS.values()]))


def in_styles(of: Digits, seed: int) -> tuple[Edits, Tensor, Tensor]:
    """Other digits in the style of every digit, in each style once; their labels and the numbers of their styles."""
    rng, count = np.random.default_rng(seed), len(of)
    other = torch.from_numpy(np.concatenate([rng.permutation(count) for _ in STYLES]))
    sources = torch.cat([style(of.pixels) for style in STYLES.values()])
    styled = [style(of.pixels[part]) for style, part in zip(STYLES.values(), other.chunk(len(STYLES)), strict=True)]
    labels = of.labels[other]
    captions = [f"a {NAMES[label]} in this style" for label in labels]
    return Edits(sources, captions, torch.cat(styled)), labels, torch.arange(len(STYLES)).repeat_interleave(count)


def train_model(train: Edits, tokenizer: UniFlowTokens, vision: VisionFeatures, steps: int, seed: int) -> UniFluid:
    """A UniFluid that draws from pictures alone."""
    texts = make_text_tokenizer(every_text(train), 300)
    config = UniFluidConfig(
        {**TRANSFORMER, "vocab_size": len(texts), "max_position_embeddings": 128},
        tokenizer.channels,
        tokenizer.grid,
        HEAD_WIDTH,
        HEAD_DEPTH,
        vision_channels=vision.width,
        sources="both",
    )
    torch.manual_seed(seed)
    model = UniFluid(config, texts)
    model.train_for(drawing=True, reading=False)
    model.set_statistics(tokenizer.encode(normalize(train.targets)))
    size, slots = (SIZE, SIZE), source_slots(config.sources, vision.tokens, config.tokens)
    samples = CaptionedPictures(train, texts, size, size, 32, seed, source=slots)
    Trainer(UniFluidObjective(model, tokenizer, vision), samples, recipe(steps, BATCH, 1e-3, seed)).run()
    return model.eval()


def draw(
    model: UniFluid, tokenizer: UniFlowTokens, vision: VisionFeatures, edits: Edits, seed: int, **how: float
) -> Tensor:
    """What a model makes of the sources, uint8 [B, 3, 8, 8]."""
    sources = see_sources(model, tokenizer, vision, edits.sources, edits.sources)
    return draw_pictures(model, tokenizer, edits.captions, torch.Generator().manual_seed(seed), sources, **HOW, **how)


def right_edits(drawn: Tensor, unseen: Digits) -> dict[str, float]:
    """Of each instruction, the share in percent of drawings that are nearest to what it makes of their source."""
    pixels = Pixels()
    everything = torch.cat([unseen.pixels, *(edit(unseen.pixels) for edit in EDITS.values())])
    nearest = torch.cdist(pixels(drawn), pixels(everything)).argmin(1)
    same = (pixels(everything)[nearest] == pixels(everything)[len(unseen) :]).all(1)  # some digits are symmetric
    shares = same.float().view(len(EDITS), -1).mean(1)
    return {caption: 100 * float(share) for caption, share in zip(EDITS, shares, strict=True)}


def run(seed: int, steps: int, tokenizer_steps: int, out: Path) -> dict[str, dict[str, float]]:
    """A tokenizer, a model, and its scores without and with guidance."""
    began = time.perf_counter()
    train, unseen = digits()
    edits, (styled, _, _) = edits_of(train), in_styles(train, seed)
    both = Edits(
        torch.cat([edits.sources, styled.sources]),
        [*edits.captions, *styled.captions],
        torch.cat([edits.targets, styled.targets]),
    )
    tokenizer = UniFlowTokens(train_tokenizer(both, tokenizer_steps, seed), steps=1)
    vision = VisionFeatures(tokenizer.model)
    pixels, labels = Pixels(), train.labels
    every_style = torch.cat([style(train.pixels) for style in STYLES.values()])
    kinds = torch.cat([labels + len(NAMES) * number for number in range(len(STYLES))])
    judge = SVC(gamma=0.001).fit(pixels(every_style).numpy(), kinds.numpy())

    tests, (new, wanted, styles) = edits_of(unseen), in_styles(unseen, seed)
    expected = (wanted + len(NAMES) * styles).numpy()

    def scores_of(edited: Tensor, drawn: Tensor) -> dict[str, float]:
        found = judge.predict(pixels(drawn).numpy())
        scores = right_edits(edited, unseen) | {"digit and style": 100 * float((found == expected).mean())}
        return scores

    decoded = [tokenizer.decode(tokenizer.encode(normalize(part.targets))) for part in (tests, new)]
    scores = {"the tokenizer's reconstructions": scores_of(*(to_uint8(part) for part in decoded))}
    print(f"tokenizer after {time.perf_counter() - began:.0f} s: {scores}", flush=True)
    model = train_model(both, tokenizer, vision, steps, seed)
    print(f"trained after {time.perf_counter() - began:.0f} s", flush=True)
    for name, how in (("drawn", {}), ("drawn, guided", GUIDED)):
        pictures = [draw(model, tokenizer, vision, part, seed, **how) for part in (tests, new)]
        scores[name] = scores_of(*pictures)
        print(f"{name} after {time.perf_counter() - began:.0f} s: {scores[name]}", flush=True)
        if how and seed == 0:
            save_sheet([(tests, pictures[0]), (new, pictures[1])], out / "sheet.png")
    return scores


def save_sheet(drawn: Sequence[tuple[Edits, Tensor]], path: Path) -> None:
    """For each instruction and style a row of sources, and under it what was drawn from them, enlarged."""
    rows = []
    for edits, pictures in drawn:
        for sources, targets in zip(edits.sources.chunk(len(EDITS)), pictures.chunk(len(EDITS)), strict=True):
            framed = (F.pad(part[:SHOWN], (1, 1, 1, 0), value=GREY) for part in (sources, targets))
            pair = torch.cat([rearrange(part, "n c h w -> c h (n w)") for part in framed], dim=1)
            rows.append(F.pad(pair, (0, 0, 0, 2), value=GREY))
    save_picture(torch.cat(rows, dim=-2).repeat_interleave(4, 1).repeat_interleave(4, 2), path)


def table(runs: Sequence[dict[str, dict[str, float]]]) -> str:
    """Mean over the seeds, and the standard deviation of several, in Markdown."""
    columns = list(next(iter(runs[0].values())))
    lines = [f"| right, % | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in runs[0]:
        values = np.array([[scores[name][column] for column in columns] for scores in runs])
        spread = values.std(0, ddof=1) if len(runs) > 1 else None
        cells = [
            f"{mean:.1f}" + ("" if spread is None else f" ± {spread[k]:.1f}") for k, mean in enumerate(values.mean(0))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run every seed, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokenizer-steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("out/edit_digits"), help="folder for sheet and table")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [run(seed, options.steps, options.tokenizer_steps, options.out) for seed in range(options.seeds)]
    (options.out / "table.md").write_text(table(runs) + "\n", encoding="utf-8")
    print(f"\n{table(runs)}\n\nsheet and table in {options.out}")


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


if __name__ == "__main__":
    main()
