"""`verify` and `python -m uniflow_kernels`: what they say, and that the model comes back as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.conftest import randomize
from tests.dropin.stand_ins import PROJECTS, Canonical, MingNet
from uniflow_kernels import patch, verify
from uniflow_kernels.__main__ import main
from uniflow_kernels.dropin import verification

INPUTS = PROJECTS["MAR"].inputs


@pytest.fixture(autouse=True)
def _briefly(monkeypatch):
    monkeypatch.setattr(verification, "SECONDS", 0.0)
    monkeypatch.setattr(verification, "TURNS", 1)


class Model(nn.Module):
    """A head behind something with a buffer and random numbers."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.head = randomize(Canonical())

    def forward(self, x, t, c):
        return {"velocity": self.head(self.drop(self.norm(x)), t, c), "count": 3}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant checkpointing, as in MAR
@pytest.mark.parametrize("exact", [True, False])
def test_equal(exact, capsys):
    model = Model()
    model.head.grad_checkpointing = True
    model.norm.eval()
    model.head.cond_embed.weight.grad = torch.ones_like(model.head.cond_embed.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    seed = torch.get_rng_state()
    report = verify(model, *INPUTS, exact=exact)
    assert report.ok
    assert [(c.mode, c.what) for c in report.comparisons] == [
        (mode, what) for mode in ("eval", "train") for what in ("output", "gradients")
    ]
    assert all(c.error <= c.allowed and c.before > 0 and c.after > 0 for c in report.comparisons)
    assert ("float64" in report.reference) == exact
    assert "head: flow head" in capsys.readouterr().out
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.head.cond_embed.weight.grad.eq(1).all()
    assert "forward" not in vars(model.head)
    assert torch.equal(torch.get_rng_state(), seed)


def test_a_patched_model_stays_patched():
    model = randomize(MingNet())
    patch(model)
    forward = model.forward
    assert verify(model, *PROJECTS["Ming-UniVision"].inputs).ok
    assert model.forward is forward


@pytest.mark.parametrize("exact", [True, False])
def test_a_difference_is_seen(exact, monkeypatch, capsys):
    def wrong(self, module, args, kwargs):
        return 1.001 * type(module).forward(module, *args, **kwargs)

    monkeypatch.setattr("uniflow_kernels.dropin.heads.Head.forward", wrong)
    report = verify(randomize(Canonical()), *INPUTS, exact=exact)
    assert not report.ok
    assert not any(comparison.equal for comparison in report.comparisons)
    assert "DIFFERS" in capsys.readouterr().out


def test_a_failure_of_the_patched_model_alone_is_reported(monkeypatch, capsys):
    def fails(self, module, args, kwargs):
        raise RuntimeError("mat1 and mat2")

    monkeypatch.setattr("uniflow_kernels.dropin.heads.Head.forward", fails)
    head = randomize(Canonical())
    report = verify(head, *INPUTS)
    assert not report.ok
    assert report.failure == "RuntimeError: mat1 and mat2"
    assert "FAILS where the model as it was ran: RuntimeError: mat1 and mat2" in capsys.readouterr().out
    assert "forward" not in vars(head)
    with pytest.raises(RuntimeError, match="same dtype"):  # its own failures are its own
        verify(head.bfloat16(), *INPUTS)


def test_nothing_to_patch_is_not_ok():
    report = verify(nn.Linear(6, 6), INPUTS[0])
    assert all(comparison.equal for comparison in report.comparisons)
    assert not report.ok
    with pytest.raises(ValueError, match="returns no floating tensor"):
        verify(nn.Identity(), torch.arange(3))


def factory():
    return randomize(Canonical()), INPUTS


def named_factory():
    x, t, c = INPUTS
    return randomize(Canonical()), (x,), {"t": t, "c": c}


def nothing():
    return nn.Linear(6, 6), (INPUTS[0],)


def bad():
    return 3


def test_command(capsys):
    here = __name__
    assert main(["verify", f"{here}:factory"]) == 0
    assert main(["verify", f"{here}:named_factory", "--no-exact"]) == 0
    assert main(["verify", f"{here}:nothing"]) == 1
    assert main(["doctor"]) == 0
    assert "flow_head" in capsys.readouterr().out
    for path, message in (
        ("nowhere", "expected pkg.module:function"),
        (f"{here}:absent", "has no absent"),
        (f"{here}:bad", "must return"),
        ("no.such.module:f", "No module named"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["verify", path])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
