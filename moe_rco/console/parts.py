"""What all tables share."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from moe_rco.units import format_size


def stdout() -> Console:
    """Results go here. Brackets in paths are text, not markup."""
    return Console(markup=False, highlight=False, emoji=False)


def stderr() -> Console:
    """Progress goes here, so that results can be piped."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def table_of(*columns: str) -> Table:
    """A plain table; a column whose name ends in `>` is set right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(columns))
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left")
    return table


def show(console: Console, title: str, table: Table) -> None:
    console.print(title, style="bold")
    console.print(table)
    console.print()


def bytes_(size: int) -> str:
    return f"{format_size(size)} ({size:,} bytes)"


def share(size: int, whole: int) -> str:
    return f"{size / whole:.1%}" if whole else "-"


def uncertainty(stderr: float | None) -> str:
    """A standard error of a loss in nats, if it is known."""
    return "-" if stderr is None else f"{stderr:.5f}"
