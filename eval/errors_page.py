"""Writes docs/errors.md from moe_rco/errors.py.

python -m eval.errors_page
"""

from __future__ import annotations

import inspect
from pathlib import Path

from moe_rco.errors import MoeRcoError, catalogue

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"
HEAD = """\
# Errors

The command line prints `error: ` and one line: what is wrong, where, and what to do. It exits with

| code | |
|--:|:--|
| 0 | done |
| 1 | a fault of ours, or a lost process of several; nothing that looks finished is left |
| 2 | the input cannot be used as given: repair it and run the same command again |
| 130 | interrupted (Ctrl-C): the same command goes on where it was |
| 143 | asked to end (SIGTERM): the same |

`--debug`, or `MOE_RCO_DEBUG=1`, shows the traceback of an internal error. In Python the same errors are raised as the classes of
`moe_rco.errors`. Made by `python -m eval.errors_page` from [moe_rco/errors.py](../moe_rco/errors.py).

| error | exit code | cause | remedy |
|:--|--:|:--|:--|
"""


def page() -> str:
    """The page in Markdown."""
    rows = [
        f"| {kind.__name__} | {kind.exit_code} | {_cause(kind)} | {kind.remedy} |" for kind in catalogue()
    ]
    return HEAD + "\n".join(rows) + "\n"


def _cause(kind: type[MoeRcoError]) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
