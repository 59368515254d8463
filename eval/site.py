"""mkdocs' hooks: the README is the site's first page, and the measurements in eval/results are pages of it.

Links that stand in the repository lead to the same pages on the site; those to its code become plain text. Formulas are made
MathML, which browsers show without a script.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PLACES = {"docs/": "", "eval/results/": "results/", "moe_rco/demo/text/": "text/"}
"""Which directory of the repository is which of the site's."""
ALONE = {"README.md": "index.md", "recipes/recipe.schema.json": "recipe.schema.json"}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\]\([^)]*\))*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add what stands outside of docs/."""
    shown = {path: ROOT / path for path in ALONE}
    for folder in list(PLACES)[1:]:
        shown |= {
            f"{folder}{path.name}": path
            for path in sorted((ROOT / folder).iterdir())
            if path.suffix in (".md", ".svg", ".png")
        }
    for path, source in shown.items():
        files.append(File.generated(config, _place(path) or path, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Turn links within the repository into the site's."""
    here = _source(page.file.src_uri)

    def turned(match: re.Match[str]) -> str:
        mark, text, link, anchor = match[1], match[2], match[3], match[4] or ""
        text = _LINK.sub(turned, text)
        if "://" in link:
            return f"{mark}[{text}]({link}{anchor})"
        place = _place(posixpath.normpath(posixpath.join(posixpath.dirname(here), link)))
        if place is None or files.get_file_from_path(place) is None:
            return text
        there = posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")
        return f"{mark}[{text}]({there}{anchor})"

    # Blocks of code stay as they are.
    parts = re.split(r"(```.*?```)", markdown, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else _LINK.sub(turned, part) for part in parts)


def on_page_content(content: str, page: Page, config: Any, files: Files) -> str:
    """Turn arithmatex's formulas into MathML."""

    def formula(match: re.Match[str]) -> str:
        return convert(html.unescape(match[2]), display="inline" if match[1] == "(" else "block")

    found = re.sub(r"\\([(\[])(.*?)\\[)\]](?=</(?:span|div)>)", formula, content, flags=re.DOTALL)
    return found.replace('class="arithmatex"', "")  # for which the theme makes room to scroll


def _place(path: str) -> str | None:
    """Where a file of the repository is on the site."""
    if path in ALONE:
        return ALONE[path]
    return next((new + path.removeprefix(old) for old, new in PLACES.items() if path.startswith(old)), None)


def _source(place: str) -> str:
    """The file of the repository that a page of the site is made from."""
    alone = [path for path, new in ALONE.items() if new == place]
    return (
        alone
        + [old + place.removeprefix(new) for old, new in reversed(PLACES.items()) if place.startswith(new)]
    )[0]
