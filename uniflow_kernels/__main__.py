"""`python -m uniflow_kernels verify pkg.module:factory` and `python -m uniflow_kernels doctor`."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from torch import nn

import uniflow_kernels


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m uniflow_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is installed, and what each operation would run on here")
    verifying = commands.add_parser("verify", help="a model before and after patch: numbers and times")
    verifying.add_argument(
        "factory", help="pkg.module:function, which returns the model with a tuple of inputs (and a dict of named ones)"
    )
    verifying.add_argument("--only", nargs="*", metavar="NAME", help="modules to look at, as in model.named_modules()")
    verifying.add_argument("--no-exact", action="store_true", help="without the comparison with a float64 copy")
    given = parser.parse_args(arguments)
    if given.command == "doctor":
        print(uniflow_kernels.doctor())
        return 0
    try:
        model, inputs, kwargs = _made(given.factory)
    except (ValueError, TypeError, ImportError) as error:
        parser.error(str(error))
    report = uniflow_kernels.verify(model, *inputs, only=given.only, exact=not given.no_exact, **kwargs)
    return 0 if report.ok else 1


def _made(path: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model and its inputs, from the factory at `path`."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"factory: expected pkg.module:function, got {path!r}")
    factory = getattr(importlib.import_module(module), name, None)
    if factory is None:
        raise ValueError(f"factory: {module} has no {name}")
    made = factory()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise TypeError(f"factory: {path} must return (model, inputs) or (model, inputs, named inputs)")
    model, inputs, *named = made
    if not isinstance(inputs, (tuple, list)) or not all(isinstance(by_name, dict) for by_name in named):
        raise TypeError(f"factory: {path} must return its inputs as a tuple, named ones as a dict")
    return model, tuple(inputs), named[0] if named else {}


if __name__ == "__main__":
    sys.exit(main())
