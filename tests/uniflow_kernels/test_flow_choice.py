"""Which path serves a call of the flow head: by the table of what was measured, by a count, and by what can serve."""

import json
from contextlib import nullcontext
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import randomize
from uniflow_kernels import FlowHead, backend, doctor, graphs
from uniflow_kernels.choice import in_graph, is_in_graph
from uniflow_kernels.ops import attention, flow_choice, transformer_layers, transformer_mlp
from uniflow_kernels.ops.flow_choice import PATHS, RUNS, UNMEASURED, Call, call_of, choose_path, explain
from uniflow_kernels.ops.flow_head import ModulatedBlocks

CUDA = torch.device("cuda", 0)
TABLE = [
    {
        **{"arch": 90, "dtype": "bfloat16", "width": 1024, "gpu": "some H100", "rows": rows},
        **{"inference": inference, "training": training},
        **{"graph_inference": inference[::-1], "graph_training": training[::-1]},
    }
    for rows, inference, training in (
        (8192, ["products", "rows", "eager"], ["rows", "products", "eager"]),
        (64, ["eager", "rows"], ["eager", "products", "rows"]),
        (512, ["rows", "eager"], []),
        (2048, ["products", "eager", "rows"], ["products", "eager", "rows"]),
    )
]


@pytest.fixture
def gpu(monkeypatch):
    """Makes a GPU that is not there, of a compute capability."""

    def pretend(arch, name="some H100"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(arch, 10))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        flow_choice.architecture.cache_clear()
        flow_choice.gpu_name.cache_clear()

    monkeypatch.setattr(flow_choice, "_table", lambda op: TABLE)
    pretend(90)
    flow_choice.measured.cache_clear()
    yield pretend
    flow_choice.architecture.cache_clear()
    flow_choice.gpu_name.cache_clear()
    flow_choice.measured.cache_clear()


def call(rows, training=False, dtype=torch.bfloat16, width=1024, **facts):
    return Call(CUDA, dtype, width, width, rows, training, **facts)


def path(rows, training=False, **facts):
    return choose_path(call(rows, training, **facts))


def test_the_fastest_at_the_next_smaller_number_of_rows_serves(gpu):
    at = (64, 511, 512, 2047, 2048, 8192, 10**6)
    assert [path(rows) for rows in at] == ["eager"] * 2 + ["rows"] * 2 + ["products"] * 3
    assert [path(rows, True) for rows in (64, 511, 2048, 8192)] == ["eager", "eager", "products", "rows"]


def test_small_products_serve_where_they_have_tiles(gpu):
    assert choose_path(call(64), "small products") == "small products"
    gpu(80)
    with pytest.raises(ValueError, match="it has no small tiles for compute capability 8"):
        choose_path(call(64), "small products")
    assert choose_path(call(64), "products") == "products"


def test_in_a_graph_the_gpus_own_time_counts(gpu):
    """Launches do not: "eager" is the fastest of 64 rows where each of them is waited for."""
    with in_graph():
        assert [path(rows) for rows in (64, 512)] == ["rows", "eager"]
        assert path(8192) == "eager"
        assert path(8192, training=True) == "eager"
    assert path(64) == "eager"


def test_a_captured_call_chooses_for_its_graph_before_it_is_captured(monkeypatch):
    """What the capture uses was compiled by the call before it."""
    stream, nothing = SimpleNamespace(wait_stream=lambda other: None), lambda *arguments, **keywords: nullcontext()
    for name in ("stream", "graph", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    said = []
    graphs.Graph(lambda x: said.append(is_in_graph()), [torch.zeros(1)], SimpleNamespace(stream=stream, pool=None))
    assert said == [True, True]
    assert not is_in_graph()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("NVIDIA H200", "NVIDIA H200"), ("NVIDIA H200 NVL", "NVIDIA H200"), ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3")],
)
def test_each_gpu_has_its_own_measurements_or_the_nearest_ones(gpu, monkeypatch, name, nearest):
    first = {"NVIDIA H200": "rows", "NVIDIA H20": "products", "NVIDIA H100 80GB HBM3": "eager", "RTX": "products"}
    fields = ("inference", "training", "graph_inference", "graph_training")
    entries = [{**TABLE[1], "gpu": kind, **{field: [by] for field in fields}} for kind, by in first.items()]
    entries[-1]["arch"] = 89
    monkeypatch.setattr(flow_choice, "_table", lambda op: entries)
    gpu(90, name)
    assert path(64) == first[nearest]
    _, why = explain(call(1))
    other = "" if name == nearest else f", the nearest to {name} that was"
    assert why == f"measured from 64 to 64 rows on {nearest}{other}"


