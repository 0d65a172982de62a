"""For mkdocs: docs/reference.md gets a section for each public name, as the packages list them."""

import importlib

PACKAGES = ("uniflow", "uniflow.unifluid", "uniflow.export", "uniflow_kernels")


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """The page's text; that of the reference with what mkdocstrings makes its sections of."""
    if page.file.src_uri != "reference.md":
        return markdown
    lines = [markdown]
    for package in map(importlib.import_module, PACKAGES):
        lines.append(f"## {package.__name__}")
        lines += [f"::: {getattr(package, name).__module__}.{name}" for name in sorted(package.__all__, key=str.lower)]
    return "\n\n".join(lines) + "\n"
