"""What is derived from parameters is kept while they stay, made anew when they change, and gone when they are."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard

from uniflow_kernels import packing
from uniflow_kernels.packing import forget, packed


@pytest.fixture(autouse=True)
def nothing_kept():
    torch.manual_seed(0)
    forget()


@pytest.fixture
def layer():
    return nn.Linear(3, 4)


def double(weight, bias=None):
    return 2 * weight


def doubled(layer):
    return packed("double", (layer.weight, layer.bias), double)


def is_kept(layer):
    return doubled(layer) is doubled(layer)


def test_what_did_not_change_is_made_once(layer):
    assert is_kept(layer)
    assert torch.equal(doubled(layer), 2 * layer.weight)
    assert not doubled(layer).requires_grad
    other = packed(("rows", 2), (layer.weight, None), lambda weight, bias: weight[:2].clone())
    assert other.shape == (2, 3)
    assert is_kept(layer)


def step(optimizer, **options):
    def change(layer):
        optimizer(layer.parameters(), lr=0.1, **options).step()

    return change


def in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(3)


def in_place_in_inference_mode(layer):
    with torch.inference_mode():
        layer.weight.mul_(3)


def through_a_view(layer):
    layer.weight.detach()[1:].zero_()


def other_state(layer):
    return {name: tensor + 1 for name, tensor in layer.state_dict().items()}


def other_data(layer):
    layer.weight.data = layer.weight.data * 3


def there_and_back(layer):
    """The memory that half() gives free may be what float() is given."""
    layer.half().float()


def swapped(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(4, 3)))


def converted_by_swapping(layer):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES = {
    "SGD": step(torch.optim.SGD, foreach=False),
    "SGD foreach": step(torch.optim.SGD, foreach=True),
    "SGD fused": step(torch.optim.SGD, fused=True),
    "AdamW": step(torch.optim.AdamW, foreach=False),
    "AdamW foreach": step(torch.optim.AdamW, foreach=True),
    "AdamW fused": step(torch.optim.AdamW, fused=True),
    "load_state_dict": lambda layer: layer.load_state_dict(other_state(layer)),
    "load_state_dict(assign=True)": lambda layer: layer.load_state_dict(other_state(layer), assign=True),
    "in place": in_place,
    "in place in inference mode": in_place_in_inference_mode,
    "through a view": through_a_view,
    "data": other_data,
    "double()": lambda layer: layer.double(),
    "half().float()": there_and_back,
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "swap_tensors": swapped,
    "double() by swapping": converted_by_swapping,
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(torch.randn(16), layer.parameters()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen(layer, change):
    layer(torch.randn(5, 3)).square().sum().backward()
    before = doubled(layer)
    change(layer)
    after = doubled(layer)
    assert after.dtype == layer.weight.dtype
    assert torch.equal(after, 2 * layer.weight)
    assert after is not before
    assert is_kept(layer)


def test_a_change_of_any_source_is_seen(layer):
    def sum_of_both(weight, bias):
        return weight.sum() + bias.sum()

    before = packed("sum", (layer.weight, layer.bias), sum_of_both)
    with torch.no_grad():
        layer.bias.add_(1)
    assert torch.allclose(packed("sum", (layer.weight, layer.bias), sum_of_both), before + 4)


def test_memory_given_to_another_tensor_is_not_mistaken(layer):
    """Same object, version and address: only the storage's identity tells, and two storages on, it could be reused."""
    numbers = torch.randn(4, 3).numpy()
    version = layer.weight._version
    for _ in range(10):
        numbers += 1
        for _ in range(2):
            layer.weight.data = torch.from_numpy(numbers)
        assert (layer.weight.data_ptr(), layer.weight._version) == (numbers.ctypes.data, version)
        assert torch.equal(doubled(layer), 2 * layer.weight)


def test_another_view_of_the_same_memory_is_not_mistaken():
    layer = nn.Linear(4, 4)
    for other in (lambda weight: weight.t(), lambda weight: weight[:2], lambda weight: weight.view(torch.int32)):
        before = doubled(layer)
        layer.weight.requires_grad_(False).data = other(layer.weight.data)
        assert torch.equal(doubled(layer), 2 * layer.weight)
        assert doubled(layer) is not before


