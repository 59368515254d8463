"""A console whose text can be read."""

from __future__ import annotations

import io
import re

from rich.console import Console

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def screen(width: int = 100, color: bool = False) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        markup=False,
        highlight=False,
        emoji=False,
        force_terminal=color,
        color_system="truecolor" if color else None,
        legacy_windows=False,
    )


def shown(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()
