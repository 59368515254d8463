"""Sizes as people write them, and back."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
_MOST = 2**62
_QUARTERS = ("", ".25", ".5", ".75")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_size(value: object) -> int:
    """Bytes of `12582912`, `'12MiB'`, `'1.5 GiB'` or `'20GB'` (1000-based). Raises ValueError.

    A fraction of a byte is dropped, so that a size is never larger than what was written.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"a size is a whole number of bytes or text as in 12MiB or 20GiB, not {value!r}")
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.fullmatch(value.strip().replace("kB", "KB"))
        if match is None or match[2] not in _UNITS:
            raise ValueError(f"'{value}' is not a size; write bytes, or a unit as in 12MiB, 1.5GiB or 20GB")
        size = int(Fraction(match[1]) * _UNITS[match[2]])
    if size > _MOST:
        raise ValueError(f"a size of {len(str(size))} digits is larger than any disk")
    if size <= 0:
        raise ValueError(f"a size must be greater than zero, not {value}")
    return size


def format_size(size: int) -> str:
    """`12582912` as `12.00 MiB`; below 1 KiB the bytes themselves."""
    value, unit = float(abs(size)), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    sign = "-" if size < 0 else ""
    return f"{sign}{int(value)} B" if unit == "B" else f"{sign}{value:.2f} {unit}"


def exact_size(size: int) -> str:
    """`12582912` as `12MiB`, `20000000000` as `20GB`: nothing is rounded, and `parse_size` reads it back.

    In the largest unit of which it is a whole number of quarters.
    """
    for unit, scale in sorted(_UNITS.items(), key=lambda item: -item[1]):
        if size >= scale and 4 * size % scale == 0:
            return f"{size // scale}{_QUARTERS[4 * (size % scale) // scale]}{unit or 'B'}"
    return f"{size}B"


def format_duration(seconds: float) -> str:
    """`12.3 s`, `4 min 10 s`, `2 h 05 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
