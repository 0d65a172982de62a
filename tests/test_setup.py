"""What setup.py decides and says of the compiled parts, whose compilers are stand-ins; what a wheel says of itself."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from email import message_from_string
from pathlib import Path

import pytest

import uniflow_kernels

ROOT = Path(__file__).parents[1]


needs_ninja = pytest.mark.skipif(
    shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None, reason="needs ninja"
)


def run(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"UNIFLOW_CPU": "0", **kept, **environment},
    )


@pytest.fixture
def broken_nvcc(tmp_path):
    """A CUDA_HOME whose compiler fails."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho out of luck >&2\nexit 1\n")
    nvcc.chmod(0o755)
    return tmp_path


def test_without_a_compiler_nothing_is_built(tmp_path):
    done = run("build_ext", "--build-lib", str(tmp_path / "lib"), CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_refusal_wins_over_a_compiler(tmp_path, broken_nvcc):
    done = run("build_ext", "--build-lib", str(tmp_path / "lib"), CUDA_HOME=str(broken_nvcc), UNIFLOW_CUDA="0")
    assert done.returncode == 0, done.stderr


def test_insisting_without_a_compiler_fails(tmp_path):
    done = run("--version", CUDA_HOME=str(tmp_path), UNIFLOW_CUDA="1")
    assert done.returncode != 0
    assert "UNIFLOW_CUDA=1, but there is no nvcc" in done.stderr


@pytest.fixture
def broken_cxx(tmp_path):
    """A C++ compiler that fails."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho out of luck >&2\nexit 1\n")
    compiler.chmod(0o755)
    return str(compiler)


def test_insisting_on_the_cpu_part_without_a_compiler_fails(tmp_path):
    done = run("--version", CXX=str(tmp_path / "none"), UNIFLOW_CUDA="0", UNIFLOW_CPU="1")
    assert done.returncode != 0
    assert f"UNIFLOW_CPU=1, but there is no C++ compiler: {tmp_path}" in done.stderr
    done = run("--version", CXX=str(tmp_path / "none"), UNIFLOW_CUDA="0", UNIFLOW_CPU="")
    assert done.returncode == 0, done.stderr


@needs_ninja
@pytest.mark.parametrize(("wish", "code"), [("", 0), ("1", 1), ("0", 0)])
def test_a_cpu_part_that_cannot_be_compiled_is_left_out(tmp_path, broken_cxx, wish, code):
    """With a word about it, or an error where it was insisted on."""
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    done = run("build_ext", *folders, CXX=broken_cxx, UNIFLOW_CUDA="0", UNIFLOW_CPU=wish)
    assert done.returncode == code, done.stderr
    assert ("out of luck" in done.stdout) == (wish != "0")
    assert ("The CPU part is left out, plain PyTorch serves in its place" in done.stderr) == (wish == "")
    assert ("say UNIFLOW_CPU=0" in done.stderr) == (wish == "1")
    assert not list(tmp_path.rglob("*.so"))


@needs_ninja
def test_a_failed_compile_says_what_failed_and_how_to_go_on(tmp_path, broken_nvcc):
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    done = run("build_ext", *folders, CUDA_HOME=str(broken_nvcc))
    assert done.returncode != 0
    assert "out of luck" in done.stdout
    assert "This command failed" in done.stderr
    assert str(broken_nvcc / "bin" / "nvcc") in done.stderr
    assert "say UNIFLOW_CUDA=0" in done.stderr


@needs_ninja
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("UNIFLOW_CUDA", "yes", "expected 0 or 1, got 'yes'"),
        ("UNIFLOW_CPU", "2", "expected 0 or 1, got '2'"),
        ("UNIFLOW_CUDA_ARCHS", "sm_90", "expected a list"),
    ],
)
def test_wrong_settings_are_named(tmp_path, broken_nvcc, name, value, expected):
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    done = run("build_ext", *folders, **{"CUDA_HOME": str(broken_nvcc), name: value})
    assert done.returncode != 0
    assert f"{name}: {expected}" in done.stderr


@needs_ninja
@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("compute_75 compute_80 compute_87 compute_90", ["80", "90"]),  # of CUDA 12.4: no sm_100
        ("compute_80 compute_90 compute_100 compute_120", ["80", "90", "100"]),
        ("compute_50 compute_75", []),
    ],
)
def test_it_is_built_for_what_the_compiler_knows(tmp_path, listed, expected):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-arch ] && printf "%s\\n" {listed} && exit 0\nexit 1\n')
    nvcc.chmod(0o755)
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    done = run("build_ext", *folders, CUDA_HOME=str(tmp_path))
    assert done.returncode != 0  # this compiler compiles nothing
    if not expected:
        assert "compiles for none of sm_80, sm_90, sm_100" in done.stderr
        return
    rules = (tmp_path / "temp" / "uniflow_kernels._cuda" / "build.ninja").read_text()
    assert set(re.findall(r"code=sm_(\d+)", rules)) == set(expected)
    assert set(re.findall(r"code=compute_(\d+)", rules)) == {expected[-1]}


def test_what_the_wheel_says_of_itself(tmp_path):
    done = run("egg_info", "--egg-base", str(tmp_path), UNIFLOW_CUDA="0")
    assert done.returncode == 0, done.stderr
    info = message_from_string((tmp_path / "uniflow_kernels.egg-info" / "PKG-INFO").read_text())
    assert (info["Version"], info["License-Expression"]) == (uniflow_kernels.__version__, "Apache-2.0")
    assert info["License-File"] == "LICENSE"
    assert f"version: {info['Version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {info['Version']}, " in (ROOT / "CHANGELOG.md").read_text()
    page = info.get_payload()
    assert info["Description-Content-Type"] == "text/markdown"
    assert "from nothing" in page.lower()
    # what README.md shows and leads to is not there where the wheel's description is read
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert [link for link in links if "://" not in link] == []
    named = re.findall(r"`((?:docs|examples)/[\w./]+)`|\*(docs/[\w.]+): ", page)
    assert len(named) > 10
    assert all((ROOT / "".join(name)).exists() for name in named)