def test_what_was_not_measured_is_counted(gpu):
    """Products where they were counted to win, rows elsewhere."""
    assert path(512, training=True) == "rows"  # there only inference was measured
    assert path(63) == "rows"
    for dtype in (torch.bfloat16, torch.float16):
        assert [path(rows, dtype=dtype, width=768) for rows in (4095, 4096)] == ["rows", "products"]
    assert path(8192, True, width=1536) == "products"
    assert path(8192, dtype=torch.float32) == path(8192, width=64) == "rows"
    for arch in (80, 86, 89, 100, 120):
        gpu(arch)
        assert path(32768) == path(32768, training=True) == "rows"


@pytest.mark.parametrize("training", [False, True])
def test_the_first_that_can_serve_is_taken(gpu, training):
    """Where products come first and cannot serve, the second of the measured order does, and not whatever is left."""
    assert path(2048, training, shared="rows share a condition") == "eager"
    assert path(2048, training, why_not="a hook") == "eager"
    assert path(8192, shared="blocks share a modulation") == "rows"
    assert path(8192, training, width=1020) == "rows"  # TMA takes no such rows


def test_a_backend_asked_for_leaves_out_the_others(gpu):
    with backend("triton"):
        assert [path(rows) for rows in (64, 2048)] == ["rows", "products"]
        assert path(2048, shared="rows share a condition") == "rows"
        with pytest.raises(ValueError, match="flow_head: backend 'triton' cannot serve this input: a hook"):
            path(2048, why_not="a hook")
    with backend("eager"):
        assert path(2048) == "eager"
        with pytest.raises(ValueError, match="path 'rows' cannot serve this input: backend 'eager' was asked for"):
            choose_path(call(64), "rows")
    with backend("cuda"), pytest.raises(ValueError, match="flow_head has no such kernel"):
        path(64)


def test_a_path_asked_for_serves_or_says_why_not(gpu):
    assert choose_path(call(64), "rows") == "rows"
    assert choose_path(call(64), "products") == "products"
    for reason in ("shared", "why_not"):
        with pytest.raises(ValueError, match="flow_head: path 'products' cannot serve this input: it is so"):
            choose_path(call(64, **{reason: "it is so"}), "products")
    with pytest.raises(ValueError, match="path: expected one of auto, rows, products, small products, got 'eager'"):
        choose_path(call(64), "eager")


def test_a_graph_of_any_number_of_rows_asks_again_in_the_op(gpu):
    """There the table chooses between the paths of the kernels, by the rows that it then has."""
    assert path(None) == "auto"
    assert path(None, why_not="a hook") == "eager"
    assert [choose_path(call(rows), in_op=True) for rows in (64, 512, 2048)] == ["rows", "rows", "products"]
    assert choose_path(call(2048, shared="rows share a condition"), in_op=True) == "rows"


def test_no_rows_need_no_kernel(gpu):
    assert path(0) == "eager"


@pytest.mark.parametrize("arch", [86, 89, 120])
def test_gpus_of_less_shared_memory_have_tiles_of_their_own(gpu, arch):
    gpu(arch)
    for dtype in (torch.bfloat16, torch.float16):
        assert choose_path(call(64, dtype=dtype), "products") == "products"


def test_gpus_that_are_too_old(gpu):
    gpu(75)
    assert path(8192) == "eager"
    assert explain(call(1)) == (RUNS["eager"], "Triton: it needs compute capability 8.0")


def small_head(**options):
    return randomize(FlowHead(24, 32, 24, 16, 2, **options))


@pytest.fixture
def interpreted(monkeypatch):
    """On a CPU, in the interpreter, an order of paths that was measured there; "auto" may take what runs there."""

    def order(*paths):
        entry = {"arch": 0, "dtype": "float32", "width": 32, "gpu": "none", "rows": 1}
        orders = dict.fromkeys(("inference", "training", "graph_inference", "graph_training"), paths)
        monkeypatch.setattr(flow_choice, "_table", lambda op: [{**entry, **orders}])
        monkeypatch.setattr(flow_choice, "why_not_on", lambda device, dtype: None)
        monkeypatch.setattr(flow_choice, "_why_not_few", lambda call: "a GPU has no such path")
        flow_choice.measured.cache_clear()

    yield order
    flow_choice.measured.cache_clear()


class Taken:
    """The paths that were chosen inside the block."""

    def __init__(self, monkeypatch):
        self.paths = []

        def noted(*arguments, **keywords):
            self.paths.append(choose_path(*arguments, **keywords))
            return self.paths[-1]

        for place in ("ops.flow_head", "modules.flow_head", "dropin.running", "ops.flow_passes"):
            monkeypatch.setattr(f"uniflow_kernels.{place}.choose_path", noted)


@pytest.fixture
def taken(monkeypatch):
    return Taken(monkeypatch).paths


@pytest.mark.parametrize("training", [False, True])
def test_one_condition_for_all_rows_runs_the_second_fastest(interpreted, taken, training):
    """The fault: the kernels were taken as the backend for the sake of "products", which then could not serve."""
    interpreted("products", "eager", "rows")
    head, x = small_head(), torch.randn(5, 24)
    with torch.set_grad_enabled(training):
        head(x, 1.0, torch.randn(1, 16))
        assert taken == ["eager"]
        head(x, 1.0, torch.randn(5, 16))
    assert taken[1] == "products"
    with torch.no_grad():
        blocks = ModulatedBlocks(*head.tensors(), head.form, torch.randn(5, 32), 5)
    assert blocks.path(5) == "eager"