def test_what_pytorch_cannot_see_needs_to_be_said(layer):
    before = doubled(layer)
    layer.weight.data.mul_(3)
    assert doubled(layer) is before
    forget()
    assert torch.equal(doubled(layer), 2 * layer.weight)


def test_what_is_kept_goes_with_any_of_its_sources(layer):
    derived = weakref.ref(doubled(layer))
    layer.bias = None
    gc.collect()
    assert derived() is None
    derived = weakref.ref(doubled(layer))
    assert derived() is not None
    del layer.weight
    gc.collect()
    assert derived() is None
    assert not packing._kept


def test_many_modules_leave_nothing_behind():
    for _ in range(50):
        doubled(nn.Linear(3, 4))
    gc.collect()
    assert not packing._kept


def test_copies_pickles_and_state_dicts_know_nothing_of_it(layer):
    names, size = list(layer.state_dict()), len(pickle.dumps(layer))
    doubled(layer)
    assert list(layer.state_dict()) == names
    assert len(pickle.dumps(layer)) == size
    copied = copy.deepcopy(layer)
    in_place(copied)
    assert torch.equal(doubled(copied), 2 * copied.weight)
    assert torch.equal(doubled(layer), 2 * layer.weight)
    assert len(packing._kept) == 2


def test_inference_mode(layer):
    """Parameters are remembered across modes; inference tensors have no version to tell changes by."""
    with torch.inference_mode():
        inside = doubled(layer)
        fresh = nn.Linear(3, 4)
        assert not is_kept(fresh)
        assert torch.equal(doubled(fresh), 2 * fresh.weight)
    assert doubled(layer) is inside
    assert not inside.is_inference()  # so that autograd may save it


def test_fake_and_functional_tensors(layer):
    before = doubled(layer)
    with FakeTensorMode() as mode:
        fake = nn.Linear(3, 4)
        assert doubled(fake).fake_mode is mode
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert doubled(layer) is not before
    functional = torch.func.functionalize(lambda weight: packed("double", (weight,), double))
    assert torch.equal(functional(layer.weight.detach()), 2 * layer.weight)
    batched = torch.func.vmap(lambda weight: packed("double", (weight,), double))
    assert torch.equal(batched(layer.weight.detach()), 2 * layer.weight)
    assert len(packing._kept) == 1
    assert doubled(layer) is before


def test_only_parameters_are_remembered(layer):
    """Other tensors may be views that are made in every call, and count versions of their own."""

    class Quantized(torch.Tensor):
        pass

    for weight in (layer.weight.detach().as_subclass(Quantized), layer.weight.data, 2 * layer.weight):
        assert torch.equal(packed("double", (weight,), double), 2 * weight)
    assert not packing._kept


def test_compiled_code_derives_for_itself(layer):
    compiled = torch.compile(lambda: doubled(layer) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(), 2 * layer.weight + 1)
    layer.weight.data.mul_(3)
    assert torch.equal(compiled(), 2 * layer.weight + 1)
    assert not packing._kept


def test_compiled_steps_of_an_optimizer_are_seen(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=True)
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        layer(torch.randn(5, 3)).square().sum().backward()
        doubled(layer)
        compiled()
        assert torch.equal(doubled(layer), 2 * layer.weight)


def test_fsdp_gathers_without_a_trace(tmp_path, layer):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    seen = []
    try:
        fully_shard(layer)
        layer.register_forward_hook(lambda layer, inputs, output: seen.append((doubled(layer), 2 * layer.weight)))
        with torch.no_grad():
            for _ in range(2):
                layer(torch.randn(5, 3))
                layer.reshard()
                for parameter in layer.parameters():
                    parameter.add_(1)
    finally:
        torch.distributed.destroy_process_group()
    assert not packing._kept
    assert all(torch.equal(ours, expected) for ours, expected in seen)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_threads(layer):
    """Many threads deriving, forgetting and letting modules go: no error, no wrong number, nothing left."""
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        try:
            for round in range(200):
                mine = nn.Linear(3, 4)
                with torch.no_grad():
                    mine.weight.copy_(torch.randn(4, 3, generator=generator))
                wrong.extend(one for one in (mine, layer) if not torch.equal(doubled(one), 2 * one.weight))
                if round % 50 == seed:
                    forget()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    del threads
    gc.collect()
    assert len(packing._kept) <= 1
