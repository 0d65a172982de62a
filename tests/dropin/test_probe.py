"""Looking at a module: it is only read, and nothing is set that other threads see."""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tests.conftest import randomize
from tests.dropin.stand_ins import PROJECTS, Canonical, FlowBlock, close, inside, with_blocks
from tests.dropin.test_attentions import NaiveAttention
from uniflow_kernels import patch, unpatch
from uniflow_kernels.dropin import probe

INPUTS = PROJECTS["MAR"].inputs


@pytest.fixture
def head():
    return randomize(Canonical())


def state_of_the_process():
    """What other threads would see change."""
    return (
        torch.get_float32_matmul_precision(),
        torch.get_rng_state().sum().item(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        list(warnings.filters),
        nn.modules.module._has_any_global_hook(),
        is_in_torch_dispatch_mode(),
    )


def seen_by_another_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(state_of_the_process).result()


@pytest.mark.parametrize("make", [Canonical, lambda: inside("layer", NaiveAttention())], ids=["head", "attention"])
def test_patching_only_reads_the_model_and_sets_nothing(make):
    model, before, seen = randomize(make()), seen_by_another_thread(), []
    state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}

    class Watches(nn.Linear):
        def forward(self, x):
            assert seen_by_another_thread() == before
            assert all(part.training for part in model.modules())
            for name, tensor in model.state_dict(keep_vars=True).items():
                assert tensor is state[name][0]
                assert torch.equal(tensor, state[name][1])
            seen.append(self)
            return super().forward(x)

    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and "res_blocks" not in name:
            part.__class__ = Watches
    patch(model, strict=True)
    assert seen
    assert set(seen).isdisjoint(model.modules())


def test_threads():
    """Two that patch one model; one that patches and unpatches while another runs the head."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            for seed in range(5):
                head, start, done = randomize(Canonical(depth=4), seed), threading.Barrier(2), threading.Event()
                state, expected = {name: value.clone() for name, value in head.state_dict().items()}, head(*INPUTS)

                def patches(head=head, start=start):
                    start.wait()
                    return patch(head)

                def runs(head=head, start=start, done=done):
                    start.wait()
                    found = [head(*INPUTS)]
                    while not done.is_set():
                        found.append(head(*INPUTS))
                    return found

                one, two = (pool.submit(patches) for _ in range(2))
                assert list(one.result().patched) == list(two.result().patched) == [""]
                running = pool.submit(runs)
                start.wait()
                for _ in range(2):
                    unpatch(head)
                    patch(head)
                done.set()
                for found in running.result():
                    close(found, expected)
                for name, value in head.state_dict(keep_vars=True).items():
                    assert isinstance(value, nn.Parameter)
                    assert torch.equal(value, state[name])
    finally:
        sys.setswitchinterval(interval)


def test_what_a_forward_changes_is_not_changed_by_looking_at_it():
    class Remembers(Canonical):
        def __init__(self):
            super().__init__()
            self.calls, self.log, self.latest = 0, [], {"x": []}
            self.last = torch.zeros(())
            self.register_buffer("total", torch.zeros(()))
            self.model = [self, nn.Linear(2, 2)]
            self.embed, self.project = self.both, functools.partial(self.input_proj)

        def both(self, t, c):
            return self.time_embed(t) + self.cond_embed(c)

        def forward(self, x, t, c):
            assert self.model[0].log is self.log
            assert self.latest["x"] is not self.log
            self.calls += 1
            self.log.append(x)
            self.latest["x"].append(x)
            self.last.add_(1)
            self.total += 1
            y, x = self.embed(t, c), self.project(x)
            for block in self.res_blocks:
                x = block(x, y)
            return self.final_layer(x, y)

    head = randomize(Remembers())
    patch(head, strict=True)
    assert (head.calls, head.log, head.latest, head.last.item(), head.total.item()) == (0, [], {"x": []}, 0, 0)


def test_a_forward_that_draws_random_numbers_is_left_alone():
    class Draws(FlowBlock):
        def forward(self, x, y):
            torch.rand(1)
            return super().forward(x, y)

    head, seed = with_blocks(Draws)(), torch.get_rng_state()
    assert "it draws random numbers" in patch(head).left_alone[""]
    assert torch.equal(torch.get_rng_state(), seed)


def test_a_probe_holds_one_block_of_memory():
    head = Canonical(depth=5)
    with probe.Probe(head) as probed:
        matrices = [p for p in probed.module.parameters() if p.ndim > 1]
        assert len(matrices) == len([p for p in head.parameters() if p.ndim > 1])
        assert len({p.untyped_storage().data_ptr() for p in matrices}) == 1
        assert matrices[0].untyped_storage().nbytes() < 2 * 4 * max(map(torch.numel, matrices))


def test_where_products_are_rounded(head):
    """As by TF32: a switch that all threads share, and that is therefore left where it is."""

    class Rounds(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (F.linear, torch.Tensor.matmul) and out.dtype == torch.float32:
                self.calls += 1
                out *= 1 + 1e-3 * (-1) ** self.calls
            return out

    with Rounds():
        patch(head, strict=True)
