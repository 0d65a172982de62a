"""The pure layers, put in place of another class's forward."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from tests.conftest import randomize
from tests.dropin.stand_ins import PROJECTS, Canonical
from tests.dropin.test_attentions import NaiveAttention
from uniflow_kernels import layers

LAYERS = [layers.SimpleMLPAdaLN, layers.Attention]


@pytest.mark.parametrize("layer", LAYERS)
def test_has_a_forward_and_nothing_else(layer):
    assert issubclass(layer, nn.Module)
    assert layer.__init__ is nn.Module.__init__
    own = {name for name in dir(layer) if name not in dir(nn.Module)}
    assert own == {"can_torch_compile", "has_backward"}


def test_numbers():
    head, inputs = randomize(Canonical()), PROJECTS["MAR"].inputs
    expected = head(*inputs)
    assert list(inspect.signature(layers.SimpleMLPAdaLN.forward).parameters) == ["self", "x", "t", "c"]
    for head.grad_checkpointing in (False, True):
        torch.testing.assert_close(layers.SimpleMLPAdaLN.forward(head, *inputs), expected, rtol=1e-4, atol=1e-5)
    attention, x = randomize(NaiveAttention(dropout=0.5)).eval(), torch.randn(2, 9, 32)
    torch.testing.assert_close(layers.Attention.forward(attention, x), attention(x), rtol=1e-4, atol=1e-5)
    attention.train()
    assert not torch.equal(layers.Attention.forward(attention, x), layers.Attention.forward(attention, x))
