"""Draws panels of points over bytes as SVG text. No library: matplotlib would be a large dependency for two panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from moe_rco.units import format_size

_WIDTH, _HEIGHT, _TOP = 460, 340, 60
_LEFT, _RIGHT, _BELOW = 70, 40, 60
_LINE, _FAINT, _INK = "#277f8e", "#b8b8b8", "#333333"


@dataclass(frozen=True)
class Mark:
    """A value at so many bytes, with its standard error and a label."""

    size: int
    value: float
    error: float = 0.0
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """`marks` are joined by a line; `faint` ones are not, and the axis makes no room for those far above; `base` is a level."""

    title: str
    marks: Sequence[Mark]
    faint: Sequence[Mark] = field(default_factory=tuple)
    base: float | None = None


def draw(title: str, *panels: Panel, notes: Sequence[str] = ()) -> str:
    """An SVG document of the panels side by side; the same values give the same text."""
    width, height = _WIDTH * len(panels), _TOP + _HEIGHT + 18 * len(notes) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(width / 2, 24, title, anchor="middle", size=15),
    ]
    for index, panel in enumerate(panels):
        lines += [f'<g transform="translate({index * _WIDTH},{_TOP})">', *_panel(panel), "</g>"]
    for index, note in enumerate(notes):
        lines.append(_text(20, _TOP + _HEIGHT + 14 + 18 * index, note))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(panel: Panel) -> list[str]:
    sizes = [mark.size for mark in panel.marks]
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
    sizes += [mark.size for mark in faint]
    xs = _ticks(min(sizes), max(sizes), _unit(max(sizes)))
    ys = _ticks(min(bottoms), max([*tops, *(mark.value for mark in faint)]), 1.0)

    def x(size: float) -> float:
        return _LEFT + (size - xs[0]) / (xs[-1] - xs[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return (ys[-1] - value) / (ys[-1] - ys[0]) * (_HEIGHT - _BELOW)

    left, right, bottom = x(xs[0]), x(xs[-1]), y(ys[0])
    lines = [_text(left, -12, panel.title, size=13)]
    for tick in ys:
        lines += [
            _segment(left, y(tick), right, y(tick), "#e8e8e8"),
            _text(left - 8, y(tick) + 4, f"{tick:.4g}", "end"),
        ]
    for tick in xs:
        lines += [
            _segment(x(tick), bottom, x(tick), bottom + 5, _INK),
            _text(x(tick), bottom + 20, format_size(round(tick)), "middle"),
        ]
    lines += [_segment(left, bottom, right, bottom, _INK), _segment(left, y(ys[-1]), left, bottom, _INK)]
    if panel.base is not None:
        lines.append(_segment(left, y(panel.base), right, y(panel.base), _INK, ' stroke-dasharray="5 4"'))
    lines += [_circle(x(mark.size), y(mark.value), 2.5, _FAINT) for mark in faint]
    ordered = sorted(panel.marks, key=lambda mark: mark.size)
    path = " ".join(f"{x(mark.size):.1f},{y(mark.value):.1f}" for mark in ordered)
    lines.append(f'<polyline points="{path}" fill="none" stroke="{_LINE}" stroke-width="1.5"/>')
    for mark in ordered:
        if mark.error:
            lines.append(
                _segment(
                    x(mark.size), y(mark.value - mark.error), x(mark.size), y(mark.value + mark.error), _LINE
                )
            )
        lines.append(_circle(x(mark.size), y(mark.value), 4, _LINE))
        lines.append(_text(x(mark.size) + 7, y(mark.value) - 7, mark.label))
    return lines


def _ticks(low: float, high: float, unit: float) -> list[float]:
    """Four to nine round values, in multiples of `unit`, that enclose two values and leave some room above."""
    span = max(high - low, 1e-3 * abs(high), 1e-12) * 1.1 / unit
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span / 5.5) * unit
    first = math.floor(low / step)
    return [(first + index) * step for index in range(math.ceil((low + span * unit) / step) - first + 1)]


def _unit(size: int) -> float:
    """The bytes of the unit in which `format_size` shows a size."""
    return 1024.0 ** min(4, max(0, math.floor(math.log(max(size, 1), 1024))))


def _segment(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{more}/>'


def _circle(x: float, y: float, radius: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{_INK}">{escape(text)}</text>'
