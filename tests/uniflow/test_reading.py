"""Hostile JSON and YAML: an error that says what is wrong, in no time."""

import os
import time

import pytest

from uniflow.reading import check_file, parse_json, read_json, read_yaml, shown

LAUGHS = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{now}: &{now} [{', '.join([f'*{before}'] * 8)}]\n" for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"a": ' * 100 + "1" + "}" * 100, "nested more than 64 deep"),
        ('{"a": NaN}', "expected finite numbers, got nan"),
        ('{"a": [1, -Infinity]}', "expected finite numbers, got -inf"),
        ('{"a": 1e999}', "expected finite numbers, got inf"),
        ('{"a": 1' + "0" * 30 + "}", "integers of at most 64 bits, got one of 100"),
        ('{"a": 1' + "0" * 9999 + "}", "is not JSON: Exceeds the limit"),
        ("[1]", "expected a JSON object, got list"),
        ("{", "is not JSON: Expecting"),
        ("\ufeff{}", "is not JSON: Unexpected UTF-8 BOM"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b" " * (1 << 24) + b"{}", "is larger than 16384 KiB"),
    ],
)
def test_json(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_is_meant_is_read(tmp_path):
    values = {"a": [1, -2.5, None, True, "ü"], "b": {"c": {}}}
    assert parse_json('{"a": [1, -2.5, null, true, "ü"], "b": {"c": {}}}', "here") == values
    path = tmp_path / "run.yaml"
    path.write_text("a: [1, -2.5, null, true, ü]\nb: &b {c: {}}\nd: {<<: *b, e: *b}\n")
    assert read_yaml(path) == values | {"d": {"c": {}, "e": {"c": {}}}}
    path.write_text("")
    assert read_yaml(path) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "its aliases stand for more than 1024 KiB"),
        ("a: &a " + "x" * 2000 + "\nb: [" + "*a, " * 1000 + "]", "its aliases stand for more than 1024 KiB"),
        ("a: &a [*a]", "the alias 'a' stands for nothing, or itself"),
        ("a: &a 1\nb: &a [*a]", "the alias 'a' stands for nothing, or itself"),
        ("[" * 100_000, "nested more than 64 deep"),
        ("- " * 100_000 + "a", "nested more than 64 deep"),
        ("a: .nan", "expected finite numbers, got nan"),
        ("a: 2024-01-01", "expected numbers, texts, lists and mappings, got a date"),
        ("a: 2024-99-99", "is no YAML"),
        ("a: !!int ''", "is no YAML"),
        ("a: !!int x", "is no YAML"),
        ("a: !!bool 3", "is no YAML"),
        ("a: !!timestamp x", "is no YAML"),
        ("a: !!set {b, c}", "got a set"),
        ("a: !!binary aGk=", "got a bytes"),
        ("a: !!python/object/apply:os.system [exit]", "is no YAML"),
        ("{1: 2}", "expected texts as keys, got 1"),
        ("{[1]: 2}", "is no YAML"),
        ("a: [", "is no YAML"),
        ("a: 1\n---\nb: 2", "is no YAML"),
        ("a: \x01", "is no YAML"),
        (b"a: \xff", "UTF-8"),
        ("#" * (1 << 18) + "\n", "is larger than 256 KiB"),
    ],
)
def test_yaml(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(path)
    assert time.perf_counter() - start < 2
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "broken").symlink_to(tmp_path / "none")
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match=f"{name}: expected a file, got a pipe or device"):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match="expected a file, got a folder"):
        check_file(tmp_path)
    for name in ("broken", "none"):
        with pytest.raises(FileNotFoundError, match=f"no such file: .*{name}"):
            read_yaml(tmp_path / name)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer, not the file itself: `git lfs pull` fetches it"):
        check_file(path)


def test_what_is_shown_is_short_and_printable():
    nested: list = [1]
    for _ in range(40):
        nested = [nested] * 8
    assert len(shown(nested)) < 300
    assert len(shown("x" * 10**6)) < 100
    assert shown("\x1b[31m") == "'\\x1b[31m'"
