import json

import torch

from benchmarks import choices
from benchmarks.__main__ import main
from benchmarks.cases import CASES
from uniflow_kernels.ops import attention, transformer_layers, transformer_mlp
from uniflow_kernels.ops.flow_choice import PATHS
from uniflow_kernels.ops.flow_passes import Pass

GPU = {"machine": "some H100", "environment": {"GPU": "some H100 (sm_90, 79 GiB)"}}


def entry(tokens, status="measured", dtype="bfloat16", **milliseconds):
    """Times of each form, forward and both, on the wall clock; the GPU's clock has them in the other order."""

    def times(median):
        return {"wall_ms": {"median": median}, "gpu_ms": {"median": -median}}

    forms = {label: {"forward": times(pair[0]), "both": times(pair[1])} for label, pair in milliseconds.items()}
    size = {"tokens": tokens, "width": 1024, "depth": 12, "dtype": dtype}
    return {"case": "flow_head_paths", "size": size, "status": status, "forms": forms}


def written(path):
    return json.loads(path.read_text())["flow_head"]


def orders(inference, training):
    """By the wall clock, and in graphs by the GPU's, which has them the other way round."""
    graphs = {"graph_inference": inference[::-1], "graph_training": training[::-1]}
    return {"inference": inference, "training": training, **graphs}


def test_gpus_of_one_kind_do_not_overwrite_each_other(results_file, tmp_path):
    """H100, H200 and H20 are of one compute capability."""
    kinds = {"some H200": ((1, 1), (2, 2)), "some H100": ((2, 2), (1, 1)), "some H20": ((1, 2), (2, 1))}
    files = [
        results_file(f"{name}.json", entries=[entry(64, ours=ours, plain=plain)], **{**GPU, "machine": name})
        for name, (ours, plain) in kinds.items()
    ]
    out = tmp_path / "table.json"
    assert main(["choices", *map(str, files), "--out", str(out)]) == 0
    assert [(e["gpu"], e["inference"][0], e["training"][0]) for e in written(out)] == [
        *[("some H100", "eager", "eager"), ("some H20", "rows", "eager"), ("some H200", "rows", "rows")]
    ]


def test_the_table_has_the_paths_by_their_times(results_file, tmp_path):
    entries = [
        entry(512, ours=(2, 3), plain=(1, 4), products=(3, 2)),
        entry(64, ours=(2, 3), plain=(1, 4)),
        entry(4096, "wrong", ours=(2, 3), plain=(1, 4)),
        entry(512, dtype="float32", ours=(1, 1), plain=(2, 2)) | {"case": "flow_head"},
    ]
    out = tmp_path / "table.json"
    assert main(["choices", str(results_file(entries=entries, **GPU)), "--out", str(out)]) == 0
    known = {"arch": 90, "dtype": "bfloat16", "width": 1024, "gpu": "some H100"}
    known |= {"date": "2026-01-02T03:04:05Z", "commit": "0" * 12}
    assert written(out) == [
        known | orders(["eager", "rows"], ["rows", "eager"]) | {"rows": 64},
        known | orders(["eager", "rows", "products"], ["products", "rows", "eager"]) | {"rows": 512},
    ]
    assert len(out.read_text().splitlines()) == 2 + 7  # one size a line


def test_the_later_of_two_measurements_counts(results_file, tmp_path):
    old = results_file("old.json", entries=[entry(64, ours=(1, 1), plain=(2, 2))], **GPU)
    new = results_file("new.json", entries=[entry(64, ours=(2, 2), plain=(1, 1))], **GPU, date="2026-02-01T00:00:00Z")
    out = tmp_path / "table.json"
    for files in ((old, new), (new, old)):
        assert main(["choices", *map(str, files), "--out", str(out)]) == 0
        (only,) = written(out)
        assert only["inference"] == ["eager", "rows"]


def test_nothing_is_written_where_no_gpu_was_measured(results_file, tmp_path, capsys):
    out = tmp_path / "table.json"
    cpu = results_file(entries=[entry(64, ours=(1, 1), plain=(2, 2))])
    assert main(["choices", str(cpu), "--out", str(out)]) == 2
    assert "no GPU's paths were measured" in capsys.readouterr().err
    assert not out.exists()