@pytest.mark.parametrize("order", [("eager",), ("rows",), ("rows", "eager")])
def test_a_forward_pass_chooses_once_and_its_backward_pass_not_again(interpreted, taken, order):
    interpreted(*order)
    head = small_head()
    head(torch.randn(5, 24), torch.rand(5), torch.randn(5, 16)).sum().backward()
    assert taken == [order[0]]


def test_training_is_that_a_gradient_will_be_wanted(gpu):
    """Not that gradients are recorded: frozen tensors keep nothing for a backward pass."""
    head = small_head()
    tensors, x = head.tensors(), torch.randn(5, 32)
    assert call_of(x, x, *tensors).training
    head.requires_grad_(False)
    assert not call_of(x, x, *tensors).training
    assert call_of(x.requires_grad_(), x.detach(), *tensors).training
    with torch.no_grad():
        assert not call_of(x, x, *tensors).training


def test_facts_of_a_call():
    head = small_head(modulation_groups=1)
    x = torch.randn(2, 3, 32)
    facts = call_of(x, x, *head.tensors())
    assert (facts.rows, facts.width, facts.hidden, facts.dtype) == (6, 32, 32, torch.float32)
    assert facts.shared == "blocks share a modulation"
    head = small_head()
    assert call_of(x, x, *head.tensors()).shared is None
    assert call_of(x, x[:, :1], *head.tensors()).shared == "rows share a condition"
    assert call_of(torch.randn(2, 3, 4, 32), torch.randn(2, 1, 4, 32), *head.tensors()).shared is None  # it is expanded
    with torch.autocast("cpu", torch.bfloat16):
        assert call_of(x, x, *head.tensors()).dtype == torch.bfloat16
        assert call_of(x.double(), x, *head.tensors()).dtype == torch.float64


def test_the_table_is_read_once(gpu, monkeypatch):
    reads = []
    monkeypatch.setattr(flow_choice, "_table", lambda op: reads.append(1) or TABLE)
    flow_choice.measured.cache_clear()
    for rows in range(1, 100):
        path(rows)
    assert len(reads) == 1


def test_what_is_said(gpu):
    plain, by_rows, products, _ = (RUNS[name] for name in PATHS)
    runs, why = explain(call(1))
    assert runs == (
        f"{by_rows}; from 64 rows {plain}; from 512 rows {by_rows}; from 2048 rows {products}; "
        f"from 8192 rows {products} (training: {by_rows})"
    )
    assert why == "measured from 64 to 8192 rows on some H100"
    assert explain(call(1, dtype=torch.float16)) == (f"{by_rows}; from 4096 rows {products}", UNMEASURED)
    assert explain(call(1, dtype=torch.float16, width=588)) == (by_rows, UNMEASURED)  # no multiple of 16 bytes
    assert explain(call(1, dtype=torch.float16, shared="they share")) == (by_rows, UNMEASURED)
    assert explain(call(1, why_not="a hook")) == (plain, "Triton: a hook")
    shared, _ = explain(call(1, shared="they share"))
    assert f"from 2048 rows {plain}" in shared
    with backend("eager"):
        assert explain(call(1)) == (plain, "backend 'eager' was asked for")
    with backend("cuda"):
        assert explain(call(1)) == ("nothing", "backend 'cuda' was asked for")


def test_doctor_says_it(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("uniflow_kernels.diagnosis._gpus", lambda: "some H100")
    monkeypatch.setattr("uniflow_kernels.diagnosis._loss", lambda name, cuda: None)
    monkeypatch.setattr("uniflow_kernels.diagnosis._attention", lambda cuda: None)
    monkeypatch.setattr("uniflow_kernels.diagnosis._mlp", lambda cuda: None)
    (line,) = (op for op in doctor().ops if op is not None and op.op == "flow_head")
    assert (line.runs, line.why) == explain(call(1))


def test_the_shipped_table():
    table = json.loads(files("uniflow_kernels").joinpath(flow_choice.FILE).read_text())
    paths = {
        "flow_head": PATHS,
        "transformer_layers": ("eager", *transformer_layers.KERNELS),
        "transformer_mlp": ("eager", *transformer_mlp.KERNELS),
        "attention": (attention.OWN, *attention.BACKENDS, *attention.PACKAGES),
    }
    assert table.keys() == paths.keys()
    for op, entry in ((op, entry) for op, entries in table.items() for entry in entries):
        assert entry.keys() == {
            *("arch", "dtype", "width", "rows", "inference", "training", "graph_inference", "graph_training"),
            *("gpu", "date", "commit"),
        }
        orders = ("inference", "training", "graph_inference", "graph_training")
        assert {path for order in orders for path in entry[order]} <= set(paths[op])
