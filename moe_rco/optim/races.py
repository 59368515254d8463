"""Refinement of an assignment under a noisy loss: what a posterior proposes is raced against the best so far.

Proposals are exact optima for a draw of what is believed of every option (Thompson sampling over the knapsack),
with most groups held where they are. A race runs both assignments on the same rows of data, twice as many in every
heat, until one of them is clearly ahead; whatever comes out corrects the belief. What was predicted of every row serves as a
control variate: rows differ mostly in what they use of the groups that change, and that need not be sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_rco.errors import UserError
from moe_rco.optim.feasible import FeasibleSet
from moe_rco.optim.posterior import Posterior
from moe_rco.optim.solver import SolveResult
from moe_rco.optim.trace import StepRecord, pack_history, unpack_history

Losses = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]]
"""(choice [N], rows [n] of the data) to the loss on each of these rows [n]."""

RACES = "races"
FIRST_HEAT, _DOUBTFUL, _ENOUGH, _CLEAR, _LAST = 8, 32, 32, 2.5, 2.0
"""Rows of the first heat; below how many a challenger may be behind by a standard error; from how many on a lead of
so many standard errors wins; after the last row one of so many."""
_LONG, _SHARE = 128, 8
"""No challenger is run on more rows than this, or an eighth of all passes where that is more: two that differ by next to
nothing would be run on every row, and what matters never be tried."""
_PRIOR = 8
"""Rows that the assumption counts for, that the predictions are right up to a constant."""
_DRAWS, _BLIND = 48, 16
"""Draws before it is said that there is nothing new; from which one on they disregard what was measured, as it may have
been understood wrongly."""


def refine(
    losses: Losses,
    rows: int,
    feasible: FeasibleSet,
    start: NDArray[np.int64],
    mean: NDArray[np.float64],
    spread: NDArray[np.float64],
    *,
    passes: int,
    challengers: Sequence[NDArray[np.int64]] = (),
    controls: NDArray[np.floating] | None = None,
    units: NDArray[np.int64] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    state: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> SolveResult:
    """Improve an assignment until `passes` rows have been run, or nothing new is left to try.

    Args:
        losses: the loss of a choice on rows of the data; always the same for the same ones.
        rows: how many rows there are.
        start: int64 [N], in `feasible`.
        mean, spread: float64 [N, K], what every option is thought to add to the loss, and how wrong that may be; a
            common factor of the spread is found on the way.
        challengers: choices to race first.
        controls: [rows, N, K], what every option was thought to add to the loss on each row, before anything was run.
        units: int64 [N]; groups of one unit are held or free together. Each its own where left out.
        on_step, state: as in `minimize`; a step is a race.

    Returns the best choice with its mean loss on the rows it was run on; `evaluations` are rows run. Raises UserError
    where a loss is not a number.
    """
    start = feasible.checked(start, "the start")
    first = {one.tobytes(): one for one in (feasible.checked(c, "a challenger") for c in challengers)}
    first.pop(start.tobytes(), None)
    longest = max(_LONG, passes // _SHARE)
    run = _Run(
        losses, rows, feasible, start, Posterior(mean, spread), list(first.values()), units, seed, controls, longest
    )  # fmt: skip
    if state is not None:
        run.load(state)
    status = "completed"
    while run.passes < passes:
        if not run.advance():
            status = "stalled"
            break
        if on_step is not None:
            on_step(run.history[-1].with_state(run.state))
    return SolveResult(
        run.best, run.value, feasible.cost_of(run.best), status, tuple(run.history), run.passes, RACES, torch.empty(0)
    )  # fmt: skip


class _Run:
    def __init__(
        self,
        losses: Losses,
        rows: int,
        feasible: FeasibleSet,
        start: NDArray[np.int64],
        posterior: Posterior,
        challengers: Sequence[NDArray[np.int64]],
        units: NDArray[np.int64] | None,
        seed: int,
        controls: NDArray[np.floating] | None = None,
        longest: int | None = None,
    ) -> None:
        self._losses, self._feasible, self._posterior, self._seed = losses, feasible, posterior, seed
        self._controls, self._longest = controls, longest
        self._units = np.unique(np.arange(len(start)) if units is None else units, return_inverse=True)[1]
        self.best, self._first = start, challengers
        self._known = np.full(rows, np.nan)
        self.history: list[StepRecord] = []
        self.passes = 0

    @property
    def value(self) -> float:
        known = self._known[~np.isnan(self._known)]
        return float(known.mean()) if len(known) else math.nan

    def advance(self) -> bool:
        """One race; False where nothing new was found to try."""
        rng, races = np.random.default_rng((self._seed, len(self.history))), len(self.history)
        challenger = self._first[races] if races < len(self._first) else self._proposal(rng)
        if challenger is None:
            return False
        found, change, error, won = self._race(challenger, rng)
        old = self.best
        if won:
            self.best, self._known = challenger, found
        self._posterior.observe(old, challenger, change, error, near=self.best)
        step, value = len(self.history) + 1, self.value
        self.history.append(StepRecord(step, value, 0.0, 0.0, 0.0, None, value, self.passes))
        return True

    def state(self) -> dict[str, Any]:
        """Everything needed to go on: tensors and numbers."""
        return self._posterior.state() | {
            "races.best": torch.from_numpy(self.best.copy()), "races.known": torch.from_numpy(self._known.copy()),
            "races.history": pack_history(self.history), "races.passes": self.passes,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        self.best, self._known = state["races.best"].numpy().copy(), state["races.known"].numpy().copy()
        self._posterior.load(state, self.best)
        self.history, self.passes = unpack_history(state["races.history"]), int(state["races.passes"])

    def _proposal(self, rng: np.random.Generator) -> NDArray[np.int64] | None:
        units = int(self._units.max()) + 1
        groups = np.arange(len(self.best))
        for draw in range(_DRAWS):
            values = -self._posterior.sample(rng, 2.0 ** (draw % _BLIND / 4), blind=draw >= _BLIND)
            free = rng.permutation(units)[: int(math.exp(rng.uniform(0, math.log(units)))) + 1]
            held = groups[~np.isin(self._units, free)]
            values[held, self.best[held]] += 10 * np.abs(values).max()
            choice = self._feasible.solve(values).choice
            if not np.array_equal(choice, self.best) and not self._posterior.knows(choice):
                return choice
        return None

    def _race(
        self, challenger: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.float64], float, float, bool]:
        """The challenger's losses where it was run, its mean change and standard error, and whether it won."""
        order = rng.permutation(len(self._known))
        # Those first where the best has been run.
        order = order[np.argsort(np.isnan(self._known[order]), kind="stable")][: self._longest]
        predicted = self._predicted(challenger)
        found, done, size = np.full(len(self._known), np.nan), 0, FIRST_HEAT
        while True:
            heat = order[done : done + size]
            missing = heat[np.isnan(self._known[heat])]
            self._known[missing] = self._run(self.best, missing)
            found[heat] = self._run(challenger, heat)
            done += len(heat)
            change, error = estimate((found - self._known)[order[:done]], predicted[order[:done]], predicted)
            if done == len(order):
                return found, change, error, change < -_LAST * error
            if change > (error if done < _DOUBTFUL else 0.0):
                return found, change, error, False
            if done >= _ENOUGH and change < -_CLEAR * error:
                return found, change, error, True
            size = done

    def _predicted(self, challenger: NDArray[np.int64]) -> NDArray[np.float64]:
        """How the challenger was thought to differ from the best on each row."""
        if self._controls is None:
            return np.zeros(len(self._known))
        moved = np.flatnonzero(challenger != self.best)
        after, before = (self._controls[:, moved, choice[moved]] for choice in (challenger, self.best))
        return (after - before).sum(1, dtype=np.float64)

    def _run(self, choice: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        if not len(rows):
            return np.zeros(0)
        self.passes += len(rows)
        losses = self._losses(choice, rows)
        if np.isnan(losses).any():
            raise UserError("the loss of an assignment is not a number")
        return losses


def estimate(
    changes: NDArray[np.float64], predicted: NDArray[np.float64], everywhere: NDArray[np.float64]
) -> tuple[float, float]:
    """Mean change of the loss and its standard error, from the changes on some rows and what was predicted on these [n] and on
    all rows [R]: the regression estimator of two-phase sampling (Cochran, Sampling Techniques, section 12.6).

    The error is that of a mean over text like the rows: on all of them it is the usual one.
    """
    rows, spread = len(changes), float(everywhere.var())
    if not spread:
        return float(changes.mean()), float(changes.std() / math.sqrt(rows))
    x, y = predicted - predicted.mean(), changes - changes.mean()
    # Not x @ y, whose rounding depends on where in memory they lie.
    slope = float(((x * y).sum() + _PRIOR * spread) / (np.square(x).sum() + _PRIOR * spread))
    left = float(np.square(y - slope * x).sum() / max(1, rows - 2))
    explained = max(0.0, float(changes.var()) - left)
    change = float(changes.mean()) + slope * float(everywhere.mean() - predicted.mean())
    return change, math.sqrt(left / rows + explained / len(everywhere))
