"""Evolutionary search over assignments: level switches and successive halving, after EvoPress (arXiv 2410.14649)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_rco.errors import UserError
from moe_rco.optim.feasible import FeasibleSet
from moe_rco.optim.solver import SEARCH, SolveResult
from moe_rco.optim.trace import Incumbent, StepRecord, pack_history, unpack_history

OFFSPRING, SURVIVORS, GROWTH = 8, 2, 4
"""Offspring of a generation, how many of them see more data, and how many times as much that is."""
_TRIES = 32

Value = Callable[[NDArray[np.int64], int, int], float]
"""(choice, generation, batches) to its loss on so many batches; the same ones for all choices of a generation."""


def passes(growth: int) -> int:
    """Forward passes of one batch that a generation takes, its parent's included."""
    return OFFSPRING + (SURVIVORS + 1) * growth


def evolve(
    value: Value,
    costs: NDArray[np.int64],
    feasible: FeasibleSet,
    start: NDArray[np.int64],
    *,
    generations: int,
    growth: int = GROWTH,
    evaluate: Callable[[NDArray[np.int64]], float] | None = None,
    evaluate_every: int = 0,
    on_step: Callable[[StepRecord], None] | None = None,
    state: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> SolveResult:
    """Improve an assignment by mutation and selection.

    A generation's offspring differ from the parent by a few level switches: one group moves to its next dearer
    option and another to its next cheaper one, within budget and floors. All are run on one batch, the best
    `SURVIVORS` of them and the parent on `growth` batches, and the best of these is the next parent.

    Args:
        value: the loss of a choice int64 [N] on some batches.
        costs: int64 [N, K], those of `feasible`.
        start: the first parent, int64 [N].
        generations: each takes `passes(growth)` forward passes of a batch.
        growth: batches that finalists are run on; 0 where `value` is the same for any and remembers.
        evaluate, evaluate_every, on_step, state, seed: as in `minimize`.

    Raises UserError where `start` is not feasible or a loss is not a number.
    """
    levels, best, history = _Levels(costs, feasible), Incumbent(0.0), list[StepRecord]()
    parent = feasible.checked(start, "the start")
    if state is None:
        best.judge(parent, _number(evaluate(parent) if evaluate else value(parent, 0, growth)), SEARCH)
    else:
        parent, history = state["parent"].numpy().copy(), unpack_history(state["history"])
        best.load(state)
    for step in range(len(history) + 1, generations + 1):
        rng = np.random.default_rng((seed, step))
        offspring = [levels.switched(parent, rng) for _ in range(OFFSPRING)]
        losses = [_number(value(choice, step, 1)) for choice in offspring]
        finalists = [parent, *(offspring[index] for index in np.argsort(losses, kind="stable")[:SURVIVORS])]
        losses = [_number(value(choice, step, growth)) for choice in finalists]
        loss, parent = min(losses), finalists[int(np.argmin(losses))]
        seen = None
        if evaluate is None:
            best.offer(parent, loss, SEARCH)
        elif step == generations or (evaluate_every and step % evaluate_every == 0):
            known = best.recall(parent)
            seen = _number(evaluate(parent)) if known is None else known
            best.judge(parent, seen, SEARCH)
        history.append(StepRecord(step, loss, 0.0, 0.0, 0.0, seen, best.value, step * passes(growth)))
        if on_step is not None:
            on_step(history[-1].with_state(partial(_snapshot, parent, history, best)))
    if best.choice is None:
        raise UserError("nothing was evaluated")
    cost, calls = feasible.cost_of(best.choice), len(history) * passes(growth)
    return SolveResult(
        best.choice, best.value, cost, "completed", tuple(history), calls, SEARCH, torch.empty(0)
    )


class _Levels:
    """The next dearer and the next cheaper option of every option of every group."""

    def __init__(self, costs: NDArray[np.int64], feasible: FeasibleSet) -> None:
        self._feasible = feasible
        order = np.argsort(costs, axis=1, kind="stable")
        self._rank = np.argsort(order, axis=1)
        self._order, self._options = order, costs.shape[1]

    def switched(self, parent: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """A neighbour: one or more switches of two groups' levels, then a raise if one fits."""
        choice = parent
        for _ in range(int(rng.geometric(0.5))):
            choice = self._attempt(choice, (1, -1), rng)
        return self._attempt(choice, (1,), rng)

    def _attempt(
        self, choice: NDArray[np.int64], moves: tuple[int, ...], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        for _ in range(_TRIES):
            groups = rng.choice(len(choice), len(moves), replace=False)
            ranks = self._rank[groups, choice[groups]] + np.array(moves)
            if ranks.min() < 0 or ranks.max() >= self._options:
                continue
            changed = choice.copy()
            changed[groups] = self._order[groups, ranks]
            try:
                return self._feasible.checked(changed, "a mutation")
            except UserError:
                continue
        return choice


def _snapshot(
    parent: NDArray[np.int64], history: list[StepRecord], best: Incumbent
) -> dict[str, torch.Tensor | int | float | str]:
    return best.state() | {
        "parent": torch.from_numpy(parent.copy()),
        "history": pack_history(history),
        "step": len(history),
    }


def _number(value: float) -> float:
    if math.isnan(value):
        raise UserError("the loss of an assignment is not a number")
    return value
