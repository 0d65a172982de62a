"""Files that come from elsewhere, read within bounds: a hostile one costs little and ends in one line.

What is read is a regular file of a bounded size. What JSON or YAML holds is plain (numbers, texts, lists, mappings),
its numbers are finite, and it is neither deep nor, once YAML's aliases are written out, large.
"""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

_LARGEST_JSON = 1 << 24  # bytes; the index of a model of 100,000 tensors has 10 million
_LARGEST_YAML = 1 << 18  # a training file is a page, and PyYAML reads 100 kB in a second
_LARGEST_WRITTEN_OUT = 1 << 20
_DEEPEST = 64
_LARGEST_INTEGER = 1 << 64
_TOO_DEEP = f"lists and mappings are nested more than {_DEEPEST} deep"
_POINTER = b"version https://git-lfs.github.com/spec/"

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80
_LONGEST_SHOWN = 200


def shown(value: object) -> str:
    """`repr` of what came from outside, short whatever it is; nothing in it reaches a terminal as an escape."""
    text = _SHORT.repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + " ..."


def printable(name: str) -> str:
    """A name that a file gives as it is, unless it would do something to a terminal."""
    return name if name.isprintable() and len(name) < 200 else shown(name)


def check_file(path: Path) -> None:
    """Refuse what cannot be read as a file: pipes and devices, which could make a reader wait for ever.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is no regular file, or the pointer that Git LFS leaves in the place of one.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, got a {'folder' if path.is_dir() else 'pipe or device'}")
    with path.open("rb") as file:
        try:
            start = file.read(len(_POINTER))
        except OSError as error:  # of which nobody says the name
            raise OSError(error.errno, error.strerror, str(path)) from None
        if start == _POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself: `git lfs pull` fetches it")


def check_folder(folder: str | Path) -> Path:
    """The folder as a path.

    Raises:
        FileNotFoundError: if there is none.
        NotADirectoryError: if it is a file.
    """
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"no such folder: {path}; expected one with config.json and the weights")
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, expected the folder with config.json and the weights")
    return path


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON, too large or too deep, holds a number that is not finite, or no object.
    """
    values = parse_json(_text(Path(path), _LARGEST_JSON), path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no configuration: expected a JSON object, got {type(values).__name__}")
    return values


def parse_json(text: str, source: object) -> Any:
    """What a text of JSON holds; `source` names it in errors, which are those of `read_json`."""
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError(f"{source}: {_TOO_DEEP}") from None
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    _check(values, source)
    return values


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        ModuleNotFoundError: if yaml is not installed.
        FileNotFoundError: if there is no such file.
        ValueError: if it is no YAML, too large or too deep, or holds anything but plain, finite values.
    """
    import yaml

    text = _text(Path(path), _LARGEST_YAML)
    try:
        _check_extent(yaml.parse(text, yaml.SafeLoader))
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date that there is not
        raise ValueError(f"{path} is no YAML: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # of a tag such as !!int on other text
        raise ValueError(f"{path} is no YAML: {error!r}") from None
    _check(values, path)
    return values


def _text(path: Path, largest: int) -> str:
    check_file(path)
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"{path} is larger than {largest >> 10} KiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no configuration: it is not JSON or YAML in UTF-8: {error}") from None


def _check_extent(events: Any) -> None:
    """Count depth and size before anything is made of them, with every alias as long as what it stands for."""
    sizes: dict[str, int] = {}
    names: list[str | None] = []  # of the open collections
    counts = [0]
    for event in events:
        kind = type(event).__name__
        if kind in ("SequenceEndEvent", "MappingEndEvent"):
            size, name = counts.pop(), names.pop()
        elif kind in ("SequenceStartEvent", "MappingStartEvent"):
            sizes.pop(event.anchor, None)
            names.append(event.anchor)
            counts.append(1)
            if len(names) > _DEEPEST:
                raise ValueError(_TOO_DEEP)
            continue
        elif kind == "ScalarEvent":
            size, name = 1 + len(event.value), event.anchor
        elif kind == "AliasEvent":
            if event.anchor not in sizes:
                raise ValueError(f"the alias {shown(event.anchor)} stands for nothing, or itself")
            size, name = sizes[event.anchor], None
        else:
            continue
        if name is not None:
            sizes[name] = size
        counts[-1] += size
        if counts[-1] > _LARGEST_WRITTEN_OUT:
            raise ValueError(f"its aliases stand for more than {_LARGEST_WRITTEN_OUT >> 10} KiB")


def _check(values: Any, source: object) -> None:
    waiting = [(values, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > _DEEPEST:
            raise ValueError(f"{source}: {_TOO_DEEP}")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ValueError(f"{source}: expected texts as keys, got {shown(key)}")
            waiting += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, list):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"{source}: expected finite numbers, got {value}")
        elif isinstance(value, int):
            if abs(value) > _LARGEST_INTEGER:
                raise ValueError(f"{source}: expected integers of at most 64 bits, got one of {value.bit_length()}")
        elif not (value is None or isinstance(value, str)):
            raise ValueError(f"{source}: expected numbers, texts, lists and mappings, got a {type(value).__name__}")
