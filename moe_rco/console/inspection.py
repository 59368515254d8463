"""What `inspect` shows."""

from __future__ import annotations

from rich.console import Console

from moe_rco.console.map import show_map
from moe_rco.console.parts import stdout, table_of
from moe_rco.heatmap import legend
from moe_rco.inspection import Inspection
from moe_rco.report import by_layer
from moe_rco.units import format_size


def show_inspect(found: Inspection, console: Console | None = None) -> None:
    """The table of `inspect`, and the map where experts differ."""
    console = console or stdout()
    layers = [(layer.layer, layer.options) for layer in found.layers]
    keys = legend([options for _, options in layers])
    console.print(
        f"{found.directory}: {found.family}, {len(found.layers)} MoE layers x {found.num_experts} experts "
        f"({found.hidden} x {found.intermediate}), {found.top_k} used per token",
        soft_wrap=True,
    )
    table = table_of("layer>", "kept>", *(f"{key.name}>" for key in keys), "bytes>")
    for layer in found.layers:
        counts = (str(layer.options.count(key.name)) for key in keys)
        table.add_row(str(layer.layer), str(layer.kept), *counts, f"{layer.bytes:,}")
    kept = sum(layer.kept for layer in found.layers)
    table.add_section()
    table.add_row(
        "all", str(kept), *(str(key.count) for key in keys), f"{found.expert_bytes:,}", style="bold"
    )
    console.print(table)
    bits = 8 * found.expert_bytes / found.expert_numel
    console.print(
        f"routed experts {format_size(found.expert_bytes)} ({bits:.2f} bits per original weight), "
        + (f"other groups {format_size(found.dense_bytes)}, " if found.dense else "")
        + f"everything else {format_size(found.other_bytes)}",
        soft_wrap=True,
    )
    if found.dense:
        others = table_of("layer>", "other groups", "bytes>")
        for layer, options, size in by_layer(found.dense):
            others.add_row(layer, options, f"{size:,}")
        console.print(others)
    if found.layout == "stock":
        console.print(
            f"Layout stock: experts are shown by their original ids; the {found.layers[0].kept} kept of each layer "
            "are numbered anew in the files, in the same order (plan.json lists the original ids).",
            soft_wrap=True,
        )
    if len(keys) > 1:
        console.print()
        show_map(layers, console)
