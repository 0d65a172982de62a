"""`uniflow export`: encoding and decoding as files for places where this package is not."""

from __future__ import annotations

from pathlib import Path

from uniflow.cli.files import check_folder, check_outputs
from uniflow.cli.inputs import InputError, Named, explained, load_model
from uniflow.cli.printing import say
from uniflow.export import export_programs, write_onnx, write_programs
from uniflow.preprocessor import PREPROCESSOR, write_preprocessor

_WRITERS = {"onnx": write_onnx, "pt2": write_programs}


def export(checkpoint: Named, out: Path, kind: str, steps: int, dtype: str, force: bool) -> None:
    """Write encoder and decoder, and what is to be done to pictures before, to `out`."""
    if kind not in _WRITERS:
        raise InputError(f"--format: expected {' or '.join(_WRITERS)}, got {kind!r}")
    check_folder(out)
    check_outputs([out / f"encoder.{kind}", out / f"decoder.{kind}", out / PREPROCESSOR], force)
    model = load_model(checkpoint, "cpu", dtype)
    with explained():
        paths = _WRITERS[kind](export_programs(model, steps=steps), out)
    paths.append(write_preprocessor(out, model.config.image_size))
    say(f"written to {out}: {', '.join(path.name for path in paths)}")
