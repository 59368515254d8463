"""The option of every expert, one cell each."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.style import Style
from rich.text import Text

from moe_rco.heatmap import VIRIDIS, Key, ink, legend, step_of

Layers = Sequence[tuple[int, Sequence[str]]]


def show_map(layers: Layers, console: Console) -> None:
    """One cell per expert, one row per layer (several where the window is narrow), and the legend."""
    keys = {key.name: key for key in legend([options for _, options in layers])}
    most = max(len(options) for _, options in layers)
    room = max(8, console.width - 8)
    # Two columns a cell are nearer to a square; the characters alone tell the options apart without colour.
    wide = 2 if 2 * most <= room else 1
    per_row = min(most, room // wide)
    console.print("Options by layer (rows) and expert (columns)", style="bold")
    for layer, options in layers:
        for start in range(0, len(options), per_row):
            line = Text(f"{layer:>5}  " if start == 0 else " " * 7)
            for name in options[start : start + per_row]:
                line.append(keys[name].symbol.center(wide), _style(keys[name]))
            console.print(line, no_wrap=True, crop=False)
    line = Text()
    for key in keys.values():
        entry = Text.assemble((f" {key.symbol} ", _style(key)), f" {key.name} ({key.count})   ")
        if line and len(line) + len(entry) > room:
            console.print(Text(" " * 7) + line)
            line = Text()
        line.append_text(entry)
    console.print(Text(" " * 7) + line)
    console.print()


def _style(key: Key) -> Style:
    if key.shade is None:
        return Style(color="bright_black")
    step = step_of(key.shade)
    return Style(color=ink(step), bgcolor=VIRIDIS[step])
