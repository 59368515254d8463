"""What a minimisation keeps besides its logits: one record per step, and the best assignment seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_COLUMNS = ("step", "loss", "budget_error", "tau", "entropy", "value", "best", "evaluations")


def _no_state() -> dict[str, Any]:
    raise RuntimeError("only the record handed to on_step can make a snapshot")


@dataclass(frozen=True)
class StepRecord:
    """One step: mean sampled `loss`, relative `budget_error` |C - B| / B, temperature `tau`, mean `entropy`
    of the groups (nats), `value` of the decoded assignment if it was evaluated, `best` value so far, loss
    calls so far.

    In `on_step`, `state()` returns a snapshot (tensors, numbers, one string) to pass to
    `minimize(state=...)`.
    """

    step: int
    loss: float
    budget_error: float
    tau: float
    entropy: float
    value: float | None
    best: float
    evaluations: int
    state: Callable[[], dict[str, Any]] = field(default=_no_state, compare=False, repr=False)

    def with_state(self, state: Callable[[], dict[str, Any]]) -> StepRecord:
        return replace(self, state=state)


def pack_history(history: Sequence[StepRecord]) -> Tensor:
    """Records as float64 [steps, columns]; a missing value is NaN."""
    rows = [[getattr(record, name) for name in _COLUMNS] for record in history]
    flat = [[np.nan if item is None else float(item) for item in row] for row in rows]
    return torch.tensor(flat, dtype=torch.float64).reshape(len(rows), len(_COLUMNS))


def unpack_history(table: Tensor) -> list[StepRecord]:
    """The inverse of `pack_history`."""
    history = []
    for step, loss, error, tau, entropy, value, best, evaluations in table.tolist():
        seen = None if np.isnan(value) else value
        history.append(StepRecord(int(step), loss, error, tau, entropy, seen, best, int(evaluations)))
    return history


class Incumbent:
    """The best assignment offered so far; a later one must be lower by more than `margin`."""

    def __init__(self, margin: float):
        self.margin = margin
        self.choice: NDArray[np.int64] | None = None
        self.value, self.name = float("inf"), ""
        self.misses = 0
        self._last: tuple[NDArray[np.int64], float] | None = None

    def offer(self, choice: NDArray[np.int64], value: float, name: str) -> None:
        """Consider an assignment."""
        if self.choice is None or value < self.value - self.margin:
            self.choice, self.value, self.name, self.misses = choice, value, name, 0

    def judge(self, choice: NDArray[np.int64], value: float, name: str) -> None:
        """Consider an assignment that was evaluated on purpose; `misses` counts those in a row that lost."""
        self._last = (choice, value)
        self.misses += 1
        self.offer(choice, value, name)

    def recall(self, choice: NDArray[np.int64]) -> float | None:
        """The value of the best or the latest assignment, so that a decode that stands still costs
        nothing."""
        if self.choice is not None and np.array_equal(choice, self.choice):
            return self.value
        if self._last is not None and np.array_equal(choice, self._last[0]):
            return self._last[1]
        return None

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and the name; choices are absent while there are none."""
        state: dict[str, Any] = {"best.value": self.value, "best.name": self.name, "best.misses": self.misses}
        if self.choice is not None:
            state["best.choice"] = torch.from_numpy(self.choice.copy())
        if self._last is not None:
            state["last.choice"] = torch.from_numpy(self._last[0].copy())
            state["last.value"] = self._last[1]
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        self.value, self.name = float(state["best.value"]), str(state["best.name"])
        self.misses = int(state["best.misses"])
        if "best.choice" in state:
            self.choice = state["best.choice"].cpu().numpy().copy()
        if "last.choice" in state:
            self._last = (state["last.choice"].cpu().numpy().copy(), float(state["last.value"]))
