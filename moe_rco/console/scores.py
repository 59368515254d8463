"""The table that `eval` ends with."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from moe_rco.console.parts import stdout
from moe_rco.report import SIGNIFICANT, TaskScore
from moe_rco.scoring import Outcome


def show_scores(outcome: Outcome, console: Console | None = None) -> None:
    """Original, this model, the difference with standard errors, and whether it is more than chance.

    Tasks that are counted in a group shown here are left out; the report has them.
    """
    console = console or stdout()
    first = outcome.scores[0]
    limit = f", at most {first.limit} items per task" if first.limit is not None else ""
    console.print(f"{outcome.model} ({first.backend}, {first.dtype}{limit})\n", style="bold", soft_wrap=True)
    compared = any(row.baseline for row in outcome.scores)
    # Names give way when the window is narrow; figures never do.
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    headings = ("original", "this model", "difference", "p", "") if compared else ("score", "items")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    shown = [row for row in outcome.scores if row.group is None]
    for metric in dict.fromkeys(_metric(row) for row in shown):
        table.add_row(metric, style="bold")
        for row in (row for row in shown if _metric(row) == metric):
            table.add_row(f"  {row.task}", *(_compared(row) if compared else _alone(row)))
    console.print(table)
    console.print()
    if compared:
        _explain(outcome, console)
    console.print(f"lm-eval's own output: {outcome.files}", soft_wrap=True)
    if outcome.report is not None:
        console.print(f"Scores written to {outcome.report}", soft_wrap=True)


def _alone(row: TaskScore) -> tuple[str, ...]:
    return _with_error(row.score, row.stderr), f"{row.items:,}"


def _compared(row: TaskScore) -> tuple[str, ...]:
    score, base = _with_error(row.score, row.stderr), row.baseline
    if base is None:
        return "-", score, "-", "-", ""
    p = "-" if base.p is None else "<.001" if base.p < 0.001 else f"{base.p:.3f}"
    difference = _with_error(base.difference, base.difference_stderr, sign="+", digits=4)
    return _with_error(base.score, base.stderr), score, difference, p, _verdict(row)


def _verdict(row: TaskScore) -> str:
    base = row.baseline
    if base is None or base.p is None or base.p >= SIGNIFICANT:
        return ""
    if row.higher_is_better is None:
        return "differs"
    return "better" if (base.difference > 0) == row.higher_is_better else "worse"


def _metric(row: TaskScore) -> str:
    better = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
    return row.metric + (f" ({row.filter})" if row.filter != "none" else "") + better


def _with_error(value: float, error: float | None, sign: str = "", digits: int = 3) -> str:
    """Fewer decimals for large perplexities."""
    digits = digits if abs(value) < 100 else 1
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ±{error:.{digits}f}")


def _explain(outcome: Outcome, console: Console) -> None:
    shown = [row.baseline for row in outcome.scores if row.group is None and row.baseline]
    tests = sorted({base.test for base in shown if base.test})
    console.print(
        f"original: {outcome.baseline}. ±: standard error. p: two-sided, both models on the same items "
        f"({'; '.join(tests) or 'no test fits these metrics'}). "
        f"A word after p: p < {SIGNIFICANT}, each row by itself.",
    )
