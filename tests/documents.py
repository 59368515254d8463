"""Blocks of code in Markdown pages, for tests that run them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def fences(text: str) -> list[tuple[str, str]]:
    """Every block of a page: what stands behind its opening marks, and its text."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> Iterator[str]:
    """The lines of shell in a page, without comments."""
    for block in blocks(text, "bash"):
        for line in block.splitlines():
            if command := line.split("  #")[0].strip():
                yield command
