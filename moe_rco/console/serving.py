"""What `serve` says before vLLM takes over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from moe_rco.console.parts import bytes_, show, stdout, table_of
from moe_rco.units import format_size

if TYPE_CHECKING:  # it loads transformers, which takes seconds
    from moe_rco.serving import ServePlan


def show_serving(plan: ServePlan, console: Console | None = None) -> None:
    """What `serve` says before vLLM takes over."""
    console = console or stdout()
    each = f" on each of {plan.devices}" if plan.devices > 1 else ""
    table = table_of("", "")
    table.add_row("device", f"{plan.device}{each}, {format_size(plan.available)} usable")
    table.add_row("weights", f"{bytes_(plan.weights)}{each}")
    table.add_row("KV cache", f"{format_size(plan.kv_cache)} for one sequence of {plan.context:,} tokens")
    if plan.activations:
        table.add_row(
            "activations", f"about {format_size(plan.activations)}, with what CUDA takes for itself"
        )
    table.add_row("command", " ".join(("vllm serve", str(plan.directory), *plan.options)))
    for name, value in plan.environment.items():
        table.add_row("set", f"{name}={value}")
    show(console, f"Serve: {plan.directory}", table)
