"""The table of what was measured: which path it chooses, that it is read once, and what is said of it."""

import json
from importlib.resources import files

import pytest
import torch

from uniflow_kernels import backend, doctor
from uniflow_kernels.ops import flow_choice
from uniflow_kernels.ops.flow_choice import UNMEASURED, _path, explain, rows_known, served_by

PATHS = {"eager", "rows", "products"}
CUDA = torch.device("cuda", 0)
TABLE = [
    {
        **{"arch": 90, "dtype": "bfloat16", "width": 1024, "gpu": "some H100", "rows": rows},
        **{"inference": inference, "training": training},
    }
    for rows, inference, training in (
        (8192, ["products", "rows", "eager"], ["rows", "products", "eager"]),
        (64, ["eager", "rows"], ["eager", "products", "rows"]),
        (512, ["rows", "eager"], []),
    )
]


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    """A GPU that is not there, of compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flow_choice, "_table", lambda: {"flow_head": TABLE})
    caches = flow_choice.architecture, flow_choice.measured
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def path(rows, training=False, dtype=torch.bfloat16, width=1024, arch=90):
    return _path(arch, dtype, width, rows, training)


def test_the_fastest_at_the_next_smaller_number_of_rows_serves():
    assert [path(rows) for rows in (64, 511, 512, 8191, 8192, 10**6)] == ["rows"] * 4 + ["products"] * 2
    assert [path(rows, True) for rows in (64, 511, 8192)] == ["products", "products", "rows"]


def test_what_was_not_measured_is_chosen_by_the_heuristic():
    assert path(5000, training=True) == "products"  # at 512 rows only inference was measured
    assert path(512, training=True) == "rows"
    assert path(63) == "rows"
    assert path(8192, dtype=torch.float16) == path(8192, width=768) == "products"
    assert path(8192, dtype=torch.float32) == path(8192, arch=80) == path(8192, arch=100) == "rows"


def test_eager_serves_where_it_was_the_fastest():
    def backend_of(rows):
        return served_by(CUDA, torch.bfloat16, 1024, rows)

    with torch.no_grad():
        assert [backend_of(rows) for rows in (63, 64, 511, 512, None)] == ["triton", "eager", "eager", *2 * ["triton"]]
        with backend("triton"):
            assert backend_of(64) == "triton"
    assert [backend_of(rows) for rows in (64, 512, 8192)] == ["eager", "triton", "triton"]


def test_the_table_is_read_once(monkeypatch):
    reads = []
    monkeypatch.setattr(flow_choice, "_table", lambda: reads.append(1) or {"flow_head": TABLE})
    flow_choice.measured.cache_clear()
    for rows in range(100):
        path(rows)
    assert len(reads) == 1


def test_what_is_said():
    runs, why = explain(CUDA, torch.bfloat16, 1024, 1024)
    plain, by_rows, products = (flow_choice.RUNS[name] for name in ("eager", "rows", "products"))
    assert runs == (
        f"{by_rows}; from 64 rows {plain}; from 512 rows {by_rows}; "
        f"from 4096 rows {by_rows} (training: {products}); from 8192 rows {products} (training: {by_rows})"
    )
    assert why == "measured from 64 to 8192 rows on some H100"
    assert explain(CUDA, torch.float16, 1024, 1024) == (f"{by_rows}; from 4096 rows {products}", UNMEASURED)
    assert explain(CUDA, torch.float16, 588, 588) == (by_rows, UNMEASURED)  # rows of no multiple of 16 bytes
    assert explain(CUDA, torch.float16, 1024, 1024, None, "they share") == (by_rows, UNMEASURED)
    assert explain(CUDA, torch.float16, 1024, 1024, "a hook") == (plain, "Triton: a hook")


def test_doctor_says_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("uniflow_kernels.diagnosis._gpus", lambda: "some H100")
    monkeypatch.setattr("uniflow_kernels.diagnosis._loss", lambda name, cuda: None)
    monkeypatch.setattr("uniflow_kernels.diagnosis._attention", lambda cuda: None)
    (line,) = (op for op in doctor().ops if op is not None and op.op == "flow_head")
    assert line.why == "measured from 64 to 8192 rows on some H100"


def test_the_shipped_table():
    table = json.loads(files("uniflow_kernels").joinpath(flow_choice.FILE).read_text())
    assert table.keys() == {"flow_head"}
    for entry in table["flow_head"]:
        assert entry.keys() == {
            *("arch", "dtype", "width", "rows", "inference", "training"),
            *("gpu", "date", "commit"),
        }
        assert {*entry["inference"], *entry["training"]} <= PATHS


def test_a_compiled_graph_serves_any_number_of_rows():
    """It asks for no number of rows before the op, so that there is nothing to compile again for."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + (rows_known(x) is None), fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 64, 9000):
            assert compiled(torch.zeros(rows, 8)).all()
    assert rows_known(torch.zeros(3, 5, 8)) == 15
