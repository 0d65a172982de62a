"""The fused flow head on a GPU at real sizes: numbers, gradients, every row written, equal bits, graphs, no waiting."""

import copy

import pytest
import torch

from tests.conftest import randomize
from uniflow_kernels import FlowHead, backend, doctor, flow_matching_loss, fused_flow_blocks
from uniflow_kernels.ops.flow_blocks import flow_blocks
from uniflow_kernels.ops.flow_choice import KERNELS, SMALL
from uniflow_kernels.triton_kernels.products import ARCHITECTURES, architecture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("exact_float32"),
]

VARIANTS = {
    "canonical": {},
    "VibeVoice": {"norm": "rms", "eps": 1e-5, "mlp": "swiglu", "hidden": 768, "bias": False},
    "SphereAR": {"mlp": "swiglu", "hidden": 1536, "modulation_order": "scale-shift-gate", "modulation_groups": 2},
    "no final modulation": {"final_modulation": False},
}


@pytest.fixture(params=KERNELS)
def path(request):
    made = ARCHITECTURES.get(architecture(torch.device("cuda")))
    if request.param != "rows" and (made is None or (request.param in SMALL and made.small is None)):
        pytest.skip("there are no such tiles for this GPU")
    return request.param


def make(rows, width=1024, depth=2, dtype=torch.bfloat16, row=588, conditions=None, **options):
    head = randomize(FlowHead(row, width, row, width, depth, **options)).to("cuda", dtype)
    x = torch.randn(rows, row, device="cuda").to(dtype).requires_grad_()
    y = torch.randn(conditions or rows, width, device="cuda").to(dtype).requires_grad_()
    return head, x, y


def run(head, x, y, path):
    """`head.from_embedding`, its blocks on a path of the kernels, on the fastest of them, or plain."""
    how = {**head.form._asdict(), "recompute": head.recompute}
    with backend("eager" if path == "eager" else "triton"):
        x = fused_flow_blocks(head.input_proj(x), y, *head.tensors(), **how, path="auto" if path == "eager" else path)
    return head.final_layer.linear(x)


def results(head, x, y, path):
    out = run(head, x, y, path)
    generator = torch.Generator("cuda").manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)
    wanted = [x, y, *(p for key, p in head.named_parameters() if not key.startswith(("time_embed", "cond_embed")))]
    return [out.detach(), *torch.autograd.grad(out, wanted, cotangent)]


def check(within_twice, head, x, y, floor, path="auto"):
    ours, plain = results(head, x, y, path), results(head, x, y, "eager")
    head.double()
    exact = results(head, x.detach().double().requires_grad_(), y.detach().double().requires_grad_(), "eager")
    for triple in zip(ours, plain, exact, strict=True):
        within_twice(*triple, floor=floor)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_numbers_and_gradients(within_twice, options, recompute, path):
    if path != "rows" and "modulation_groups" in options:
        pytest.skip("blocks share a modulation")
    check(within_twice, *make(4099, recompute=recompute, **options), floor=1e-3, path=path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width", "of_products"),  # each is kernels of its own to compile: products have three
    [(1, 1024, 1024), (17, 64, 64), (129, 1536, 1536), (1000, 768, 64), (8191, 1280, 1536), (5, 3072, 1024)],
)
def test_odd_sizes(within_twice, dtype, rows, width, of_products, path):
    if path != "rows" and dtype == torch.float32:
        pytest.skip("products are of 16-bit numbers")
    floor = 1e-5 if dtype == torch.float32 else 1e-3
    width = width if path == "rows" else of_products
    check(within_twice, *make(rows, width, depth=1, dtype=dtype, row=16), floor=floor, path=path)


def test_one_condition_for_all_rows(within_twice):
    check(within_twice, *make(4099, conditions=1), floor=1e-3)


def test_a_condition_for_the_rows_of_each_picture(within_twice):
    head, x, y = make(4096, conditions=4)
    x, y = (t.detach().unflatten(0, (4, -1)).requires_grad_() for t in (x, y))
    check(within_twice, head, x, y, floor=1e-3)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_every_row_is_written(recompute, path):
    """Memory that nobody wrote is NaN under deterministic algorithms."""
    head, x, y = make(1001, recompute=recompute)
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.isfinite(result).all() for result in results(head, x, y, path))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_thousand_runs_are_equal_to_the_bit(path):
    head, x, y = make(777, width=256)
    first = results(head, x, y, path)
    for _ in range(1000):
        assert all(map(torch.equal, results(head, x, y, path), first))


def test_more_than_2_31_elements():
    rows, width = 2**21 + 3, 1024
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    head, _, y = make(1, width, depth=1, row=16)
    with torch.inference_mode():
        x = torch.randn(rows, 16, device="cuda", dtype=torch.bfloat16)
        whole = head.from_embedding(x, y)
        last = head.from_embedding(x[-5:], y)
    torch.testing.assert_close(
        whole[-5:], last, rtol=2e-2, atol=2e-2
    )  # another tile of the product may round otherwise


