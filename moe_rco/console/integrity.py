"""What `verify` says."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from moe_rco.console.parts import stdout, table_of
from moe_rco.integrity import Verification

_SHOWN = 20
"""Differences of one check; --json has all."""


def show_verification(found: Sequence[Verification], console: Console | None = None) -> None:
    """A line for every check, and what differs."""
    console = console or stdout()
    for verification in found:
        console.print(verification.directory, style="bold", soft_wrap=True)
        table = table_of("", "", "")
        for check in verification.checks:
            table.add_row(
                check.name,
                "ok" if check.passed else "DIFFERS",
                check.about if check.passed else "",
                style=None if check.passed else "bold red",
            )
        console.print(table)
        for check in verification.checks:
            for difference in check.differences[:_SHOWN]:
                console.print(f"{check.name}: {difference}", soft_wrap=True)
            if len(check.differences) > _SHOWN:
                console.print(f"{check.name}: and {len(check.differences) - _SHOWN:,} more (--json has all)")
        console.print()
