"""The layers x experts map as plain values: which symbol and which shade stands for which option."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moe_rco.errors import RecipeError
from moe_rco.types import Option


@dataclass(frozen=True)
class Key:
    """A line of the legend. `shade` runs from 0 (fewest bits that keep an expert) to 1; None is pruned."""

    name: str
    symbol: str
    shade: float | None
    count: int


def bits(name: str) -> int:
    """Bits per weight of an option, also of formats that only occur in original models, such as f32."""
    try:
        return Option.parse(name).bits
    except RecipeError:
        digits = name.lstrip(string.ascii_letters)
        return int(digits) if digits.isdecimal() else 16


def legend(layers: Sequence[Sequence[str]]) -> tuple[Key, ...]:
    """The options that occur, fewest bits first; no two share a symbol.

    `layers` holds the name of each expert's option. Symbols are `.` for pruned, `F` for 16 bits or more, and
    the number of bits; a second option of as many bits (another group size) gets a letter.
    """
    counts = Counter(name for layer in layers for name in layer)
    names = sorted(counts, key=lambda name: (bits(name), name))
    kept = [name for name in names if bits(name) > 0]
    spare = iter(letter for letter in string.ascii_lowercase)
    used: set[str] = set()
    keys: list[Key] = []
    for name in names:
        symbol = "." if bits(name) == 0 else "F" if bits(name) >= 16 else str(bits(name))[-1]
        symbol = next(spare) if symbol in used else symbol
        used.add(symbol)
        shade = kept.index(name) / max(1, len(kept) - 1) if name in kept else None
        keys.append(Key(name, symbol, shade, counts[name]))
    return tuple(keys)