def test_compiles_whole_forward_and_backward():
    head, x, y = make(300)
    compiled = torch.compile(head.from_embedding, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (300, 1000, 64):
            x, y = (torch.randn(rows, t.shape[1], device="cuda", dtype=t.dtype).requires_grad_() for t in (x, y))
            out, plain = compiled(x, y), head.from_embedding(x, y)
            torch.testing.assert_close(out, plain, rtol=2e-2, atol=2e-2)
            ours, theirs = (torch.autograd.grad(result.sum(), [x, y]) for result in (out, plain))
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_a_train_step_in_a_cuda_graph(path):
    head, x, y = make(512)
    parameters = [p for key, p in head.named_parameters() if not key.startswith(("time_embed", "cond_embed"))]

    def step():
        return torch.autograd.grad(run(head, x, y, path).square().mean(), parameters)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [gradient.clone() for gradient in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = step()
    for gradient in gradients:
        gradient.zero_()
    graph.replay()
    assert all(map(torch.equal, gradients, expected))
    with torch.no_grad():  # weights are read where they are: a replay sees that they changed
        for parameter in parameters:
            parameter.mul_(0.5)
    graph.replay()
    assert all(map(torch.equal, gradients, step()))


def test_nothing_waits_for_the_device(path):
    head, x, y = make(512)
    results(head, x, y, path)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(head, x, y, path).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast():
    head, x, y = make(300, dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        ours, plain = results(head, x, y, "auto"), results(head, x, y, "eager")
    assert ours[0].dtype == torch.bfloat16
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() <= 3e-2 * theirs.norm()


def test_memory_of_a_train_step(path):
    peaks = {}
    for name in ("eager", path):
        head, x, y = make(8192, depth=12)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(head, x, y, name).sum().backward()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    assert peaks[path] < peaks["eager"]


def test_doctor_says_what_was_measured():
    (line,) = (op for op in doctor().ops if op.op == "flow_head")
    assert "Triton" in line.runs
    assert line.why.startswith(("unmeasured on this GPU", "measured from"))


@pytest.mark.parametrize(
    ("path", "dtype", "width", "options"),
    [
        ("rows", "float32", 100, {}),
        ("rows", "bfloat16", 1536, {"norm": "rms", "mlp": "swiglu", "hidden": 72}),
        ("products", "bfloat16", 136, {}),
        ("products", "float16", 136, {"norm": "rms", "mlp": "swiglu", "hidden": 72}),
    ],
)
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.sanitizer
def test_compute_sanitizer(sanitized, path, dtype, width, options, recompute):
    sanitized(
        "import torch; from uniflow_kernels import FlowHead, backend, fused_flow_blocks;"
        "backend('triton').__enter__();"
        f"head = FlowHead(16, {width}, 16, 16, 2, recompute={recompute!r}, **{options!r}).to('cuda', torch.{dtype});"
        f"x, y = (torch.randn(37, n, device='cuda', dtype=torch.{dtype}) for n in (16, {width}));"
        f"how = dict(**head.form._asdict(), recompute={recompute!r}, path={path!r});"
        "fused_flow_blocks(head.input_proj(x), y, *head.tensors(), **how).sum().backward(); torch.cuda.synchronize()"
    )


def test_training_step_in_chunks(within_twice):
    """Rows of 588 in bfloat16 are padded to 592 on the way; loss and gradients against the plain form."""
    head = randomize(FlowHead(588, 256, 588, 256, 3)).cuda()
    images, t = torch.rand(6, 3, 112, 112, device="cuda"), torch.rand(6, 64, device="cuda")
    noise, condition = torch.randn(6, 64, 588, device="cuda"), torch.randn(6, 64, 256, device="cuda")

    def results(dtype, name, chunk_tokens):
        given = condition.to(dtype).requires_grad_()
        own = copy.deepcopy(head).to(dtype)
        with backend(name):
            loss = flow_matching_loss(own, given, images, t, 14, noise, time_scale=1000.0, chunk_tokens=chunk_tokens)
            return [loss, *torch.autograd.grad(loss, [given, *own.parameters()])]

    exact = results(torch.float64, "eager", None)
    plain = results(torch.bfloat16, "eager", None)
    for mine, theirs, true in zip(results(torch.bfloat16, "auto", 128), plain, exact, strict=True):
        within_twice(mine, theirs, true.double(), floor=1e-3)


FP8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs compute capability 8.9"
)


@FP8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("conditions", [None, 1])
@pytest.mark.parametrize("rows", [33, 9000])  # more than are made at a time
@torch.no_grad()
def test_modulations_in_fp8(within_twice, rows, conditions, dtype):
    """The scaled product gives the numbers of the definition on a CPU, and the blocks what they make of these."""
    head, x, y = make(rows, dtype=dtype, conditions=conditions)
    layers = head.quantized("fp8")
    a = torch.nn.functional.silu(y)
    scaled = layers(a).cpu().double()
    exact = type(layers)(*(None if part is None else part.cpu() for part in layers))(a.cpu()).double()
    # each sums in another order, and may round to the next bfloat16
    assert ((scaled - exact).abs() <= 2.0**-7 * exact.abs() + 1e-3 * exact.abs().mean()).all()
    assert (scaled != exact).double().mean() < 0.05
    ours = head.from_embedding(x, y, layers)
    with backend("eager"):
        plain = head.from_embedding(x, y, layers)
    assert torch.equal(head.from_embedding(x, y, layers), ours)
    given = layers.given(a, torch.float64)
    blocks, _, _ = copy.deepcopy(head).double().tensors()
    double = copy.deepcopy(head).double()
    reference = flow_blocks(double.input_proj(x.double()), blocks, given, head.form)
    within_twice(ours, plain, double.final_layer.linear(reference), floor=1e-3)


@FP8
@torch.no_grad()
def test_fp8_in_a_graph_sees_new_weights():
    head, _, _ = make(1)
    head.precision = "fp8"
    condition = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    noise = torch.randn(64, 588, device="cuda")
    results = [head.sample(condition, 3, noise=noise) for _ in range(3)]  # the second is captured
    assert torch.equal(results[0], results[2])
    head.res_blocks[0].adaLN_modulation[1].weight.mul_(1.5)
    changed = head.sample(condition, 3, noise=noise)
    head.precision = None
    assert not torch.equal(changed, results[0])
    assert not torch.equal(head.sample(condition, 3, noise=noise), changed)
