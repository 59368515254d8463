"""Losses of assignments on calibration sequences: of a search's steps, of single sequences, and on what was kept out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from moe_rco.calib.data import TokenPool
from moe_rco.calib.objective import AssignedModel, Pass
from moe_rco.calib.reference import Reference, divergence
from moe_rco.optim.evolution import GROWTH
from moe_rco.recipe_sections import Search

STRIDE = 2


class SampledLoss:
    """Maps a straight-through sample [N, K] to the KL on a fresh batch; every step uses one batch for all its samples.

    A sample is run as the deployed model. Its gradient estimate is the first-order effect of each move in output space,
    plus the curvature the first order does not see: moving group i from option j to k adds the new option's own error
    q_ik and, because the linear term promises twice what undoing the old one's gives, q_ij.
    """

    def __init__(
        self, model: AssignedModel, q: np.ndarray, pool: TokenPool, reference: Reference, search: Search
    ) -> None:
        self._model, self._q, self._pool, self._reference = model, q, pool, reference
        self._search = search
        self._calls = 0

    def __call__(self, sample: torch.Tensor) -> torch.Tensor:
        return self.together([sample])[0]

    def together(self, samples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The losses of several samples of one step."""
        rows = self.rows(self._calls // self._search.samples)
        self._calls += len(samples)
        target, ids = self._reference.of(rows, self._model.runner.device), self._pool.ids[rows]

        def loss(row: int, positions: slice, logits: torch.Tensor) -> torch.Tensor:
            return divergence(target.at(row, positions), logits).sum()

        choices = [sample.detach().argmax(1).numpy() for sample in samples]
        found = self._model.effects([Pass(choice, loss) for choice in choices], ids, stride=STRIDE)
        losses = []
        for sample, choice, (total, effects) in zip(samples, choices, found, strict=True):
            gradient = self.gradient(effects.linear, choice)
            gradient[np.arange(len(choice)), choice] = 0.0
            losses.append(_Estimated.apply(sample, total / ids.numel(), torch.from_numpy(gradient)))
        return losses

    def rows(self, step: int) -> torch.Tensor:
        """The batch of a step."""
        return _rows(len(self._pool), min(self._search.batch, len(self._pool)), step, self._search.seed)

    def gradient(self, linear: np.ndarray, choice: np.ndarray) -> np.ndarray:
        """What every move away from `choice` [N] does, float64 [N, K], from the first-order effects."""
        return linear + self._q + self._q[np.arange(len(choice)), choice][:, None]

    def skip(self, steps: int) -> None:
        """Go on as after `steps` steps."""
        self._calls = steps * self._search.samples


class _Estimated(torch.autograd.Function):
    """A loss with a gradient that was estimated beside it."""

    @staticmethod
    def forward(ctx: Any, sample: torch.Tensor, value: float, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return sample.new_tensor(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None


class KeptOut:
    """Judges discrete assignments by KL on the kept-out sequences; each is run once."""

    def __init__(self, model: AssignedModel, pool: TokenPool, reference: Reference) -> None:
        self._model, self._pool, self._reference = model, pool, reference
        self._known: dict[bytes, np.ndarray] = {}

    def sequences(self, choice: np.ndarray) -> np.ndarray:
        """KL of each kept-out sequence, float64 [n]."""
        key = choice.astype(np.int64).tobytes()
        if key not in self._known:
            self._known[key] = self._model.divergences(choice, self._pool, self._reference)
        return self._known[key]

    def __call__(self, choice: np.ndarray) -> float:
        return float(self.sequences(choice).mean())

    def prefers(self, choice: np.ndarray, best: np.ndarray) -> bool:
        """Whether a choice is better than another by more than two standard errors of the paired difference.

        The kept-out text is a sample too, and the lowest of many figures on it is partly luck.
        """
        gain = self.sequences(best) - self.sequences(choice)
        return bool(gain.mean() > 2 * gain.std() / math.sqrt(len(gain)))


def batch_losses(
    model: AssignedModel, pool: TokenPool, reference: Reference, search: Search
) -> Callable[[np.ndarray, int, int], float]:
    """(choice, generation, batches) to the KL on so many batches of a generation, the first ones for fewer."""
    span, by_row = min(GROWTH * search.batch, len(pool)), row_losses(model, pool, reference)

    def value(choice: np.ndarray, generation: int, batches: int) -> float:
        rows = _rows(len(pool), span, generation, search.seed)[: batches * search.batch]
        return float(by_row(choice, rows.numpy()).mean())

    return value


def row_losses(
    model: AssignedModel, pool: TokenPool, reference: Reference
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(choice, rows) to the KL of each of these sequences, float64 [n]."""

    def values(choice: np.ndarray, rows: np.ndarray) -> np.ndarray:
        target = reference.of(torch.from_numpy(rows), model.runner.device)
        return model.divergences(choice, pool.of(rows.tolist()), target)

    return values


def _rows(sequences: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """Rows of a step's batch: the pool in a new random order every epoch."""
    epoch, position = divmod(step, sequences // batch)
    order = np.random.default_rng((seed, epoch)).permutation(sequences)
    return torch.from_numpy(order[position * batch : (position + 1) * batch].copy())
