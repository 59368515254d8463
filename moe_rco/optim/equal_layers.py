"""Assignments in which every layer keeps equally many groups, all of a layer at one option; solved exactly.

With n groups kept, a layer at option k keeps those that gain most over being dropped, so its value is a sum
of sorted gains, and choosing k for every layer is a multiple-choice knapsack over layers. The best n is found
among those whose Lagrangian bound promises more than the best solution so far.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_rco.errors import BudgetError, UserError
from moe_rco.optim.mckp import Knapsack, MCKPSolution
from moe_rco.optim.mckp_input import as_array, as_integers

_HALVINGS = 50
_PROVED = 1e-12


class EqualLayers:
    """A feasible set like `Knapsack`, whose arguments it takes; `floor` is one number for all layers.

    The option of cost 0 drops a group; without one every layer keeps all of its groups. Raises UserError where
    layers differ in size, the groups of a layer in their costs, or several options cost nothing, and
    BudgetError where no assignment keeps the budget.
    """

    def __init__(self, costs: Any, budget: int, *, floor: int, layer: Any):
        self._all = Knapsack(costs, budget)
        self.costs, self.budget = self._all.costs, int(budget)
        self._groups = _by_layer(layer, len(self.costs))
        prices = self.costs[self._groups]
        if (prices != prices[:, :1]).any():
            raise UserError("all groups of a layer must have the same costs")
        free = np.flatnonzero((self.costs == 0).all(0))
        self._kept = np.flatnonzero((self.costs > 0).all(0))
        if len(free) > 1 or len(free) + len(self._kept) < self.costs.shape[1]:
            raise UserError("one option at most may cost nothing, and must then cost nothing everywhere")
        if not len(self._kept):
            raise UserError("no option keeps a group")
        self._drop = int(free[0]) if len(free) else None
        self._prices = prices[:, 0, self._kept]
        size = self._groups.shape[1]
        if floor > size:
            raise BudgetError(f"layers have {size} groups, fewer than their floor of {floor}")
        self._least = size if self._drop is None else max(floor, 0)
        cheapest = int(self._prices.min(1).sum())
        counts = np.arange(self._least, size + 1)
        self._counts = counts[counts * cheapest <= self.budget]
        if not len(self._counts):
            raise BudgetError(
                f"budget {self.budget} is below {self._least * cheapest}, the smallest cost of layers that "
                f"all keep {self._least} groups"
            )
        self._knapsacks: dict[int, Knapsack] = {}

    def solve(self, values: Any, *, warm: MCKPSolution | None = None) -> MCKPSolution:
        """Maximise the sum of `values` float64 [N, K]; see FeasibleSet. `warm` is of no use here."""
        v = np.ascontiguousarray(as_array(values), dtype=np.float64)
        if v.shape != self.costs.shape:
            raise UserError(f"values must be {list(self.costs.shape)} like the costs, got {list(v.shape)}")
        if not np.isfinite(v).all():
            raise UserError("values must be finite")
        order, totals = self._totals(v)
        bounds = self._bounds(totals)
        tolerance = _PROVED * float(np.abs(totals).max(2).sum(1).max())
        value, choice, status, ceiling = -np.inf, np.empty(0, np.int64), "optimal", -np.inf
        for at in np.argsort(-bounds, kind="stable"):
            if bounds[at] <= value + tolerance:
                break
            found = self._knapsack(int(at)).solve(totals[at])
            ceiling = max(ceiling, found.bound)
            if found.status != "optimal":
                status = found.status
            if found.value > value:
                value, choice = found.value, self._choice(order, int(self._counts[at]), found.choice)
        value = float(np.sum(v[np.arange(len(v)), choice]))
        bound = value if status == "optimal" else max(value, ceiling)
        return MCKPSolution(choice, value, self.cost_of(choice), bound, status)

    def checked(self, choice: Any, name: str) -> NDArray[np.int64]:
        """See FeasibleSet."""
        result = self._all.checked(choice, name)
        options = result[self._groups]
        kept = np.ones(options.shape, bool) if self._drop is None else options != self._drop
        counts = kept.sum(1)
        if counts.min() < self._least:
            raise BudgetError(f"{name} keeps fewer groups than the floor in layer {int(counts.argmin())}")
        one = np.where(kept, options, -1).max(1, keepdims=True)
        if (counts != counts[0]).any() or (kept & (options != one)).any():
            raise UserError(
                f"{name} must keep equally many groups of every layer, each layer's at one option"
            )
        return result

    def cost_of(self, choice: NDArray[np.int64]) -> int:
        """See FeasibleSet."""
        return self._all.cost_of(choice)

    def hint(self, multiplier: float) -> MCKPSolution:
        """See FeasibleSet."""
        return self._all.hint(multiplier)

    def _totals(self, values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The groups of each layer [L, K, G] for each keeping option, the one to keep first in front, and the
        layer's value [C, L, K] for every count of kept groups.
        """
        by_layer = values[self._groups].transpose(0, 2, 1)
        kept = by_layer[:, self._kept]
        if self._drop is None:
            order = np.broadcast_to(np.arange(kept.shape[2]), kept.shape)
            return order, kept.sum(2)[None]
        dropped = by_layer[:, [self._drop]]
        order = np.argsort(dropped - kept, axis=2, kind="stable")
        gains = np.cumsum(np.take_along_axis(kept - dropped, order, 2), axis=2)
        gains = np.concatenate([np.zeros_like(gains[:, :, :1]), gains], axis=2)
        return order, (gains + dropped.sum(2)[:, :, None])[:, :, self._counts].transpose(2, 0, 1)

    def _bounds(self, totals: NDArray[np.float64]) -> NDArray[np.float64]:
        """An upper bound [C] on the value for every count, from `totals` [C, L, K]: the Lagrangian relaxation
        at nearly the best price, found by halving for all counts at once.
        """
        costs = self._counts[:, None, None] * self._prices.astype(np.float64)
        steps = np.diff(np.sort(self._prices, axis=1), axis=1)
        step = max(1, int(steps[steps > 0].min(initial=np.iinfo(np.int64).max)))
        # Below the first price nothing is given up for cost, above the last everything that can be.
        low = np.zeros(len(totals))
        high = (totals.max(2) - totals.min(2)).max(1) / np.maximum(self._counts * step, 1)
        bounds = totals.max(2).sum(1)
        for _ in range(_HALVINGS):
            price = (low + high) / 2
            reduced = totals - price[:, None, None] * costs
            best = reduced.argmax(2)[:, :, None]
            spent = np.take_along_axis(costs, best, 2).sum((1, 2))
            value = np.take_along_axis(reduced, best, 2).sum((1, 2))
            bounds = np.minimum(bounds, value + price * self.budget)
            low, high = np.where(spent > self.budget, price, low), np.where(spent > self.budget, high, price)
        return bounds

    def _knapsack(self, at: int) -> Knapsack:
        """The choice of an option for every layer when each keeps `self._counts[at]` groups."""
        if at not in self._knapsacks:
            self._knapsacks[at] = Knapsack(self._counts[at] * self._prices, self.budget)
        return self._knapsacks[at]

    def _choice(self, order: NDArray[np.int64], count: int, options: NDArray[np.int64]) -> NDArray[np.int64]:
        """The assignment [N] that keeps `count` groups of every layer l at keeping option options[l]."""
        choice = np.full(len(self.costs), -1 if self._drop is None else self._drop, dtype=np.int64)
        for groups, ranked, option in zip(self._groups, order, options, strict=True):
            choice[groups[ranked[option, :count]]] = self._kept[option]
        return choice


def _by_layer(layer: Any, groups: int) -> NDArray[np.int64]:
    """The groups of every layer [L, G], in their order. Raises UserError unless all have equally many."""
    index = as_integers(layer, "layer", 1)
    if index.shape != (groups,):
        raise UserError(f"layer must have one number for each of the {groups} groups")
    _, sizes = np.unique(index, return_counts=True)
    if (sizes != sizes[0]).any():
        raise UserError(f"layers must have equally many groups, not {sizes.min()} to {sizes.max()}")
    return np.argsort(index, kind="stable").reshape(len(sizes), -1)
