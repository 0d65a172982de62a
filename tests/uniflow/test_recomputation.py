"""What layers keep for the backward pass fits a budget in bytes, and no number depends on it."""

from itertools import pairwise

import pytest
import torch

from tests.live_bytes import LiveBytes
from tests.uniflow.test_pretrained import DECODER, hugging_face
from uniflow import UniFlow
from uniflow.recomputation import KEEPS, count_kept, fit, memory_of
from uniflow_kernels import backend

# a state of the CPU's random numbers for each layer that is computed again
STATE = 5056 + 512


def bytes_of(*levels):
    return [list(levels)] * 4


def test_what_costs_least_is_recomputed_first_and_from_the_first_layer_on():
    counted = bytes_of(100, 60, 20, 10)

    def keeps(budget):
        return [KEEPS.index(kept) for kept in fit(counted, budget).keeps]

    assert keeps(400) == [0, 0, 0, 0]
    assert keeps(399) == keeps(360) == [1, 0, 0, 0]
    assert keeps(280) == [1, 1, 1, 0]  # the last one is whole, at one time, whatever it keeps
    assert keeps(279) == [2, 1, 1, 0]
    assert keeps(160) == [2, 2, 2, 0]
    assert keeps(130) == [3, 3, 3, 0]
    assert fit(counted, 140)._asdict() == {
        "keeps": ("nothing", "nothing", "attention", "everything"),
        "held": 140,
        "whole": 400,
        "least": 130,
    }
    assert str(fit(counted, 279)) == (
        "1 layers keep everything, 2 layers keep products and attention, 1 layers keep attention: "
        "240 bytes at a time in place of 400 bytes"
    )
    with pytest.raises(ValueError, match=r"memory: expected at least 130 bytes .* got 129 bytes; without .* 400 bytes"):
        fit(counted, 129)
    # where keeping some is no less than keeping all
    assert fit([[5, 9, 2, 1], [5, 9, 2, 1]], 7).keeps == ("attention", "everything")


def test_a_smaller_budget_never_holds_more():
    counted = [*bytes_of(97, 61, 13, 7), *bytes_of(41, 43, 11, 5), [0, 0, 0, 0], *bytes_of(97, 61, 13, 7)]
    _, _, whole, least = fit(counted, 10**9)
    held = [fit(counted, budget).held for budget in range(least, whole + 1)]
    assert all(less <= more for less, more in pairwise(held))
    assert all(now <= budget for budget, now in enumerate(held, least))
    assert (held[0], held[-1]) == (least, whole)
    assert len(set(held)) > 20


@pytest.mark.parametrize(
    ("said", "read"), [("12GB", 12 * 10**9), ("1.5 mb", 1500000), ("2e3", 2000), ("50%", 0.5), ("100 %", 1.0)]
)
def test_memory_is_read(said, read):
    assert memory_of(said) == read
    assert type(memory_of(said)) is type(read)


@pytest.mark.parametrize("said", ["", "GB", "0", "0%", "101%", "1.2.3GB", "encoders", "-1GB", "5 GB of it", "1e999"])
def test_what_is_no_memory_is_refused(said):
    with pytest.raises(ValueError, match="expected a number of bytes as in 2GB or 500MB, or a share as in 50%, got"):
        memory_of(said)


def step(model, images, name="eager"):
    """Condition and gradients; what was held between forward and backward, and the peak."""
    model.encode(images)  # where it is planned, once
    torch.manual_seed(3)
    model.zero_grad()
    with LiveBytes() as live, backend(name):
        condition = model.condition(model.encode(images))
        held = live.now
        condition.square().sum().backward()
    return [condition.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)], held, live.peak


FORMS = [
    {},
    {"norm_type": "rms_norm", "qk_normalization": True, "hidden_act": "silu", "drop_path_rate": 0.3},
]


@pytest.mark.parametrize("changes", FORMS)
def test_memory_is_what_was_counted_and_numbers_are_the_same(tiny, changes):
    model, images = tiny(image_size=32, num_hidden_layers=3, **changes).train(), torch.randn(3, 3, 32, 32)
    draws = "drop_path_rate" in changes
    numbers, held, peak = step(model, images)
    layers = model.layers()
    shapes = [(3, 65, 64)] * 3 + [(3, 64, 64)]
    counted = [
        count_kept([layer], shape, (), torch.float32, torch.device("cpu"))[0]
        for layer, shape in zip(layers, shapes, strict=True)
    ]
    peaks, seen = [peak], set()
    for share in (0.6,) if draws else (0.8, 0.45, 0.36):
        model.gradient_checkpointing_enable(flow_head=False, memory=f"{share:.0%}")
        again, less, peak = step(model, images)
        planned = model.recomputation(images.shape)
        assert all(torch.equal(a, b) for a, b in zip(numbers, again, strict=True))
        assert [layer.keeps for layer in layers] == list(planned.keeps)
        assert planned.held <= share * planned.whole
        assert planned.whole == sum(each[0] for each in counted)
        spared = sum(each[0] - each[KEEPS.index(kept)] for each, kept in zip(counted, planned.keeps, strict=True))
        if not draws:  # of samples that are left out nothing is kept
            assert 0 <= less - (held - spared) <= len(layers) * STATE
        peaks.append(peak)
        seen |= set(planned.keeps)
    assert seen == set(KEEPS) or draws
    assert all(less < more for more, less in pairwise(peaks))
    model.gradient_checkpointing_enable(False)
    assert {layer.keeps for layer in layers} == {"everything"}


