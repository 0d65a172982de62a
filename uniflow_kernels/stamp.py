"""Which sources a compiled part is of: setup.py compiles the stamp in, a checkout compares it with what csrc/ holds.

Without torch, since setup.py reads this.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import warnings
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"


def stamp(name: str) -> str:
    """Of what a compiled part, "_cpu" or "_cuda", is made of now: 16 hexadecimal digits behind an s."""
    own = CSRC / "cpu" if name == "_cpu" else CSRC
    files = {path for folder in (CSRC, own) for path in folder.iterdir() if path.suffix in (".h", ".cuh")}
    files |= {path for path in own.iterdir() if path.suffix in (".cpp", ".cu")}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"s{digest.hexdigest()[:16]}"


def is_current(name: str) -> bool:
    """Whether a compiled part is there; where csrc/ lies beside the package, built from what it holds. Else warns."""
    full = f"uniflow_kernels.{name}"
    if importlib.util.find_spec(full) is None:
        return False
    if not (CSRC / "cpu" / "module.cpp").is_file():  # an installation: nothing there changes by itself
        return True
    if getattr(importlib.import_module(full), "SOURCES", None) == stamp(name):
        return True
    how = "python setup.py build_ext --inplace"
    warnings.warn(
        f"{full} is not used: it was built from other sources than csrc/ holds. Build it: {how}", stacklevel=2
    )
    return False
