"""Checkpoints from the Hugging Face Hub, by a name that the user gives, and to it; the rest of the package is offline.

What is fetched is configuration and weights, never code, and it is read as any other folder is. Where it is kept
(HF_HOME), and that the network is left alone (HF_HUB_OFFLINE=1), is said as everywhere with huggingface_hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uniflow.reading import printable, shown

_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_DESCRIPTION = ["*.json", "*.txt", "*.model"]  # those of a text tokenizer too
_WEIGHTS = (["*.safetensors"], ["*.bin"])  # the latter only where the former are not there
_LONGEST_REASON = 300


def hub_package() -> Any:
    """The huggingface_hub package, imported when it is needed.

    Raises:
        ImportError: if it is not installed, naming the extra.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError("the Hub needs huggingface_hub: pip install 'uniflow-kernels[hub]'") from None
    return huggingface_hub


def local_folder(
    source: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a checkpoint, which is fetched from the Hub if it is named as one there.

    Args:
        source: a folder; or OWNER/NAME or OWNER/NAME@REVISION, where there is neither such a folder nor one called
            OWNER: a path with a slip in it is no name.
        revision: branch, tag or commit on the Hub, if the name does not say it.
        cache_dir: where it is kept; huggingface_hub's own place if not given.
        local_files_only: whether to take only what is kept there already.

    Returns:
        The folder, or `source` as it is where it is no name: whoever reads it says what is wrong.

    Raises:
        FileNotFoundError: if it is not there, or cannot be reached, with the reason.
        ImportError: if huggingface_hub is not installed.
        ValueError: if a revision is given twice, or of a folder.
    """
    path, named = Path(source), _NAME.fullmatch(str(source))
    if named is None or path.exists() or path.parent.exists():
        if revision is not None:
            raise ValueError(f"revision: expected it of a repository on the Hub, OWNER/NAME, got the folder {path}")
        return path
    if named["revision"] is not None and revision is not None:
        raise ValueError(f"revision: expected it once, got {revision!r} and {named['revision']!r} in the name")
    hub = hub_package()
    how = {"cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        for patterns in _WEIGHTS:
            folder = Path(
                hub.snapshot_download(
                    named["name"],
                    revision=revision or named["revision"],
                    allow_patterns=[*_DESCRIPTION, *patterns],
                    **how,
                )
            )
            if any(folder.glob(patterns[0])):
                break
    except Exception as error:  # of the network, the server, the disk, in whatever class
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        raise FileNotFoundError(
            f"no such folder: {path}; and on the Hub {printable(str(source))} cannot be had: {reason}"
        ) from None
    return folder


def push(
    folder: Path, repository: str, private: bool | None, revision: str | None, message: str | None, token: str | None
) -> str:
    """Upload a folder to a repository, which is made if it is not there; returns the address of the commit.

    Raises:
        ImportError: if huggingface_hub is not installed.
        ValueError: if the name is not OWNER/NAME.
    """
    named = _NAME.fullmatch(repository)
    if named is None or named["revision"] is not None:
        raise ValueError(f"repository: expected OWNER/NAME, got {shown(repository)}")
    api = hub_package().HfApi(token=token)
    api.create_repo(repository, private=private, exist_ok=True)
    done = api.upload_folder(
        repo_id=repository, folder_path=folder, revision=revision, commit_message=message or "Upload a UniFlow"
    )
    return str(done.commit_url)


def model_card(
    repository: str,
    config: Mapping[str, Any],
    sizes: Mapping[str, int],
    licence: str | None,
    scores: Mapping[str, float] | None,
) -> str:
    """README.md for a repository: what the model is, how it is read, its configuration, sizes and scores.

    Args:
        repository: OWNER/NAME.
        config: the contents of config.json.
        sizes: parameters by part of the model.
        licence: of the weights, an identifier as the Hub has them; without one nothing is said of it.
        scores: by name, as `uniflow evaluate --json` prints them.
    """
    metadata = {"library_name": "uniflow-kernels", "tags": ["visual-tokenizer", "flow-matching"]}
    if licence is not None:
        metadata["license"] = licence
    # what YAML takes for the same as JSON does
    head = "\n".join(f"{name}: {json.dumps(value)}" for name, value in metadata.items())
    said = {name: value for name, value in config.items() if isinstance(value, (int, float, str))}
    parts = [
        f"---\n{head}\n---",
        f"# {repository.rpartition('/')[2]}",
        "A UniFlow visual tokenizer: pictures to tokens that are understood and drawn from, and back.",
        "```python\nfrom uniflow import UniFlow, normalize\n\n"
        f'model = UniFlow.from_pretrained("{repository}")  # pip install "uniflow-kernels[hub]"\n'
        "latents = model.encode(normalize(pictures))  # uint8 [B, 3, H, W]\n"
        "images = model.decode(latents, seed=0)\n```",
        "## Sizes",
        _table(("part", "parameters"), {**sizes, "all": sum(sizes.values())}),
        "## Configuration",
        _table(("field", "value"), said),
    ]
    if scores:
        parts += ["## Scores", _table(("score", "value"), scores)]
    if licence is not None:
        parts += ["## Licence", licence]
    return "\n\n".join(parts) + "\n"


def _table(headings: tuple[str, str], rows: Mapping[str, object]) -> str:
    lines = [headings, ("---", "---"), *((name, _cell(value)) for name, value in rows.items())]
    return "\n".join(f"| {name} | {value} |" for name, value in lines)


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("|", "\\|").replace("\n", " ")
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
