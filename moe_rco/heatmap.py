"""The layers x experts map as plain values: which symbol and which shade stands for which option."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moe_rco.errors import RecipeError
from moe_rco.types import Option

# Eight steps of viridis: ordered in lightness too, so that they read in grey and by colour-blind eyes.
VIRIDIS = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
STEPS = len(VIRIDIS)
_FIRST_LIGHT = 4


@dataclass(frozen=True)
class Key:
    """A line of the legend. `shade` runs from 0 (fewest bits that keep an expert) to 1; None is pruned."""

    name: str
    symbol: str
    shade: float | None
    count: int


def step_of(shade: float) -> int:
    """Which colour of `VIRIDIS` a shade has."""
    return round(shade * (STEPS - 1))


def ink(step: int) -> str:
    """The colour of text on it."""
    return "#000000" if step >= _FIRST_LIGHT else "#ffffff"


def bits(name: str) -> int:
    """Bits per weight of an option, also of formats that only occur in original models, such as f32."""
    try:
        return Option.parse(name).bits
    except RecipeError:
        digits = name.lstrip(string.ascii_letters)
        return int(digits) if digits.isdecimal() else 16


def _precision(name: str) -> tuple[int, int, str]:
    """Sorts options of as many bits by their group size, the finest last."""
    try:
        group = Option.parse(name).group_size
    except RecipeError:
        group = None
    return bits(name), -(group or 1 << 30), name


def legend(layers: Sequence[Sequence[str]]) -> tuple[Key, ...]:
    """The options that occur, fewest bits first; no two share a symbol.

    `layers` holds the name of each expert's option. Symbols are `.` for pruned, `F` for 16 bits or more, and
    the number of bits; of several options of as many bits (other group sizes) the rarer ones get letters.
    """
    counts = Counter(name for layer in layers for name in layer)
    names = sorted(counts, key=_precision)
    kept = [name for name in names if bits(name) > 0]
    spare = iter(string.ascii_lowercase)
    symbols: dict[str, str] = {}
    for name in sorted(names, key=lambda name: -counts[name]):
        symbol = "." if bits(name) == 0 else "F" if bits(name) >= 16 else str(bits(name))[-1]
        symbols[name] = next(spare) if symbol in symbols.values() else symbol
    shades = {name: index / max(1, len(kept) - 1) for index, name in enumerate(kept)}
    return tuple(Key(name, symbols[name], shades.get(name), counts[name]) for name in names)
