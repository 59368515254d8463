"""The multiple-choice knapsack with a floor on kept groups per layer, solved to proven optimality.

Lagrangian bound (mckp_dual), then an exact search over a growing core of options with small losses
(mckp_core): an option whose loss exceeds the best solution's distance to the bound cannot be part of a better
one (Pisinger 1995).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_rco.errors import BudgetError, UserError
from moe_rco.optim.mckp_core import fill_up, search_core
from moe_rco.optim.mckp_dual import Dual, best_at_price, solve_dual
from moe_rco.optim.mckp_input import as_array, as_floors, as_integers, as_layers, as_mask

_FIRST_CORE = 24
_PROVED = 1e-13
_MAX_STATES = 1 << 22
_MAX_COST = 1 << 62


@dataclass(frozen=True)
class MCKPSolution:
    """An assignment within the budget and the floors.

    `choice` int64 [N], its `value`, its `cost` (in the caller's unit), an upper `bound` on the optimum,
    `status` "optimal" (proved) or "feasible" (the bound tells how far it may be off), and the `multiplier`,
    value per unit of cost at the margin.
    """

    choice: NDArray[np.int64]
    value: float
    cost: int
    bound: float
    status: str
    multiplier: float = 0.0


class Knapsack:
    """Costs, budget, floors and mask, checked once; `solve` then takes new values again and again.

    Arguments and errors as for `solve_mckp`.
    """

    def __init__(self, costs: Any, budget: int, *, floor: Any = None, layer: Any = None, allowed: Any = None):
        self.costs = as_integers(costs, "costs", 2)
        if self.costs.size == 0 or self.costs.min() < 0:
            raise UserError("costs must be a non-empty [N, K] array of integers that are not negative")
        if isinstance(budget, bool) or not isinstance(budget, int | np.integer):
            raise UserError(f"budget must be an integer (bytes), got {budget!r}")
        if float(self.costs.max()) * len(self.costs) > _MAX_COST:
            raise UserError("costs add up to more than 2^62")
        self.budget = int(budget)
        self.allowed = as_mask(allowed, self.costs.shape)
        self._rows = np.arange(len(self.costs))
        self._layer, self._start, self._order = as_layers(layer, floor, len(self.costs))
        self._floor = as_floors(floor, len(self._start) - 1)
        self._unit = max(1, int(np.gcd.reduce(self.costs[self.allowed])))
        self._scaled = np.where(self.allowed, self.costs // self._unit, 0)
        self._target = min(self.budget, _MAX_COST) // self._unit
        self._cheapest = self._cheapest_choice()

    def solve(
        self, values: Any, *, warm: MCKPSolution | None = None, max_states: int = _MAX_STATES
    ) -> MCKPSolution:
        """Maximise the sum of `values` float64 [N, K] over the chosen options.

        `warm`, the solution for similar values, saves time. `max_states` bounds the memory of the exact
        search (24 bytes a state); when it does not suffice the result is "feasible" with an honest bound.
        """
        v = np.ascontiguousarray(as_array(values), dtype=np.float64)
        if v.shape != self.costs.shape:
            raise UserError(f"values must be {list(self.costs.shape)} like the costs, got {list(v.shape)}")
        if not np.isfinite(v if self.allowed.all() else v[self.allowed]).all():
            raise UserError("values of allowed options must be finite")
        hint = 0.0 if warm is None else warm.multiplier * self._unit
        layout = (self._layer, self._start, self._order)
        dual = solve_dual(
            v, self._scaled, self.allowed, self._target, self._floor, layout, self._cheapest, hint
        )
        choice, loss, proved = self._close_gap(dual, v, max_states)
        value = float(np.sum(v[self._rows, choice]))
        status, bound = "optimal", value
        if loss > proved:
            status, bound = "feasible", max(value, dual.bound - proved)
        return MCKPSolution(choice, value, self.cost_of(choice), bound, status, dual.price / self._unit)

    def checked(self, choice: Any, name: str) -> NDArray[np.int64]:
        """The choice as int64 [N]; raises BudgetError or UserError unless it is a solution."""
        result = as_integers(choice, name, 1)
        groups, options = self.costs.shape
        if result.shape != (groups,) or result.min() < 0 or result.max() >= options:
            raise UserError(f"{name} must name one of {options} options for each of {groups} groups")
        if not self.allowed[self._rows, result].all():
            raise UserError(f"{name} uses options that are not allowed")
        if self.cost_of(result) > self.budget:
            raise BudgetError(f"{name} costs {self.cost_of(result)}, more than the budget {self.budget}")
        short = self._kept(result) < self._floor
        if short.any():
            raise BudgetError(f"{name} keeps fewer groups than the floor in layer {int(short.argmax())}")
        return result

    def cost_of(self, choice: NDArray[np.int64]) -> int:
        """Total cost of a choice int64 [N], in the caller's unit."""
        return int(self.costs[self._rows, choice].sum())

    def hint(self, multiplier: float) -> MCKPSolution:
        """A warm start that knows only the multiplier of an earlier solution."""
        cost = self.cost_of(self._cheapest)
        return MCKPSolution(self._cheapest, -np.inf, cost, np.inf, "feasible", multiplier)

    def _close_gap(
        self, dual: Dual, values: NDArray[np.float64], max_states: int
    ) -> tuple[NDArray[np.int64], float, float]:
        """(choice, its loss against the bound, the loss below which no solution exists)."""
        choice = dual.feasible
        loss = max(0.0, dual.bound - float(np.sum(values[self._rows, choice])))
        tolerance = _PROVED * max(abs(dual.bound), 1e-3 * dual.size)
        in_reach = dual.losses <= loss
        in_reach[self._rows, dual.base] = False
        candidates = np.flatnonzero(in_reach)
        losses = dual.losses.ravel()[candidates]
        proved, size = 0.0, _FIRST_CORE
        while loss > max(proved, tolerance):
            limit, core = np.inf, candidates
            if size < len(candidates):
                nearest = np.argpartition(losses, size)
                limit, core = float(losses[nearest[size]]), candidates[nearest[:size]]
            found, picked, complete = self._search(dual, core, min(limit, loss), max_states)
            before = loss
            if found < loss:
                loss, choice = found, picked
            if size == _FIRST_CORE and loss > limit:
                # A hard problem: a better start than the dual's cuts every further search short.
                filled = self._filled(choice, dual.losses, values)
                less = max(0.0, dual.bound - float(np.sum(values[self._rows, filled])))
                if less < loss:
                    loss, choice = less, filled
            if complete:
                proved, size = limit, size * 2
            elif loss >= min(before, limit):
                break  # a smaller loss to search below would have made room for another try
        return choice, loss, max(proved, tolerance)

    def _filled(
        self, choice: NDArray[np.int64], losses: NDArray[np.float64], values: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        ranked = np.argsort(losses, axis=None, kind="stable")
        result = choice.copy()
        room = self._target - int(self._scaled[self._rows, choice].sum())
        fill_up(values, self._scaled, self.allowed, ranked, result, room)
        return result

    def _search(
        self, dual: Dual, core: NDArray[np.int64], limit: float, max_states: int
    ) -> tuple[float, NDArray[np.int64], bool]:
        """Best assignment that changes the base choice by core options (flat indices) only."""
        options, layers = self.costs.shape[1], len(self._floor)
        # The base option of every core group joins its core options and leads them.
        touched = np.unique(core // options)
        flat = np.r_[touched * options + dual.base[touched], core]
        group, option = flat // options, flat % options
        is_base = option == dual.base[group]
        cost, base_cost = self._scaled[group, option], self._scaled[group, dual.base[group]]
        kept = (cost > 0).astype(np.int64) - (base_cost > 0)
        surplus = self._kept(dual.base) - self._floor
        tracked = self._tracked(group, kept, surplus, dual.keep_price)
        rank = np.where(tracked[self._layer[group]], self._layer[group], layers)
        kept[rank == layers] = 0
        # Tracked layers first, the groups of each one together.
        order = np.lexsort((~is_base, group, rank))
        first = np.r_[np.flatnonzero(is_base[order]), len(order)]
        layer_of = rank[order][first[:-1]]
        is_last = np.r_[layer_of[1:] != layer_of[:-1], True]
        last_of = np.where(layer_of == layers, -2, np.where(is_last, layer_of, -1))
        width = 2 * int(np.bincount(layer_of, minlength=layers + 1)[:layers].max(initial=0)) + 1
        found, picks, complete = search_core(
            first, (cost - base_cost)[order], dual.losses[group, option][order], kept[order], last_of,
            surplus, dual.keep_price, dual.price, self._target - dual.base_cost, limit, width, max_states,
        )  # fmt: skip
        choice = dual.base.copy()
        if np.isfinite(found):
            chosen = order[picks]
            choice[group[chosen]] = option[chosen]
        return found, choice, complete

    def _tracked(
        self,
        group: NDArray[np.int64],
        kept: NDArray[np.int64],
        surplus: NDArray[np.int64],
        keep_price: NDArray[np.float64],
    ) -> NDArray[np.bool_]:
        """The layers [L] in which the core could break the floor or change what keeping costs."""
        losers = np.bincount(self._layer[np.unique(group[kept < 0])], minlength=len(surplus))
        changes = np.bincount(self._layer[group[kept != 0]], minlength=len(surplus)) > 0
        return (losers > surplus) | (changes & (keep_price > 0))

    def _kept(self, choice: NDArray[np.int64]) -> NDArray[np.int64]:
        kept = self.costs[self._rows, choice] > 0
        return np.bincount(self._layer[kept], minlength=len(self._floor))

    def _cheapest_choice(self) -> NDArray[np.int64]:
        choice = np.empty(len(self.costs), np.int64)
        _, cost = best_at_price(
            np.zeros(self.costs.shape), self._scaled, self.allowed, 1.0, self._floor, self._start,
            self._order, choice, np.zeros(len(self._floor)),
        )  # fmt: skip
        if cost < 0:
            raise BudgetError("a layer has fewer groups with an option of non-zero cost than its floor")
        if cost > self._target:
            least = cost * self._unit
            raise BudgetError(
                f"budget {self.budget} is below {least}, the smallest cost that satisfies every floor"
            )
        return choice


def solve_mckp(
    values: Any,
    costs: Any,
    budget: int,
    *,
    floor: Any = None,
    layer: Any = None,
    allowed: Any = None,
    warm: MCKPSolution | None = None,
) -> MCKPSolution:
    """Choose one option per group: maximise the sum of values with a sum of costs of at most `budget`.

    Args:
        values: float64 [N, K], numpy or torch.
        costs: integers [N, K] (bytes), numpy or torch, not negative.
        budget: integer, same unit. The result never costs more.
        floor: int or int64 [num_layers]: groups per layer that must have an option of non-zero cost.
        layer: int64 [N], the layer of each group; all in layer 0 when left out.
        allowed: bool [N, K]; options that may be chosen.
        warm: the solution of a problem with similar values, to save time.

    Raises:
        BudgetError: no assignment satisfies budget and floors; the message names the smallest feasible cost.
        UserError: malformed input.
    """
    return Knapsack(costs, budget, floor=floor, layer=layer, allowed=allowed).solve(values, warm=warm)
