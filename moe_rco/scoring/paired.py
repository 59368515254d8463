"""Two models on the same items: how far apart, how sure.

A score is a smooth function of a ratio R = sum(values) / sum(weights) over items: a mean (weights 1), or a perplexity exp(-R) or
bits per byte -R / ln 2, with log-likelihoods as values and lengths as weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from math import comb
from typing import Literal

import numpy as np

Kind = Literal["mean", "perplexity", "bits"]
KINDS: tuple[Kind, ...] = ("mean", "perplexity", "bits")

MCNEMAR = "McNemar, exact"
SIGN_FLIP = "paired sign-flip permutation"

_FLIPS = 10_000
_EXACT_ITEMS = 12
_SEED = 0


@dataclass(frozen=True, eq=False)
class Items:
    """One score's items: `values` and `weights` float64 [n], and which function of their ratio it is."""

    values: np.ndarray
    weights: np.ndarray
    kind: Kind

    @cached_property
    def ratio(self) -> float:
        return float(self.values.sum() / self.weights.sum())

    @property
    def score(self) -> float:
        match self.kind:
            case "mean":
                return self.ratio
            case "perplexity":
                return math.exp(-self.ratio)
            case "bits":
                return -self.ratio / math.log(2)

    @property
    def influence(self) -> np.ndarray:
        """[n]: how much the score moves with each item, to first order; sums to 0."""
        slope = {"mean": 1.0, "perplexity": -self.score, "bits": -1 / math.log(2)}[self.kind]
        return slope * (self.values - self.ratio * self.weights) / self.weights.sum()

    @property
    def stderr(self) -> float | None:
        """Standard error of the score over items; None for a single item."""
        return _stderr(self.influence)


def classify(score: float, values: np.ndarray, weights: np.ndarray) -> Items | None:
    """The items as the kind whose score is the reported one; None if it is no function of their ratio
    (F1, for one), so that nothing can be said from the items one by one.
    """
    total = weights.sum()
    if not len(values) or not total > 0 or not np.isfinite(values).all():
        return None
    for kind in KINDS:
        items = Items(values, weights, kind)
        if kind == "perplexity" and not abs(items.ratio) < 700:
            continue
        if math.isclose(items.score, score, rel_tol=1e-6, abs_tol=1e-12):
            return items
    return None


@dataclass(frozen=True)
class Difference:
    """`value` is the second model's score minus the first's; `p` is two-sided, under equal models."""

    value: float
    stderr: float | None
    p: float
    test: str


def compare(first: Items, second: Items) -> Difference:
    """Both models' items in the same order, with the same weights and kind. Raises ValueError otherwise."""
    if first.kind != second.kind or not np.array_equal(first.weights, second.weights):
        raise ValueError("the two models' items are not the same")
    p, test = p_value(first.values, second.values)
    error = _stderr(second.influence - first.influence)
    return Difference(second.score - first.score, error, p, test)


def p_value(first: np.ndarray, second: np.ndarray) -> tuple[float, str]:
    """Two-sided p of the items' differences summing to so much by chance, and the test's name."""
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        return mcnemar(int(np.sum(first > second)), int(np.sum(first < second))), MCNEMAR
    return sign_flip(second - first), SIGN_FLIP


def mcnemar(lost: int, gained: int) -> float:
    """Exact McNemar test: items only the first, and only the second model has right; fair coin between."""
    total = lost + gained
    tail = sum(comb(total, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / (1 << total))


def sign_flip(differences: np.ndarray) -> float:
    """The share of sign patterns whose sum is at least as far from 0: all patterns of at most 12 non-zero
    differences, else 10,000 seeded random ones and the observed one.
    """
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    # Sums that differ by rounding alone are ties.
    least = abs(moved.sum()) - 1e-12 * np.abs(moved).sum()
    if len(moved) <= _EXACT_ITEMS:
        patterns = (np.arange(1 << len(moved))[:, None] >> np.arange(len(moved))) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ moved) >= least))
    rng = np.random.default_rng(_SEED)
    chunks = 100
    extreme = 0
    for _ in range(chunks):
        signs = 1 - 2 * rng.integers(0, 2, size=(_FLIPS // chunks, len(moved)), dtype=np.int8)
        extreme += int(np.sum(np.abs(signs @ moved) >= least))
    return (extreme + 1) / (_FLIPS + 1)


def _stderr(influence: np.ndarray) -> float | None:
    n = len(influence)
    return float(np.sqrt(n / (n - 1) * np.sum(influence**2))) if n > 1 else None
