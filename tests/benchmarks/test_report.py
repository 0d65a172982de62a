import json

import pytest

from benchmarks import report, results
from benchmarks.__main__ import main
from benchmarks.compare import compare


def test_the_page_holds_the_numbers_and_its_plots_exist(results_file, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "docs"
    assert main(["report", str(results_file()), "--out", str(out)]) == 0
    page = (out / "benchmarks.md").read_text()
    row = next(line for line in page.splitlines() if "tokens 256" in line and "| both |" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:6] == ["10 (9.9-10.1)", "2.00", "1.50"]
    assert cells[8] == "30%"  # 3e8 FLOPs at 1e11 a second, in 10 ms
    plots = sorted(path.name for path in (out / "plots").iterdir())
    assert plots == ["cpu-floor.png", "cpu-memory.png", "cpu-ratio.png", "cpu-time.png"]
    for plot in plots:
        assert f"(plots/{plot})" in page
        assert (out / "plots" / plot).read_bytes().startswith(b"\x89PNG")


def test_a_wrong_case_stands_out(results_file, tmp_path):
    entry = {"case": "patchify", "size": {"batch": 1}, "status": "wrong", "why": "output 0: error", "forms": {}}
    report.write([results.load(results_file(entries=[entry]))], tmp_path / "docs")
    assert "| **wrong** output 0: error |" in (tmp_path / "docs" / "benchmarks.md").read_text()


def test_the_readme_is_filled_between_its_markers(results_file, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):  # filling twice changes nothing more
        assert main(["report", str(results_file()), "--out", str(tmp_path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("| flow_head | tokens 256, dtype float32 | both | 10 | 2.00 | 1.50 |") == 1


def some(case, tokens, status="measured", **changes):
    times = {"wall_ms": {"q1": 1.0, "median": 2.0, "q3": 3.0}}
    return {
        **{"case": case, "size": {"tokens": tokens}, "tokens": tokens, "status": status},
        **{"forms": {"ours": {"forward": times}, "plain": {"forward": times}}, **changes},
    }


def test_a_run_of_some_cases_replaces_only_these(results_file, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    folder.mkdir()
    old, new = (
        {"date": "2026-01-01T00:00:00Z", "commit": "a" * 12},
        {"date": "2026-02-01T00:00:00Z", "commit": "b" * 12},
    )
    results_file("results/b.json", entries=[some("patchify", 8), some("drawing", 9, "checked", forms={})], **new)
    entries = [some("patchify", 8, "wrong", why="old"), some("patchify", 7), some("drawing", 9), some("few_tokens", 6)]
    results_file("results/a.json", entries=entries, **old)
    results_file("results/c.json", machine="some GPU", **old)
    monkeypatch.setattr(results, "FOLDER", folder)
    out = tmp_path / "docs"
    assert main(["report", "--out", str(out)]) == 0
    page = (out / "benchmarks.md").read_text()
    cpu, gpu = page.split("## some GPU")
    newer, older = cpu.split("measured 2026-01-01, commit aaaaaaaaaaaa")
    assert "measured 2026-02-01, commit bbbbbbbbbbbb" in newer
    assert [newer.count(f"| {case} |") for case in ("patchify", "drawing", "few_tokens")] == [1, 0, 0]
    assert [older.count(f"| {case} |") for case in ("patchify", "drawing", "few_tokens")] == [1, 1, 1]
    assert "tokens 7" in older
    assert "**wrong**" not in page
    assert gpu.count("| flow_head |") == 6


def test_a_page_of_some_files_alone_goes_where_it_is_told(results_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert main(["report", str(results_file())]) == 2
    assert "--out: name a folder for a page of these files alone" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_of_the_same_size_the_newest_counts(results_file, tmp_path):
    results_file("a.json", median=10.0, date="2026-02-01T00:00:00Z")
    results_file("b.json", median=20.0, date="2026-01-01T00:00:00Z")
    results_file("c.json", machine="some GPU")
    cpu, gpu = results.latest(results.load_all(tmp_path))
    assert [machine["machine"] for machine in (cpu, gpu)] == ["cpu", "some GPU"]
    assert {entry["run"]["date"][:7] for entry in cpu["entries"]} == {"2026-02"}
    assert {results.milliseconds(entry["forms"]["ours"]["both"]) for entry in cpu["entries"]} == {10.0}


def test_compare_finds_a_planted_slowdown_and_ignores_noise(results_file):
    old = results.load(results_file(median=10.0, spread=0.4))
    assert compare(old, results.load(results_file(median=10.5, spread=0.4))) == ["nothing moved beyond its own spread"]
    lines = compare(old, results.load(results_file(median=12.0, spread=0.4)))
    assert "flow_head (tokens 64, dtype float32): ours both wall_ms 10 -> 12 (+20.0%)" in lines


def test_compare_sees_more_saved_bytes_and_a_case_gone_wrong(results_file):
    old = results.load(results_file())
    assert any("ours saved bytes 1000 -> 2000" in line for line in compare(old, results.load(results_file(saved=2000))))
    new = results.load(results_file())
    new["entries"][0] |= {"status": "wrong", "forms": {}}
    assert compare(old, new) == ["flow_head (tokens 64, dtype float32): was measured, is wrong"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no results file"),
        ("{", "damaged"),
        ("[1]", "no schema version"),
        (json.dumps({"schema": 0}), "schema version 0"),
        (json.dumps({"schema": 1, "machine": "cpu"}), "lacks environment"),
    ],
)
def test_a_bad_results_file_gets_one_line(content, said, tmp_path, capsys):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_unknown_case_gets_one_line_with_the_closest_match(capsys):
    assert main(["run", "--cases", "flow_haed"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'flow_head'" in error
    assert "patchify" in error
    assert error.count("\n") == 1
