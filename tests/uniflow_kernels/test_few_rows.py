"""The flow head's few rows on the CPU part: against the definition in float64, and where plain PyTorch serves."""

import copy
import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import randomize
from uniflow_kernels import FlowHead, backend, cpu_kernels
from uniflow_kernels.ops.flow_choice import FEW, call_of, choose_path, few_rows

pytestmark = pytest.mark.skipif(cpu_kernels.why_not_built() is not None, reason=str(cpu_kernels.why_not_built()))

HEADS = {
    "MAR": {"width": 64, "depth": 3},
    "pocket-tts": {"width": 256, "depth": 2, "times": 2},
    "VibeVoice": {"width": 128, "depth": 2, "norm": "rms", "eps": 1e-5, "mlp": "swiglu", "hidden": 200, "bias": False},
    "SphereAR": {
        **{"width": 77, "depth": 4, "mlp": "swiglu", "hidden": 93},
        **{"modulation_order": "scale-shift-gate", "modulation_groups": 2},
    },
    "narrow": {"width": 3, "depth": 1, "hidden": 1, "final_modulation": False},
}


def levels():
    return [] if cpu_kernels.why_not_built() else cpu_kernels._module().levels()


@pytest.fixture(params=levels(), ids=lambda level: level.name)
def level(request, monkeypatch):
    """Each level of instructions that this processor has."""
    monkeypatch.setattr(cpu_kernels, "_level", lambda: request.param)


def make_head(width=256, depth=2, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return randomize(FlowHead(10, width, 10, 20, depth, **options)).to(dtype).requires_grad_(False)


def inputs(head, rows, conditions=None):
    """x, t and c."""
    generator, dtype = torch.Generator().manual_seed(rows), head.input_proj.weight.dtype
    t = torch.rand((2,) if head.times == 2 else (), generator=generator)
    x, c = torch.randn(rows, 10, generator=generator), torch.randn(conditions or rows, 20, generator=generator)
    return x.to(dtype), t, c.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
def test_is_within_twice_the_error_of_the_plain_form(level, options, dtype, within_twice):
    head = make_head(dtype=dtype, **options)
    exact = copy.deepcopy(head).double()
    for rows in {1, 2, 3, 4, 7, few_rows(dtype, head.model_channels)}:
        if rows > few_rows(dtype, head.model_channels):
            continue
        for conditions in {rows, 1}:
            x, t, c = inputs(head, rows, conditions)
            with backend("cpu"):
                ours = head(x, t, c)
            with backend("eager"):
                plain = head(x, t, c)
            within_twice(ours, plain, exact(x.double(), t, c.double()), floor=2e-6)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
def test_samples_are_those_of_the_plain_form(options, cfg, within_twice):
    """With modulations that were made before; a step that is not guided has half as many rows."""
    head = make_head(**options)
    exact, (x, _, c) = copy.deepcopy(head).double(), inputs(head, 3)
    how = {"cfg": cfg, "cfg_interval": (0.0, 0.6), "time_scale": 1.0}
    made = []
    for name in ("cpu", "eager"):
        with torch.no_grad(), backend(name):
            made.append(head.sample(c, 4, noise=x, **how))
    with torch.no_grad():
        within_twice(*made, exact.sample(c.double(), 4, noise=x.double(), **how), floor=5e-6)


def test_autocast_takes_weights_and_norms_of_two_dtypes(within_twice):
    head = make_head()
    exact, (x, _, c) = copy.deepcopy(head).double(), inputs(head, 3)
    made = []
    for name in ("cpu", "eager"):
        with torch.no_grad(), backend(name), torch.autocast("cpu", torch.bfloat16):
            made.append(head.sample(c, 3, noise=x))
    with torch.no_grad():
        within_twice(*made, exact.sample(c.double(), 3, noise=x.double()))


def test_the_bits_depend_neither_on_threads_nor_on_the_run(level):
    """From the embedding on: PyTorch's products before it do depend on threads on some processors."""
    head, before = make_head(width=512), torch.get_num_threads()
    x, t, c = inputs(head, 2)
    embedding = head.time_embed(t) + head.cond_embed(c)
    made = []
    try:
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            with backend("cpu"):
                made.append(head.from_embedding(x, embedding))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(made[0], other) for other in made[1:])


def test_every_change_of_the_weights_is_seen():
    """Nothing is kept: in place, behind PyTorch's back, by loading, by other memory, and in copies."""
    head = make_head()
    x, t, c = inputs(head, 2)
    weight = head.res_blocks[1].mlp[0].weight

    def changed():
        with torch.no_grad(), backend("cpu"):
            ours = head(x, t, c)
        with torch.no_grad(), backend("eager"):
            assert torch.allclose(ours, head(x, t, c), atol=1e-5)
        return ours

    seen, state = [changed()], {name: value + 0.1 for name, value in head.state_dict().items()}
    weight.data.mul_(2)
    seen.append(changed())
    head.load_state_dict(state)
    seen.append(changed())
    weight.data = torch.randn_like(weight)
    seen.append(changed())
    weight.requires_grad_().grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    seen.append(changed())
    assert all(not torch.allclose(a, b) for i, a in enumerate(seen) for b in seen[:i])
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        with torch.no_grad():
            assert torch.equal(other(x, t, c), seen[-1])


def path(x, head):
    return choose_path(call_of(x, x, *head.tensors()))


def test_where_plain_pytorch_serves(monkeypatch):
    head = make_head()
    x = torch.randn(16, 256)
    assert path(x, head) == FEW
    assert path(torch.randn(17, 256), head) == "eager"
    assert path(x.double(), head) == path(x.half(), head) == path(x.bfloat16(), head) == "eager"
    assert path(x[:4].bfloat16(), copy.deepcopy(head).bfloat16()) == FEW
    assert path(x.clone().requires_grad_(), head) == "eager"
    assert torch.func.vmap(lambda x: x * (path(x, head) == "eager"))(x[None]).any()
    with torch.autograd.forward_ad.dual_level():
        assert path(x, head) == "eager"
    with FlopCounterMode(display=False):
        assert path(x, head) == "eager"
    gaps = copy.deepcopy(head)
    gaps.res_blocks[0].mlp[0].weight.data = torch.randn(256, 512)[:, ::2]
    assert path(x, gaps) == "eager"
    with backend("cpu"):
        for rows, given, why in (
            (17, head, "up to 16 rows, not 17"),
            (2, gaps, "gaps"),
            (2, make_head().double(), "float64"),
        ):
            with pytest.raises(ValueError, match=f"flow_head: backend 'cpu' cannot serve this input: .*{why}"):
                given(*inputs(given, rows))
    monkeypatch.setattr(cpu_kernels, "_is_built", lambda: False)
    assert path(x, head) == "eager"


def test_a_compiled_head_is_plain():
    head = make_head(width=32)
    x, t, c = inputs(head, 2)
    with backend("eager"):
        plain = head(x, t, c)
    assert torch.allclose(torch.compile(head, backend="eager", fullgraph=True)(x, t, c), plain, atol=1e-6)
    torch._dynamo.reset()  # other tests count how often a forward is compiled
