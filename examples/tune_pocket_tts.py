"""Tune the head of transformers' Pocket TTS to draw in one step, by the loss alone, on points of a ring.

    python -m examples.tune_pocket_tts [STEPS]      # needs uniflow-kernels[hf]

The head has two times already. It is `patch`ed, so that it runs on the fused operations and its derivatives are right,
trained by flow matching (both times equal), then as long by self-distillation. Prints the energy distance
between drawn points and the data (0 for equal distributions) by the number of steps. The head of MAR is the other kind
that is found often: its `net` has the parameter names of `FlowHead`, which takes them by `load_state_dict`, and two
times by `for_intervals()`; examples/few_steps.py goes on from there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.pocket_tts.configuration_pocket_tts import PocketTTSFlowHeadConfig
from transformers.models.pocket_tts.modeling_pocket_tts import PocketTTSFlowHead

from examples.few_steps import energy_distance, trained
from uniflow.flow import sample_intervals
from uniflow_kernels import patch, self_distillation_loss


class Intervals(nn.Module):
    """A Pocket TTS head as the objectives call one: x [M, C], begin and end of the step t [M, 2], condition [M, Z]."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The mean velocity between the two times."""
        return self.head(x, condition, times=[t[:, :1], t[:, 1:]])

    def draw(self, condition: Tensor, noise: Tensor, steps: int) -> Tensor:
        """From noise to data, each step as long as the others."""
        x = noise
        for step in range(steps):
            t = torch.tensor([step / steps, (step + 1) / steps]).expand(len(x), 2)
            x = x + self(x, t, condition) / steps
        return x


def loss_with(share_equal: float) -> Callable[[Intervals, Tensor, Tensor, Tensor], Tensor]:
    """Self-distillation in which so many rows are flow matching."""

    def loss(head: Intervals, condition: Tensor, data: Tensor, noise: Tensor) -> Tensor:
        times = sample_intervals((len(data),), share_equal, "uniform")
        return self_distillation_loss(head, condition, data, times, noise, time_scale=1.0)

    return loss


def main(steps: int) -> None:
    """Train, tune and print."""
    torch.manual_seed(0)
    config = PocketTTSFlowHeadConfig(hidden_size=128, latent_dim=2, condition_dim=1, num_hidden_layers=3)
    head = PocketTTSFlowHead(config)
    patch(head, strict=True)
    model = Intervals(head)
    print(f"{'objective':20}{'seconds':>8}" + "".join(f"{count:>9}" for count in (20, 4, 2, 1)))
    for name, share_equal in (("flow matching", 1.0), ("self-distillation", 0.5)):
        begun = time.perf_counter()
        model = trained(model, loss_with(share_equal), steps)
        seconds = time.perf_counter() - begun
        distances = (energy_distance(model.draw, count) for count in (20, 4, 2, 1))
        print(f"{name:20}{seconds:8.0f}" + "".join(f"{distance:9.4f}" for distance in distances))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 600)
