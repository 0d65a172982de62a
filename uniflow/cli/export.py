"""`uniflow export`: encoding and decoding, or the encoder alone, as files for places where this package is not."""

from __future__ import annotations

from pathlib import Path

from uniflow.checkpoint import WHOLE
from uniflow.cli.files import check_folder, check_outputs
from uniflow.cli.inputs import InputError, Named, explained, load_model
from uniflow.cli.printing import say
from uniflow.export import export_programs, write_encoder, write_onnx, write_programs
from uniflow.export.encoders import KINDS
from uniflow.preprocessor import PREPROCESSOR, write_preprocessor

_WRITERS = {"onnx": write_onnx, "pt2": write_programs}


def export(
    checkpoint: Named, out: Path, to: str, steps: int | None, original: Path | None, dtype: str, force: bool
) -> None:
    """Write encoder and decoder, or the encoder alone, and what is to be done to pictures before, to `out`."""
    if to not in (*_WRITERS, *KINDS):
        raise InputError(f"--to: expected one of {', '.join((*_WRITERS, *KINDS))}, got {to!r}")
    check_folder(out)
    if to in KINDS:
        paths = _encoder(checkpoint, out, to, steps, original, dtype, force)
    else:
        if original is not None:
            raise InputError(f"--original: expected with --to transformers alone, got it with {to}")
        check_outputs([out / f"encoder.{to}", out / f"decoder.{to}", out / PREPROCESSOR], force)
        model = load_model(checkpoint, "cpu", dtype)
        with explained():
            paths = _WRITERS[to](export_programs(model, steps=steps or 1), out)
        paths.append(write_preprocessor(out, model.config.image_size))
    say(f"written to {out}: {', '.join(path.name for path in paths)}")


def _encoder(
    checkpoint: Named, out: Path, to: str, steps: int | None, original: Path | None, dtype: str, force: bool
) -> list[Path]:
    if steps is not None:
        raise InputError(f"--steps: expected with a decoder, and --to {to} writes none")
    for name, folder in (("--checkpoint", checkpoint.folder), ("--original", original)):
        if folder is not None and folder.exists() and folder.resolve() == out.resolve():
            raise InputError(f"--out: expected another folder than that of {name}, got {out}")
    check_outputs([out / "config.json", out / WHOLE, out / PREPROCESSOR], force)
    model = load_model(checkpoint, "cpu", dtype)
    with explained():
        return write_encoder(model, out, to, original)
