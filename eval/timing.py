"""Ratios of times measured in turn."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median of the ratios of neighbours, with the smallest and the largest."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
