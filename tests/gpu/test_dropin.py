"""Other projects' heads on a GPU, patched: numbers and gradients of the kernels against float64."""

import copy

import pytest
import torch

from tests.conftest import randomize
from tests.dropin.stand_ins import PROJECTS
from tests.dropin.test_blocks import BLOCKS
from tests.dropin.test_blocks import INPUTS as OF_BLOCKS
from tests.dropin.test_heads import DISTINCT, compare, outputs_and_gradients
from uniflow_kernels import patch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def on_gpu(value):
    return value.cuda() if torch.is_tensor(value) else value


@pytest.mark.parametrize("name", DISTINCT)
def test_numbers_and_gradients(name, within_twice):
    project = PROJECTS[name]
    head = randomize(project.make()).cuda()
    inputs, kwargs = [on_gpu(v) for v in project.inputs], {k: on_gpu(v) for k, v in project.kwargs.items()}
    exact = outputs_and_gradients(copy.deepcopy(head).double(), inputs, kwargs, torch.float64)
    before = outputs_and_gradients(head, inputs, kwargs, torch.float32)
    patch(head, strict=True)
    after = outputs_and_gradients(head, inputs, kwargs, torch.float32)
    compare(after, before, exact, within_twice, floor=2e-6)


@pytest.mark.parametrize("name", BLOCKS)
def test_numbers_and_gradients_of_transformer_blocks(name, within_twice):
    make, kwargs = BLOCKS[name]
    block, inputs = randomize(make()).cuda(), [on_gpu(value) for value in OF_BLOCKS]
    kwargs = {key: on_gpu(value) for key, value in kwargs.items()}
    exact = outputs_and_gradients(copy.deepcopy(block).double(), inputs, kwargs, torch.float64)
    before = outputs_and_gradients(block, inputs, kwargs, torch.float32)
    patch(block, strict=True)
    after = outputs_and_gradients(block, inputs, kwargs, torch.float32)
    compare(after, before, exact, within_twice, floor=2e-6)