def test_layers_with_kernels_are_recomputed_too(tiny):
    pytest.importorskip("triton")
    model, images = tiny(num_hidden_layers=1).train(), torch.randn(1, 3, 16, 16)
    numbers, *_ = step(model, images, "triton")
    for layer in model.layers():
        layer.keeps = "products"
    again, *_ = step(model, images, "triton")
    assert all(torch.equal(a, b) for a, b in zip(numbers, again, strict=True))


@pytest.mark.filterwarnings("ignore:flow_width. a flow head of width 32:UserWarning")
def test_layers_of_the_transformers_package():
    model, images = UniFlow.from_encoder(hugging_face("DINOv3ViT"), **DECODER).train(), torch.randn(2, 3, 16, 16)
    numbers, held, _ = step(model, images)
    model.gradient_checkpointing_enable(memory="75%")
    again, less, _ = step(model, images)
    planned = model.recomputation(images.shape)
    assert all(torch.equal(a, b) for a, b in zip(numbers, again, strict=True))
    assert planned.keeps[0] == "products"
    assert less < held - 0.9 * (planned.whole - planned.held) + 3 * STATE


def saved_bytes(layer, x):
    """What autograd saves beside the parameters, and the gradients."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.untyped_storage(): t}) or t, lambda t: t):
        out = layer(x)
    sizes = {storage.data_ptr(): storage.nbytes() for storage in saved if storage.data_ptr() not in own}
    return sum(sizes.values()), torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])


def test_compiled_layers_keep_no_more_than_was_counted(tiny):
    """As the compiler divides a layer in forward and backward, on a CPU without what it would make of the two."""
    layer = tiny().train().encoder.layers[0]
    x = torch.randn(2, 17, 64, requires_grad=True)
    (counted,) = count_kept([layer], (2, 17, 64), (), torch.float32, torch.device("cpu"))
    _, expected = saved_bytes(layer, x)
    layer.compile(backend="aot_eager", fullgraph=True)
    for layer.keeps, most in zip(KEEPS[1:3], counted[1:3], strict=True):
        kept, gradients = saved_bytes(layer, x)
        assert kept <= most + STATE
        assert all(torch.equal(a, b) for a, b in zip(expected, gradients, strict=True))
    torch._dynamo.reset()


def test_autocast_and_what_is_frozen_count(tiny):
    model = tiny(num_hidden_layers=3, global_blocks_depth=2)
    model.gradient_checkpointing_enable(memory="60%")
    shape = (4, 3, 16, 16)
    whole = model.recomputation(shape)
    with torch.autocast("cpu", torch.bfloat16):
        lower = model.recomputation(shape)
    assert 0.5 * whole.whole < lower.whole < 0.7 * whole.whole
    assert whole.keeps[0] != "everything"
    model.embeddings.requires_grad_(False)
    model.encoder.requires_grad_(False)
    frozen = model.recomputation(shape)
    assert frozen.whole == pytest.approx(whole.whole * 2 / 5, rel=0.1)
    assert frozen.keeps[:3] == ("everything",) * 3
    # asked anew where that changes
    model.gradient_checkpointing_enable(memory=whole.whole // 2)
    for trained, keeps in ((False, "everything"), (True, whole.keeps[0])):
        model.embeddings.requires_grad_(trained)
        model.encoder.requires_grad_(trained)
        model.encode(torch.randn(shape))
        assert model.encoder.layers[0].keeps == keeps


def test_memory_that_is_not_enough_is_refused_with_what_is(tiny):
    model, images = tiny().train(), torch.randn(2, 3, 16, 16)
    least = model.recomputation(images.shape).least
    model.gradient_checkpointing_enable(memory=1000)
    with pytest.raises(ValueError, match=r"memory: expected at least .* KB .* got 1 KB; without .* they hold"):
        model.encode(images)
    model.gradient_checkpointing_enable(memory=least)
    model.encode(images).sum().backward()
    assert model.recomputation(images.shape).held == least
    with torch.no_grad():
        model.encode(torch.cat([images, images]))  # which keeps nothing
    with pytest.raises(ValueError, match="memory: expected more than 0 bytes, got -1"):
        model.gradient_checkpointing_enable(memory=-1)
