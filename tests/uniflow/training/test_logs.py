import json

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.uniflow.training.conftest import WIDTH, Heard, small_objective
from uniflow.training import Stage, logs
from uniflow.training.logs import JsonLines, SamplePictures, TensorBoard, Validation, count_flops
from uniflow.training.optimization import freeze


def test_every_log_gets_every_number(make, tmp_path):
    heard = Heard()
    written = [JsonLines(tmp_path / "log.jsonl", 0), TensorBoard(tmp_path / "board", 0), SamplePictures(tmp_path / "s")]
    make(steps=2, logs=[heard, *written]).run()
    for log in written:
        scores = {"psnr": 20.0, "ssim": None}
        log.validation(Validation(2, scores, torch.zeros(3, 8, 12, dtype=torch.uint8)))
        log.validation(Validation(3, {"accuracy": 0.5}))
        log.skipped(2, ["bad\udcff.png"])  # whose name is no UTF-8
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines[:2]] == [report.loss for report in heard.reports]
    own = list(lines[0])
    assert own[own.index("loss") + 1 : own.index("gradient_norm")] == ["flow", "distill", "alpha", "weights"]
    assert lines[0]["weights"] == pytest.approx([1.0])
    assert lines[2:] == [
        {"step": 2, "psnr": 20.0, "ssim": None},
        {"step": 3, "accuracy": 0.5},
        {"step": 2, "skipped_pictures": ["bad\udcff.png"]},
    ]
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    losses = board.Scalars("train/loss")
    assert [event.value for event in losses] == pytest.approx([report.loss for report in heard.reports])
    assert len(board.Scalars("alpha/1")) == len(board.Scalars("weights/1")) == 2
    assert board.Scalars("validation/psnr")[0].value == 20
    assert board.Scalars("validation/accuracy")[0].value == 0.5
    assert board.Tensors("skipped/text_summary")[0].tensor_proto.string_val == [rb"bad\udcff.png"]
    assert Image.open(tmp_path / "s" / "step-00000002.png").size == (12, 8)


def test_flops_of_a_step():
    """By hand: two for each multiply-add of a product, and of the products with its gradients."""
    objective = small_objective(distill_weight=0.0)
    tokens, width, row, latent = 16, WIDTH, 48, 16

    def layer(length, hidden):
        return length * width * (4 * width + 2 * hidden) + 2 * length**2 * width

    encoder = layer(1 + tokens, width)
    around = tokens * (2 * width * width + 2 * width * latent)
    block = tokens * width * (3 + 2) * width
    final = tokens * width * (2 * width + row)
    embeddings = tokens * 2 * width * width
    of_inputs = tokens * (row + row + 256) * width  # patches, noisy rows and times, which need no gradient themselves
    inner = encoder + layer(tokens, 4 * width) + around + block + final + embeddings
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert count_flops(objective, (images,)) == 2 * (6 * inner + 4 * of_inputs)
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_mfu_is_the_share_of_the_peak(make, monkeypatch):
    from uniflow.training import trainer as module

    monkeypatch.setattr(module, "peak_flops", lambda device: 1e12)
    heard = Heard()
    trainer = make(Stage(1, train="decoder"), Stage(1), precision="bfloat16", logs=[heard])
    trainer.run()
    image = torch.zeros(1, 3, 16, 16)
    of_all = count_flops(trainer.objective, (image,))
    freeze(trainer.student, Stage(1, train="decoder"))
    of_decoder = count_flops(trainer.objective, (image,))
    assert of_decoder < of_all
    for report, flops in zip(heard.reports, (of_decoder, of_all), strict=True):
        assert report.mfu == pytest.approx(report.images_per_second * flops / 1e12)


def test_the_peak_is_that_of_the_gpu(monkeypatch):
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Other", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert logs.peak_flops(torch.device("cuda")) == peak
    assert logs.peak_flops(torch.device("cpu")) is None
