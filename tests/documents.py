"""Blocks of code in Markdown pages, for tests that run them."""

from __future__ import annotations

import re
from collections.abc import Iterator


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> Iterator[str]:
    """The lines of shell in a page, without comments."""
    for block in blocks(text, "bash"):
        for line in block.splitlines():
            if command := line.split("  #")[0].strip():
                yield command
