"""For mkdocs: README.md is the first page, and docs/reference.md has a section for each public name."""

import importlib
import re
from pathlib import Path
from typing import Any

PACKAGES = (
    "uniflow",
    "uniflow.unifluid",
    "uniflow.generation",
    "uniflow.evaluation",
    "uniflow.export",
    "uniflow_kernels",
)


def on_files(files: Any, config: Any) -> Any:
    """With README.md, whose links to docs/ are those of its neighbours there; others are names of files."""
    from mkdocs.structure.files import File

    text = Path(config.config_file_path).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"\[([^]]*)\]\((?!docs/|\w+:)([^)]+)\)", r"`\2`", text)
    text = re.sub(r"\]\(docs/", "](", text)
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """The page's text; that of the reference with what mkdocstrings makes its sections of."""
    if page.file.src_uri != "reference.md":
        return markdown
    lines = [markdown]
    for package in map(importlib.import_module, PACKAGES):
        lines.append(f"## {package.__name__}")
        lines += [f"::: {getattr(package, name).__module__}.{name}" for name in sorted(package.__all__, key=str.lower)]
    return "\n\n".join(lines) + "\n"