def test_the_case_holds_every_form_to_its_path(monkeypatch):
    """The backward pass too, which is called outside the form."""
    paths = choices.OPS["flow_head"]
    problem = CASES[paths.case].problem("cpu", {"tokens": 5, "width": 16, "depth": 2, "dtype": "float32"})
    taken = []
    forward, backward = Pass.forward, Pass.backward
    monkeypatch.setattr(Pass, "forward", lambda self, path: taken.append(path) or forward(self, path))
    monkeypatch.setattr(Pass, "backward", lambda self, *given: taken.append(given[-1]) or backward(self, *given))
    expected = {
        "ours": ["rows", "rows"],
        "products": ["products"] * 2,
        "small products": ["small products"] * 2,
        "plain": [],
    }
    libraries = {label: load() for label, load in problem.libraries.items()}
    for label, form in {"ours": problem.ours, "plain": problem.plain, **libraries}.items():
        form(*problem.inputs).sum().backward()
        assert taken == expected[label]
        taken.clear()
    assert {paths.of_forms[label] for label in expected} == set(PATHS)


def test_the_case_of_layers_holds_every_form_to_its_path(monkeypatch):
    paths, taken = choices.OPS["transformer_layers"], []
    size = {"tokens": 10, "length": 5, "width": 64, "dtype": "float32"}
    problem = CASES[paths.case].problem("cpu", size)
    for name in ("_by_rows", "_by_products"):
        run = getattr(transformer_layers, name)
        note = lambda *given, name=name, run=run: taken.append((name, *given[3:4])) or run(*given)  # noqa: E731
        monkeypatch.setattr(transformer_layers, name, note)
    expected = {"ours": ("_by_rows",), "products": ("_by_products", False), "small products": ("_by_products", True)}
    libraries = {label: load() for label, load in problem.libraries.items()}
    for label, form in {"ours": problem.ours, "plain": problem.plain, **libraries}.items():
        assert form(*problem.inputs).shape == (2, 5, 64)
        assert taken == ([expected[label]] if label in expected else [])
        taken.clear()
    assert set(paths.of_forms) == {"ours", *libraries}
    assert set(paths.of_forms.values()) == {"eager", *transformer_layers.KERNELS}


def test_the_case_of_the_mlp_holds_every_form_to_its_path(monkeypatch):
    paths, taken, run = choices.OPS["transformer_mlp"], [], transformer_mlp.mlp_backward_op
    monkeypatch.setattr(transformer_mlp, "mlp_backward_op", lambda *given: taken.append(given[-1]) or run(*given))
    problem = CASES[paths.case].problem("cpu", {"tokens": 5, "width": 16, "dtype": "float32"})
    expected = {"ours": ["products"], "small products": ["small products"], "plain": []}
    libraries = {label: load() for label, load in problem.libraries.items()}
    for label, form in {"ours": problem.ours, "plain": problem.plain, **libraries}.items():
        form(*problem.inputs).sum().backward()
        assert taken == expected[label]
        taken.clear()
    assert paths.of_forms.keys() == expected.keys()
    assert set(paths.of_forms.values()) == {"eager", *transformer_mlp.KERNELS}


def test_tables_of_several_ops_are_written(results_file, tmp_path):
    of_layers = entry(512, ours=(2, 3), own=(3, 4), products=(1, 2), plain=(9, 9)) | {"case": "layer_paths"}
    out = tmp_path / "table.json"
    assert (
        main(["choices", str(results_file(entries=[entry(64, ours=(1, 1)), of_layers], **GPU)), "--out", str(out)]) == 0
    )
    table = json.loads(out.read_text())
    assert [len(entries) for entries in table.values()] == [1, 1, 0, 0]
    assert table["transformer_layers"][0]["inference"] == ["products", "rows", "eager"]


def test_the_case_of_attention_asks_for_every_path(results_file, tmp_path):
    paths = choices.OPS["attention"]
    problem = CASES[paths.case].problem("cpu", {"batch": 1, "tokens": 5, "width": 8, "dtype": "float32"})
    assert set(paths.of_forms) == {"ours", *problem.libraries}
    assert set(paths.of_forms.values()) == {attention.OWN, *attention.BACKENDS, *attention.PACKAGES}
    expected = problem.plain(*problem.inputs)
    for form in (problem.ours, problem.libraries["flash"](), problem.libraries["math"]()):
        assert torch.allclose(form(*problem.inputs), expected, atol=1e-6)
    of_heads = entry(1025, ours=(3, 1), cudnn=(2, 2), **{"flash-attn 3": (1, 3)}) | {"case": "attention_paths"}
    of_heads["size"] |= {"width": 64}
    out = tmp_path / "table.json"
    assert main(["choices", str(results_file(entries=[of_heads], **GPU)), "--out", str(out)]) == 0
    (only,) = json.loads(out.read_text())["attention"]
    assert (only["width"], only["rows"]) == (64, 1025)
    assert only["inference"] == ["flash-attn 3", "cudnn", "own choice"]
    assert only["training"] == ["own choice", "cudnn", "flash-attn 3"]
