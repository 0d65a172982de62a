"""Does distillation keep an encoder able to understand while it learns to reconstruct? The paper's claim, made small.

A small ViT learns to classify scikit-learn's handwritten digits (8x8 pixels, in patches of 2). A tokenizer is then
trained around it in four ways: without distillation; with a frozen copy of the ViT as the teacher and one weight for
all layers; with the paper's adaptive weights; and with the encoder frozen. Each is scored on digits that neither has
seen: how well a linear classifier does on the encoder's last layer, and how close one-step reconstructions come.

    python examples/win_win.py --out out/win_win      # needs uniflow-kernels[demo]

The models and the digits, as pictures, are written too, so that `uniflow probe` can ask the same of more layers.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from uniflow import Recipe, Trainer, UniFlow, UniFlowConfig, UniFlowObjective, denormalize, normalize
from uniflow.data import Sample, Samples
from uniflow.evaluation import Labelled, linear_accuracy
from uniflow.pictures import save_picture
from uniflow.pretrained import PretrainedEncoder
from uniflow.training import Stage

CONFIG = UniFlowConfig(
    image_size=8,
    patch_size=2,
    hidden_size=64,
    vit_hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    latent_ch=8,
    global_blocks_depth=1,
    num_decoder_layers=2,
    initializer_range=0.1,  # about 1/sqrt(width)
)
# what differs: arguments of the objective, and what learns
WAYS: dict[str, tuple[dict[str, Any], Literal["all", "decoder"]]] = {
    "no distillation": ({"distill_weight": 0.0}, "all"),
    "uniform weights": ({"layer_weights": "uniform"}, "all"),
    "adaptive weights": ({"layer_weights": "adaptive", "beta": 2.0}, "all"),
    "frozen encoder": ({"distill_weight": 0.0}, "decoder"),
}


class Digits(NamedTuple):
    """Pictures, uint8 [N, 3, 8, 8], and their labels [N]."""

    pictures: Tensor
    labels: Tensor

    @property
    def images(self) -> Tensor:
        """As the model takes them."""
        return normalize(self.pictures)

    def write(self, folder: Path) -> None:
        """Each to a file, in a folder for each label."""
        for number, (picture, label) in enumerate(zip(self.pictures, self.labels.tolist(), strict=True)):
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
            save_picture(picture, folder / str(label) / f"{number:04}.png")


def digits() -> tuple[Digits, Digits]:
    """1,197 to train on and 600 to test on, the same ones every time."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pixels = (data.images[order] * (255 / 16)).round()  # whole numbers from 0 to 16
    pictures = torch.tensor(pixels, dtype=torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1)
    labels = torch.tensor(data.target[order])
    return Digits(pictures[:-600], labels[:-600]), Digits(pictures[-600:], labels[-600:])


class RandomRows(Samples):
    """An endless stream of rows of some tensors, drawn with replacement."""

    def __init__(self, seed: int, *tensors: Tensor) -> None:
        self.seed, self.tensors = seed, tensors

    def __getitem__(self, position: int) -> Sample:
        """One row of each tensor."""
        row = int(np.random.default_rng((self.seed, position)).integers(len(self.tensors[0])))
        return Sample([tensor[row] for tensor in self.tensors], f"row {row}", [])

    def collate(self, values: list[list[Tensor]]) -> tuple[Tensor, ...]:
        """A batch of each tensor."""
        return tuple(torch.stack(rows) for rows in zip(*values, strict=True))


def train(objective: nn.Module, rows: RandomRows, steps: int, learns: Literal["all", "decoder"] = "all") -> None:
    """Train the objective's student, in place."""
    stage = Stage(steps, learns, learning_rate=2e-3, warmup_steps=20)
    recipe = Recipe((stage,), batch_size=32, weight_decay=0.05, betas=(0.9, 0.999), seed=rows.seed)
    Trainer(objective, rows, recipe).run()


