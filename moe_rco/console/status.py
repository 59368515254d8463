"""What `status` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from moe_rco.console.parts import bytes_, stdout, table_of, uncertainty

if TYPE_CHECKING:  # it loads numba, which only `status` needs
    from moe_rco.progress import Status


def show_status(status: Status, console: Console | None = None) -> None:
    """What `status` says: the state, what is kept of every stage, and the finished output."""
    console = console or stdout()
    console.print(f"{status.output}: {status.state}", style="bold", soft_wrap=True)
    if status.process is not None:
        p, verb = status.process, "is" if status.state == "running" else "was"
        console.print(f"It {verb} process {p.pid} on {p.host}, started {p.started}.", soft_wrap=True)
    if status.stages:
        console.print()
        table = table_of("stage", "done>", "of>")
        for stage in status.stages:
            table.add_row(stage.name, f"{stage.done:,}", f"{stage.total:,}" if stage.total else "-")
        console.print(table)
    if status.state == "interrupted":
        console.print("\nThe same command goes on from here.")
    if status.results and status.state != "finished":
        console.print("\nAn earlier run's output is there until this one has finished:")
    for r in status.results:
        console.print()
        table = table_of("", "")
        table.add_row("model", r.model)
        table.add_row("budget", f"{bytes_(r.budget_bytes)} ({r.budget})")
        table.add_row("in the budget", bytes_(r.expert_bytes))
        table.add_row("whole model", bytes_(r.total_bytes))
        table.add_row("KL, held-out text", f"{r.kl:.5f} ± {uncertainty(r.kl_stderr)} nats per token")
        console.print(table)
