"""What became of faults, by kind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """`tried` faults of one kind, and what went wrong with those that were not handled as they should be."""

    kind: str
    tried: int
    failed: list[str]


def table(rows: Iterable[Row]) -> str:
    """Markdown, with the sums in the last line."""
    rows = list(rows)
    everything = Row("all", sum(row.tried for row in rows), [text for row in rows for text in row.failed])
    lines = ["| kind | cases | handled | failed |", "|---|---:|---:|---:|"]
    for row in (*rows, everything):
        lines.append(f"| {row.kind} | {row.tried} | {row.tried - len(row.failed)} | {len(row.failed)} |")
    return "\n".join(lines)
