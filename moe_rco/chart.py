"""Draws charts as SVG text: values over bytes or steps, intervals, and the map of options. No library: matplotlib would be a
large dependency, and what is drawn here is part of a page, in its colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape

from moe_rco.heatmap import STEPS, legend, step_of
from moe_rco.units import format_size

_WIDTH, _HEIGHT, _TOP = 460, 340, 60
_LEFT, _RIGHT, _BELOW = 70, 40, 60
_LETTER = 7.5
"""What a letter takes at most, also in the larger type of a narrow screen."""
STYLE = (
    "text{fill:#333;font-family:sans-serif;font-size:12px}.grid{stroke:#e8e8e8}.axis{stroke:#333}"
    ".line{fill:none;stroke:#277f8e;stroke-width:1.5}.error{stroke:#277f8e}.dot{fill:#277f8e}.faint{fill:#b8b8b8}"
)
"""Of a picture that stands alone; a page has its own."""


@dataclass(frozen=True)
class Mark:
    """A value at `x`, with its standard error and a label."""

    x: float
    value: float
    error: float = 0.0
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """`marks` are joined by a line; `faint` ones are not, and the axis makes no room for those far above; `base` is a level.

    `x` are bytes, or else plain numbers. Without `dots` there is the line alone, without `joined` there are the dots alone.
    """

    title: str
    marks: Sequence[Mark]
    faint: Sequence[Mark] = field(default_factory=tuple)
    base: float | None = None
    of_bytes: bool = True
    dots: bool = True
    joined: bool = True


def draw(title: str, *panels: Panel, notes: Sequence[str] = ()) -> str:
    """An SVG document of the panels side by side; the same values give the same text."""
    width, height = _WIDTH * len(panels), _TOP + _HEIGHT + 18 * len(notes) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(width / 2, 24, title, "middle"),
    ]
    for index, panel in enumerate(panels):
        lines += [f'<g transform="translate({index * _WIDTH},{_TOP})">', *_panel(panel), "</g>"]
    for index, note in enumerate(notes):
        lines.append(_text(20, _TOP + _HEIGHT + 14 + 18 * index, note))
    return "\n".join([*lines, "</svg>"]) + "\n"


def figure(panel: Panel) -> str:
    """A panel as part of a page."""
    return "\n".join(
        [
            f'<svg viewBox="0 -30 {_WIDTH} {_HEIGHT + 20}" role="img" aria-label="{escape(panel.title)}">',
            *_panel(panel),
            "</svg>",
        ]
    )


@dataclass(frozen=True)
class Interval:
    """A value with its standard error, named in `title`; `kind` is the class of its dot, `dot` or `faint`."""

    value: float
    error: float
    title: str
    kind: str = "dot"


def intervals(rows: Sequence[tuple[str, Sequence[Interval]]], zero: bool = True) -> str:
    """Values beside each other, a line for each row, as part of a page; bars are two standard errors to either side."""
    height, right = 26, 20
    left = min(240.0, 24 + _LETTER * max((len(name) for name, _ in rows), default=0))
    room = int((left - 24) / _LETTER)
    rows = [(name, [interval for interval in row if math.isfinite(interval.value)]) for name, row in rows]
    values = [v for _, row in rows for i in row for v in (i.value - 2 * i.error, i.value + 2 * i.error)] or [
        0.0
    ]
    low, high = min([0.0, *values] if zero else values), max(values)
    slack = max(0.0, 0.1 * max(abs(low), abs(high)) - (high - low)) / 2  # equal values need no fine scale
    ticks = _ticks(low - slack, high + slack, 1.0)

    def x(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (_WIDTH - left - right)

    bottom = height * len(rows)
    label = ", ".join(name for name, _ in rows)
    lines = [f'<svg viewBox="0 -8 {_WIDTH} {bottom + 34}" role="img" aria-label="{escape(label)}">']
    for tick in ticks:
        lines += [
            _line("grid", x(tick), 0, x(tick), bottom),
            _text(x(tick), bottom + 16, f"{tick:.4g}", "middle"),
        ]
    for index, (name, row) in enumerate(rows):
        middle = height * (index + 0.5)
        short = name if len(name) <= room else f"{name[: room - 1]}…"
        lines.append(f"<g><title>{escape(name)}</title>{_text(left - 10, middle + 4, short, 'end')}</g>")
        for place, interval in enumerate(row):
            y = middle + 6 * (place - (len(row) - 1) / 2)
            lines += [
                f"<g><title>{escape(interval.title)}</title>",
                _line(
                    "error",
                    x(interval.value - 2 * interval.error),
                    y,
                    x(interval.value + 2 * interval.error),
                    y,
                ),
                _circle(interval.kind, x(interval.value), y, 4),
                "</g>",
            ]
    return "\n".join([*lines, "</svg>"])


def option_map(
    layers: Mapping[int, Sequence[str]], told: Callable[[int, int, str], str], cell: int = 14
) -> str:
    """The option of every expert as part of a page: a row for each layer, a cell for each expert.

    `told` gives what is shown of (layer, expert, option) where it is pointed at.
    """
    keys = {key.name: key for key in legend(list(layers.values()))}
    most = max(map(len, layers.values()))
    left, width, height = 34, 34 + cell * most, cell * len(layers) + 20
    every = 1 if len(layers) <= 24 else 4  # layers and experts that are numbered
    lines = [
        f'<svg class="map" viewBox="0 0 {width} {height}" role="img" aria-label="the option of every expert" '
        f'style="min-width:{min(width, 900)}px;max-width:{2 * width}px">'
    ]
    for row, (layer, options) in enumerate(layers.items()):
        y = cell * row
        if row % every == 0:
            lines.append(_text(left - 6, y + cell - 3, str(layer), "end"))
        for expert, name in enumerate(options):
            key = keys[name]
            kind = "pruned" if key.shade is None else f"s{step_of(key.shade)}"
            lines.append(
                f'<g class="{kind}"><title>{escape(told(layer, expert, name))}</title><rect x="{left + cell * expert}" '
                f'y="{y}" width="{cell - 1}" height="{cell - 1}"/>'
                + (
                    f'<text x="{left + cell * expert + (cell - 1) / 2:.1f}" y="{y + cell - 4}" '
                    f'text-anchor="middle">{escape(key.symbol)}</text>'
                    if most <= STEPS * 8
                    else ""
                )
                + "</g>"
            )
    for expert in range(0, most, 8):
        lines.append(_text(left + cell * expert, height - 6, str(expert)))
    return "\n".join([*lines, "</svg>"])


def _panel(panel: Panel) -> list[str]:
    panel = replace(panel, marks=[mark for mark in panel.marks if math.isfinite(mark.value)])
    if not panel.marks:
        return [_text(_LEFT, -12, f"{panel.title}: no finite values")]
    places = [mark.x for mark in panel.marks]
    tops = [mark.value + mark.error for mark in panel.marks]
    bottoms = [mark.value - mark.error for mark in panel.marks]
    if panel.base is not None:
        tops.append(panel.base)
        bottoms.append(panel.base)
    else:
        bottoms.append(0.0)
    # Candidates may be worse by orders of magnitude, and would press the curve itself flat.
    ceiling = max(tops) + 0.75 * (max(tops) - min(bottoms))
    faint = [mark for mark in panel.faint if mark.value <= ceiling]
    places += [mark.x for mark in faint]
    xs = _ticks(min(places), max(places), _unit(max(places)) if panel.of_bytes else 1.0)
    ys = _ticks(min(bottoms), max([*tops, *(mark.value for mark in faint)]), 1.0)

    def x(place: float) -> float:
        return _LEFT + (place - xs[0]) / (xs[-1] - xs[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return (ys[-1] - value) / (ys[-1] - ys[0]) * (_HEIGHT - _BELOW)

    left, right, bottom = x(xs[0]), x(xs[-1]), y(ys[0])
    lines = [_text(left, -12, panel.title)]
    for tick in ys:
        lines += [
            _line("grid", left, y(tick), right, y(tick)),
            _text(left - 8, y(tick) + 4, f"{tick:.4g}", "end"),
        ]
    for tick in xs:
        text = format_size(round(tick)) if panel.of_bytes else f"{tick:g}"
        lines += [
            _line("axis", x(tick), bottom, x(tick), bottom + 5),
            _text(x(tick), bottom + 20, text, "middle"),
        ]
    lines += [_line("axis", left, bottom, right, bottom), _line("axis", left, y(ys[-1]), left, bottom)]
    if panel.base is not None:
        lines.append(_line("axis", left, y(panel.base), right, y(panel.base), ' stroke-dasharray="5 4"'))
    lines += [_circle("faint", x(mark.x), y(mark.value), 2.5) for mark in faint]
    ordered = sorted(panel.marks, key=lambda mark: mark.x)
    if panel.joined:
        path = " ".join(f"{x(mark.x):.1f},{y(mark.value):.1f}" for mark in ordered)
        lines.append(f'<polyline points="{path}" class="line"/>')
    for mark in ordered if panel.dots else ():
        if mark.error:
            ends = y(mark.value - mark.error), y(mark.value + mark.error)
            lines.append(_line("error", x(mark.x), ends[0], x(mark.x), ends[1]))
        lines.append(_circle("dot", x(mark.x), y(mark.value), 4))
        lines.append(_text(x(mark.x) + 7, y(mark.value) - 7, mark.label))
    return lines


def _ticks(low: float, high: float, unit: float) -> list[float]:
    """Four to nine round values, in multiples of `unit`, that enclose two values and leave some room above."""
    span = max(high - low, 1e-3 * abs(high), 1e-12) * 1.1 / unit
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span / 5.5) * unit
    first = math.floor(low / step)
    return [(first + index) * step for index in range(math.ceil((low + span * unit) / step) - first + 1)]


def _unit(size: float) -> float:
    """The bytes of the unit in which `format_size` shows a size."""
    return 1024.0 ** min(4, max(0, math.floor(math.log(max(size, 1), 1024))))


def _line(kind: str, x1: float, y1: float, x2: float, y2: float, more: str = "") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{more}/>'


def _circle(kind: str, x: float, y: float, radius: float) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
