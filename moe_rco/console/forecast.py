"""What a run will take: the dry run, and the line before the work begins."""

from __future__ import annotations

from rich.console import Console

from moe_rco.console.parts import bytes_, share, show, stderr, stdout, table_of
from moe_rco.report import Preflight
from moe_rco.units import format_duration, format_size

_LAYOUTS = {
    "mixed": "mixed: every expert has its own precision",
    "stock": "stock: equally many experts in every layer, one precision per layer",
}


def show_preflight(preflight: Preflight, console: Console | None = None) -> None:
    """The table of `--dry-run`."""
    console = console or stdout()
    p = preflight
    table = table_of("", "")
    table.add_row(
        "family", f"{p.family}: {p.layers} MoE layers x {p.experts_per_layer} experts, {p.top_k} per token"
    )
    table.add_row("layout", _LAYOUTS[p.layout])
    for option in p.options:
        table.add_row("option", f"{option.name}: {format_size(option.bytes_per_expert)} per expert")
    table.add_row("model now", bytes_(p.experts_before + p.other_bytes))
    covered = ", ".join(kind.replace("_", " ") for kind in p.groups)
    if covered != "experts":
        table.add_row("groups", covered)
    table.add_row("experts now" if covered == "experts" else "groups now", bytes_(p.experts_before))
    for budget in p.budgets:
        of_now = share(budget.bytes, p.experts_before)
        table.add_row("budget", f"{bytes_(budget.bytes)}, {of_now} of now ({budget.text})")
        if budget.room is not None:
            table.add_row("", budget.rooms)
            table.add_row("", f"served with {budget.room.serve}")
    table.add_row("possible", f"{bytes_(p.smallest)} to {bytes_(p.largest)}")
    table.add_row(
        "calibration", f"{p.sequences:,} sequences ({p.holdout_sequences:,} held out), {p.tokens:,} tokens"
    )
    for part in p.text:
        counted = "" if part.counted == 1 else f", {part.counted:.0%} of it the assistant's, which counts"
        tokens = part.sequences * (p.tokens // p.sequences)
        table.add_row("", f"{part.name}: {part.sequences:,} sequences, {tokens:,} tokens{counted}")
    races = f", then races for as long as {p.search_races} steps" if p.search_races else ""
    table.add_row("search", f"{p.search_method}: {p.search_steps} steps of {p.search_samples} samples{races}")
    held = "weights streamed from disk" if p.streamed else "all weights resident"
    on_device = f", {format_size(p.device_memory)} on the device" if p.device_memory else ""
    table.add_row("memory", f"about {format_size(p.memory)}{on_device} ({held})")
    table.add_row("disk", f"{format_size(p.disk_needed)} needed, {format_size(p.disk_free)} free")
    if p.stages:
        table.add_row("time", f"about {format_duration(sum(p.stages.values()))}")
    for name, seconds in p.stages.items():
        table.add_row("", f"{name}: {format_duration(seconds)}")
    table.add_row("output", p.output)
    show(console, f"Dry run: {p.model}", table)
    _warn(p, console)
    console.print("Nothing was written.")


def show_forecast(preflight: Preflight, console: Console | None = None) -> None:
    """What a run says of itself before the long work begins."""
    console = console or stderr()
    p = preflight
    on_device = f" and {format_size(p.device_memory)} on the device" if p.device_memory else ""
    held = "streamed from disk" if p.streamed else "all in memory"
    line = f"Takes about {format_size(p.memory)} of memory{on_device} (weights {held}), {format_size(p.disk_needed)} of disk"
    if p.stages:
        longest = max(p.stages, key=lambda name: p.stages[name])
        line += f", and {format_duration(sum(p.stages.values()))}, most for: {longest}"
    console.print(f"{line}.", soft_wrap=True)
    _warn(p, console)


def _warn(preflight: Preflight, console: Console) -> None:
    for warning in preflight.warnings:
        console.print(f"note: {warning}", style="yellow", soft_wrap=True)
