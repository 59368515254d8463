"""A 3-gram baseline with interpolated modified Kneser-Ney smoothing (Chen and Goodman, 1998) over token ids.

Everything is a few sorts and binary searches over numpy arrays: a 3-gram of ``n`` tokens is a sorted array of
at most ``n`` integer keys with their counts.
"""

from __future__ import annotations

import numpy as np


class _Order:
    """Discounted counts of one order: ``keys`` are ``context * vocabulary + word``."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray, vocabulary: int) -> None:
        self.keys, self.vocabulary = keys, vocabulary
        discounts = _discounts(counts)
        amount = np.minimum(discounts[np.minimum(counts, 3)], counts)
        self.contexts, first = np.unique(keys // vocabulary, return_index=True)
        totals = np.add.reduceat(counts, first).astype(np.float64)
        self.left_over = np.add.reduceat(amount, first) / totals
        sizes = np.diff(np.append(first, len(keys)))
        self.seen = (counts - amount) / np.repeat(totals, sizes)

    def interpolate(self, contexts: np.ndarray, words: np.ndarray, lower: np.ndarray) -> np.ndarray:
        seen = _look_up(self.keys, self.seen, contexts * self.vocabulary + words, missing=0.0)
        return seen + _look_up(self.contexts, self.left_over, contexts, missing=1.0) * lower


def _discounts(counts: np.ndarray) -> np.ndarray:
    """The amount subtracted from a count of 0, 1, 2 and 3 or more."""
    n1, n2, n3, n4 = (max(1, int((counts == k).sum())) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    wanted = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # Text with few rare n-grams (arithmetic) can put the estimates outside their range.
    return np.clip(wanted, [0.0, 0.1, 0.1, 0.1], [0.0, 1.0, 1.9, 2.9])


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], missing)


class TrigramModel:
    def __init__(self, tokens: np.ndarray, vocabulary: int) -> None:
        ids = tokens.astype(np.int64)
        keys = (ids[:-2] * vocabulary + ids[1:-1]) * vocabulary + ids[2:]
        trigrams, counts = np.unique(keys, return_counts=True)
        self.vocabulary = vocabulary
        self.orders = [_Order(trigrams, counts, vocabulary)]
        # Lower orders count the distinct words a shorter n-gram follows, not its occurrences.
        longer = trigrams
        for width in (vocabulary**2, vocabulary):
            longer, counts = np.unique(longer % width, return_counts=True)
            self.orders.append(_Order(longer, counts, vocabulary))

    def probabilities(self, before: np.ndarray, previous: np.ndarray, words: np.ndarray) -> np.ndarray:
        """P(word | before, previous) for equally long arrays of token ids."""
        before, previous, words = (array.astype(np.int64) for array in (before, previous, words))
        trigram, bigram, unigram = self.orders
        lower = np.full(len(words), 1 / self.vocabulary)
        lower = unigram.interpolate(np.zeros_like(words), words, lower)
        lower = bigram.interpolate(previous, words, lower)
        return trigram.interpolate(before * self.vocabulary + previous, words, lower)

    def loss(self, documents: list[np.ndarray]) -> float:
        """Mean negative log-likelihood per token; a document starts with the end-of-text token, not scored."""
        total, count = 0.0, 0
        for ids in documents:
            padded = np.concatenate([ids[:1], ids])
            total -= np.log(self.probabilities(padded[:-2], padded[1:-1], padded[2:])).sum()
            count += len(ids) - 1
        return total / count
