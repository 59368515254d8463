"""What is believed of every option's part in the loss, after some changes of the loss were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_SCALES = 2.0 ** np.arange(-3, 4)
_INTERACTION = 0.25
"""Part of a measured change that may be due to groups acting on one another, where the others stand as they did; its
square grows with the number of those that do not."""
_JITTER, _TINY = 1e-9, 1e-30
_MEMORY = 256
"""Measurements kept: the latest, which are of assignments near the present best."""


@dataclass(frozen=True)
class _Measured:
    """Changes float64 [m] as sums `rows` [m, C] of some `entries` [C] of [N, K], and the variances of their noise."""

    entries: NDArray[np.int64]
    rows: NDArray[np.float64]
    changes: NDArray[np.float64]
    noise: NDArray[np.float64]

    def covariance(self, variance: NDArray[np.float64]) -> NDArray[np.float64]:
        covariance = (self.rows * variance[self.entries]) @ self.rows.T
        # What was measured without noise, and more than once, would make it singular.
        np.einsum("ii->i", covariance)[...] += self.noise + _JITTER * covariance.diagonal() + _TINY
        return covariance


class Posterior:
    """A Gaussian over what every option of every group adds to a loss, of which sums of differences are measured.

    Args:
        mean, spread: float64 [N, K], an estimate and its standard errors, these up to a common factor that is chosen
            by the likelihood of what is measured.
    """

    def __init__(self, mean: NDArray[np.float64], spread: NDArray[np.float64]) -> None:
        self._shape = mean.shape
        self._mean, self._variance = mean.ravel(), spread.ravel() ** 2
        self._old, self._new = np.zeros((2, 0, len(mean)), dtype=np.int64)
        self._changes = self._noise = np.zeros(0)
        self._scale = 1.0

    def observe(
        self,
        old: NDArray[np.int64],
        new: NDArray[np.int64],
        change: float,
        error: float,
        near: NDArray[np.int64],
    ) -> None:
        """The loss of `new` [N] is that of `old` [N] plus `change`, with a standard error.

        `near` [N] is where the belief is going to be used.
        """
        self._old, self._new = (
            np.vstack([kept, choice])[-_MEMORY:] for kept, choice in ((self._old, old), (self._new, new))
        )
        self._changes = np.append(self._changes, change)[-_MEMORY:]
        self._noise = np.append(self._noise, error**2)[-_MEMORY:]
        self._update(near)

    def knows(self, choice: NDArray[np.int64]) -> bool:
        """Whether `choice` [N] is among the latest that were measured."""
        return bool((self._new == choice).all(1).any())

    def sample(
        self, rng: np.random.Generator, widen: float = 1.0, *, blind: bool = False
    ) -> NDArray[np.float64]:
        """A draw [N, K]; with `widen` of the posterior of a prior so many times as wide; `blind`, of that prior."""
        variance = (self._scale * widen) ** 2 * self._variance
        drawn = self._mean + rng.standard_normal(len(variance)) * np.sqrt(variance)
        if len(self._changes) and not blind:
            seen = self._measured
            noise = rng.standard_normal(len(seen.changes)) * np.sqrt(seen.noise)
            missing = np.linalg.solve(
                seen.covariance(variance), seen.changes + noise - seen.rows @ drawn[seen.entries]
            )
            drawn[seen.entries] += variance[seen.entries] * (seen.rows.T @ missing)
        return drawn.reshape(self._shape)

    def state(self) -> dict[str, torch.Tensor]:
        """What was measured."""
        parts = {"old": self._old, "new": self._new, "changes": self._changes, "noise": self._noise}
        return {f"posterior.{name}": torch.from_numpy(part) for name, part in parts.items()}

    def load(self, state: Mapping[str, Any], near: NDArray[np.int64]) -> None:
        """Go on from `state`, to be used near a choice [N]."""
        names = ("old", "new", "changes", "noise")
        parts = (state[f"posterior.{name}"].numpy().copy() for name in names)
        self._old, self._new, self._changes, self._noise = parts
        if len(self._changes):
            self._update(near)

    def _update(self, near: NDArray[np.int64]) -> None:
        options = self._shape[1]
        row, group = np.nonzero(self._old != self._new)
        ends = [group * options + choices[row, group] for choices in (self._new, self._old)]
        entries, columns = np.unique(np.concatenate(ends), return_inverse=True)
        rows = np.zeros((len(self._changes), len(entries)))
        rows[row, columns[: len(row)]] = 1
        rows[row, columns[len(row) :]] = -1
        elsewhere = (self._old != near).sum(1)
        noise = self._noise + (_INTERACTION * self._changes) ** 2 * (1 + elsewhere)
        self._measured = _Measured(entries, rows, self._changes, noise)
        self._scale = max(_SCALES, key=self._likelihood)

    def _likelihood(self, scale: float) -> float:
        seen = self._measured
        factor = np.linalg.cholesky(seen.covariance(scale**2 * self._variance))
        missing = np.linalg.solve(factor, seen.changes - seen.rows @ self._mean[seen.entries])
        return -float(np.log(np.diag(factor)).sum() + missing @ missing / 2)
