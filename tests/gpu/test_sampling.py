"""FlowHead.sample as one CUDA graph: the same numbers, new weights, shapes, streams, threads, memory."""

import gc
import threading
import weakref

import pytest
import torch

from tests.conftest import randomize
from tests.uniflow_kernels.test_sampling import step_by_step
from uniflow.diffusion import Diffusion, sample
from uniflow_kernels import FlowHead, backend, to_images
from uniflow_kernels.modules import sampling
from uniflow_kernels.solvers import SOLVERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def without_gradients(exact_float32):
    with torch.no_grad():
        yield


def make(rows=4, width=256, depth=3, dtype=torch.bfloat16, **options):
    head = randomize(FlowHead(16, width, 16, width, depth, **options)).to("cuda", dtype)
    noise = torch.randn(rows, 16, device="cuda").to(dtype).float()
    return head, noise, torch.randn(rows, width, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_replays_are_equal_to_the_first_call_and_as_good_as_step_by_step(within_twice, dtype, solver, cfg):
    head, noise, condition = make(dtype=dtype)
    how = {"solver": solver, "cfg": cfg}
    first, *others = (head.sample(condition, 20, noise=noise, **how) for _ in range(4))
    assert len(sampling._GRAPHS[head]) == 1
    assert all(torch.equal(first, other) for other in others)
    plain = step_by_step(head, noise, condition, 20, **how)
    exact = step_by_step(head.double(), noise.double(), condition.double(), 20, **how)
    within_twice(others[-1], plain, exact, floor=1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mlp": "swiglu", "modulation_order": "scale-shift-gate", "modulation_groups": 1},
        {"final_modulation": False},
    ],
)
@pytest.mark.parametrize("null_rows", [1, 4])
def test_modulations_of_several_steps_at_once(within_twice, monkeypatch, options, null_rows):
    head, noise, condition = make(dtype=torch.float32, **options)
    monkeypatch.setattr(sampling, "ROWS_AHEAD", 24)  # three steps
    null = torch.randn(null_rows, 256, device="cuda")
    with backend("triton"):
        ours = head.sample(condition, 10, noise=noise, cfg=2.0, null_condition=null)
    with backend("eager"):
        plain = step_by_step(head, noise, condition, 10, cfg=2.0, null=null)
    exact = step_by_step(head.double(), noise.double(), condition.double(), 10, cfg=2.0, null=null.double())
    within_twice(ours, plain, exact, floor=1e-5)


def test_new_inputs_and_new_weights_are_seen():
    head, noise, condition = make()
    for _ in range(3):
        head.sample(condition, 10, noise=noise)
    for step in range(3):
        head.final_layer.linear.weight.mul_(1.1)
        with torch.inference_mode():
            replayed = head.sample(condition * step, 10, noise=noise + step)
        plain = sampling.follow(head, noise + step, condition * step, sampling.Plan(10)).taken()
        assert torch.equal(replayed, plain.bfloat16())
    head.float().bfloat16()  # the weights move
    after = head.sample(condition, 10, noise=noise)
    assert torch.equal(after, sampling.follow(head, noise, condition, sampling.Plan(10)).taken().bfloat16())


def test_autocast_is_another_kind_of_input():
    head, noise, condition = make(dtype=torch.float32)
    plain = [head.sample(condition, 10, noise=noise) for _ in range(3)]
    with torch.autocast("cuda", torch.bfloat16):
        half = [head.sample(condition, 10, noise=noise) for _ in range(3)]
    assert all(torch.equal(half[0], other) for other in half)
    assert not torch.equal(plain[0], half[0])
    assert len(sampling._GRAPHS[head]) == 2


def test_streams_and_threads():
    head, _, _ = make()
    conditions = [torch.randn(4, 256, device="cuda").bfloat16() for _ in range(4)]
    noise = torch.randn(4, 16, device="cuda")
    expected = [sampling.follow(head, noise, c, sampling.Plan(10)).taken().bfloat16() for c in conditions]
    torch.cuda.synchronize()
    wrong = []

    def work(index):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            results = [head.sample(conditions[index], 10, noise=noise) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        wrong.extend(index for result in results if not torch.equal(result, expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_changing_shapes_fall_back_and_say_so():
    head, _, _ = make()

    def take_turns():
        for i in range(40):
            head.sample(torch.randn(1 + i % 10, 256, device="cuda").bfloat16(), 5)

    with pytest.warns(UserWarning, match="FlowHead.sample: more than 8 kinds of input take turns"):
        take_turns()
    assert len(sampling._GRAPHS[head]) == 0


def test_graphs_go_with_their_head_and_share_memory():
    head, _, _ = make(width=512)
    for rows in (64, 32, 16, 8):
        for _ in range(2):
            head.sample(torch.randn(rows, 512, device="cuda").bfloat16(), 10)
    assert len(sampling._GRAPHS[head]) == 4
    seen = weakref.ref(head)
    del head
    gc.collect()
    assert seen() is None


def test_inside_another_capture_and_without_waiting():
    head, noise, condition = make()
    for _ in range(3):
        expected = head.sample(condition, 10, noise=noise)
    torch.cuda.set_sync_debug_mode("error")
    try:
        head.sample(condition, 10, noise=noise)
        for cfg in (1.0, 2.0):
            sampling.follow(head, noise, condition, sampling.Plan(10, cfg=cfg))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = head.sample(condition, 10, noise=noise)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [(448, 448), (14, 1400), (70, 28)])
def test_images_are_those_of_plain_pytorch(dtype, size):
    tokens = size[0] * size[1] // 196
    rows, velocity = torch.randn(2, 3, tokens, 588, device="cuda").unbind(0)
    how = {"velocity": velocity.bfloat16(), "dt": 0.25, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    with backend("eager"):
        plain = to_images(rows, 14, size, clamp=True, dtype=dtype, **how)
    with backend("triton"):
        ours, again = (to_images(rows, 14, size, clamp=True, dtype=dtype, **how) for _ in range(2))
    assert torch.equal(ours, again)
    error = (ours.double() - plain.double()).abs().max().item()
    assert error <= {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.uint8: 1}[dtype]
    if dtype != torch.float32:  # a multiplication joined with an addition may round otherwise, and seldom matters
        assert (ours != plain).double().mean() < 0.01


@pytest.mark.parametrize(("method", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5)])
def test_diffusion_samplers_replay(method, eta):
    _, _, condition = make()
    learned = randomize(FlowHead(16, 256, 32, 256, 3)).to("cuda", torch.bfloat16)
    how = {"method": method, "eta": eta, "cfg": 2.0, "null_condition": condition[:1]}
    for _ in range(2):
        seeded = [torch.Generator("cuda").manual_seed(5) for _ in range(3)]
        first, *others = (sample(learned, condition, Diffusion(10), generator=g, **how) for g in seeded)
        assert all(torch.equal(first, other) for other in others)
    assert len(sampling._GRAPHS[learned]) == 1