class CrossEntropy(NamedTuple):
    """The loss, and nothing else to log."""

    total: Tensor

    def measured(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


class Classification(nn.Module):
    """The objective of the teacher, with a linear layer on the mean of its encoder's patch tokens."""

    def __init__(self, student: UniFlow) -> None:
        super().__init__()
        self.student = student
        self.head = nn.Sequential(nn.LayerNorm(CONFIG.hidden_size), nn.Linear(CONFIG.hidden_size, 10))
        student.add_module("head", self.head)  # to be trained with it

    def forward(self, images: Tensor, labels: Tensor) -> CrossEntropy:
        """Images [B, 3, 8, 8] and their labels [B]."""
        last = self.student.hidden_states(images)[-1][:, 1:]
        return CrossEntropy(F.cross_entropy(self.head(last.mean(1)), labels))


class Score(NamedTuple):
    """Linear-probe accuracy in percent, PSNR of one-step reconstructions in dB."""

    accuracy: float
    psnr: float


@torch.inference_mode()
def score(model: UniFlow, seen: Digits, test: Digits) -> Score:
    """Both on the test digits; the probe is fitted on the training digits."""
    model.eval()
    known, asked = (
        Labelled(model.hidden_states(part.images)[-1][:, 1:].mean(1).numpy(), part.labels.numpy())
        for part in (seen, test)
    )
    pixels = denormalize(model(test.images, steps=1, seed=0)).clamp(0, 1)
    error = (pixels - test.pictures / 255).square().mean((1, 2, 3))
    return Score(linear_accuracy(known, asked), float((-10 * error.log10()).mean()))


def run(seed: int, steps: int, teacher_steps: int, out: Path) -> dict[str, Score]:
    """One teacher, and a tokenizer around it in each of the ways, written to `out`; all ways see the same batches."""
    seen, test = digits()
    torch.manual_seed(seed)
    teacher = UniFlow(CONFIG)
    train(Classification(teacher), RandomRows(seed, seen.images, seen.labels), teacher_steps)
    scores: dict[str, Score] = {}
    for way, (arguments, learns) in WAYS.items():
        torch.manual_seed(seed)
        encoder = PretrainedEncoder(copy.deepcopy(teacher.embeddings), copy.deepcopy(teacher.encoder), {})
        model = UniFlow(CONFIG, encoder)
        if not scores:
            scores["the teacher"] = Score(score(model, seen, test).accuracy, float("nan"))
            model.save_pretrained(out / "the teacher")  # its decoder knows nothing
        train(UniFlowObjective(model, **arguments), RandomRows(seed, seen.images), steps, learns)
        scores[way] = score(model, seen, test)
        model.save_pretrained(out / way)
        print(f"seed {seed}: {way}: accuracy {scores[way].accuracy:.1f} %, PSNR {scores[way].psnr:.2f} dB", flush=True)
    return scores


def table(runs: list[dict[str, Score]]) -> str:
    """Mean and standard deviation over the seeds, in Markdown."""
    lines = ["| | linear probe, % | PSNR, dB |", "|---|---|---|"]
    for way in runs[0]:
        columns = []
        for values in zip(*(scores[way] for scores in runs), strict=True):
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(runs) > 1 else ""
            columns.append("" if np.isnan(values[0]) else f"{np.mean(values):.2f}{spread}")
        lines.append(f"| {way} | {' | '.join(columns)} |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Score]], path: Path) -> None:
    """Accuracy against PSNR, a point for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for way in WAYS:
        accuracy, psnr = zip(*(scores[way] for scores in runs), strict=True)
        axes.scatter(psnr, accuracy, label=way)
    teachers = np.mean([scores["the teacher"].accuracy for scores in runs])
    axes.axhline(teachers, color="gray", linewidth=1, linestyle="--", label="the teacher, mean")
    axes.set(xlabel="PSNR of one-step reconstructions, dB", ylabel="linear-probe accuracy, %")
    axes.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run every seed, print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of each tokenizer")
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("out/win_win"), help="folder for what comes out")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("seen", "unseen"), digits(), strict=True):
        part.write(options.out / "digits" / name)
    runs: list[dict[str, Score]] = []
    for seed in range(options.seeds):
        runs.append(run(seed, options.steps, options.teacher_steps, options.out / f"seed-{seed}"))
        (options.out / "table.md").write_text(table(runs) + "\n", encoding="utf-8")
        plot(runs, options.out / "win_win.png")
    print(f"\n{table(runs)}\n\nplot, table, models and digits in {options.out}")


if __name__ == "__main__":
    main()
