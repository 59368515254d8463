"""The multiple-choice knapsack with a floor on kept groups per layer, solved to proven optimality.

Lagrangian bound (mckp_dual), then an exact search over a growing core of options with small losses
(mckp_core): an option whose loss exceeds the best solution's distance to the bound cannot be part of a
better one (Pisinger 1995).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_rco.errors import BudgetError, UserError
from moe_rco.optim.mckp_core import search_core
from moe_rco.optim.mckp_dual import Dual, best_at_price, solve_dual

_FIRST_CORE = 24
_PROVED = 1e-13
_MAX_STATES = 1 << 22
_MAX_COST = 1 << 62


@dataclass(frozen=True)
class MCKPSolution:
    """An assignment within the budget and the floors.

    `choice` int64 [N], its `value`, its `cost` (in the caller's unit), an upper `bound` on the optimum,
    `status` "optimal" (proved, within 1e-12 of the bound) or "feasible" (the bound tells how far it may be
    off), and the `multiplier`, value per unit of cost at the margin.
    """

    choice: NDArray[np.int64]
    value: float
    cost: int
    bound: float
    status: str
    multiplier: float = 0.0


class Knapsack:
    """Costs, budget, floors and mask, checked once; `solve` then takes new values again and again.

    Raises BudgetError when no assignment satisfies budget and floors, UserError on malformed input.
    """

    def __init__(self, costs: Any, budget: int, *, floor: Any = None, layer: Any = None, allowed: Any = None):
        self.costs = _integers(costs, "costs", 2)
        if self.costs.size == 0 or self.costs.min() < 0:
            raise UserError("costs must be a non-empty [N, K] array of integers that are not negative")
        if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)):
            raise UserError(f"budget must be an integer (bytes), got {budget!r}")
        if float(self.costs.max()) * len(self.costs) > _MAX_COST:
            raise UserError("costs add up to more than 2^62")
        self.budget = int(budget)
        self.allowed = _mask(allowed, self.costs.shape)
        self._layer, self._start, self._order = _layers(layer, floor, len(self.costs))
        self._floor = _floors(floor, len(self._start) - 1)
        self._unit = max(1, int(np.gcd.reduce(self.costs[self.allowed])))
        self._scaled = np.where(self.allowed, self.costs // self._unit, 0)
        self._target = self.budget // self._unit
        self._cheapest = self._cheapest_choice()

    def solve(
        self, values: Any, *, warm: MCKPSolution | None = None, max_states: int = _MAX_STATES
    ) -> MCKPSolution:
        """Maximise the sum of `values` float64 [N, K] over the chosen options.

        `warm`, the solution for similar values, saves time and changes nothing else. `max_states` bounds the
        memory of the exact search (24 bytes a state); when it does not suffice the result is "feasible" with
        an honest bound.
        """
        v = np.ascontiguousarray(_array(values), dtype=np.float64)
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
        rows = np.arange(len(choice))
        value = float(np.sum(v[rows, choice]))
        optimal = proved >= loss
        bound = value if optimal else max(value, dual.bound - proved)
        cost = self.cost_of(choice)
        return MCKPSolution(choice, value, cost, bound, "optimal" if optimal else "feasible", dual.price / self._unit)

    def checked(self, choice: Any, name: str) -> NDArray[np.int64]:
        """The choice as int64 [N]; raises BudgetError or UserError unless it satisfies mask, budget and
        floors."""
        result = _integers(choice, name, 1)
        if result.shape != (len(self.costs),) or result.min() < 0 or result.max() >= self.costs.shape[1]:
            raise UserError(f"{name} must name one of {self.costs.shape[1]} options for each of {len(self.costs)} groups")
        rows = np.arange(len(result))
        if not self.allowed[rows, result].all():
            raise UserError(f"{name} uses options that are not allowed")
        if self.cost_of(result) > self.budget:
            raise BudgetError(f"{name} costs {self.cost_of(result)}, more than the budget {self.budget}")
        kept = np.bincount(self._layer, self.costs[rows, result] > 0, len(self._floor))
        if (kept < self._floor).any():
            raise BudgetError(f"{name} keeps too few groups in layer {int((kept < self._floor).argmax())}")
        return result

    def cost_of(self, choice: NDArray[np.int64]) -> int:
        """Total cost of a choice int64 [N], in the caller's unit."""
        return int(self.costs[np.arange(len(choice)), choice].sum())

    def hint(self, multiplier: float) -> MCKPSolution:
        """A warm start that knows only the multiplier of an earlier solution."""
        return MCKPSolution(self._cheapest, -np.inf, self.cost_of(self._cheapest), np.inf, "feasible", multiplier)

    def _close_gap(self, dual: Dual, values: NDArray, max_states: int) -> tuple[NDArray[np.int64], float, float]:
        """(choice, its loss against the bound, the loss below which no solution exists)."""
        choice = dual.feasible
        loss = max(0.0, dual.bound - float(np.sum(values[np.arange(len(choice)), choice])))
        tolerance = _PROVED * max(abs(dual.bound), 1e-3 * dual.size)
        flat = dual.losses.ravel()
        is_base = np.zeros(dual.losses.shape, bool)
        is_base[np.arange(len(choice)), dual.base] = True
        candidates = np.flatnonzero((flat <= loss) & ~is_base.ravel())
        proved, size = 0.0, _FIRST_CORE
        while loss > max(proved, tolerance):
            if size < len(candidates):
                near = np.argpartition(flat[candidates], size)
                limit, core = float(flat[candidates[near[size]]]), candidates[near[:size]]
            else:
                limit, core = np.inf, candidates
            found, picked, complete = self._search(dual, core, min(limit, loss), max_states)
            if not complete:
                break
            if found < loss:
                loss, choice = found, picked
            proved, size = limit, size * 2
        return choice, loss, max(proved, tolerance)

    def _search(
        self, dual: Dual, core: NDArray[np.int64], limit: float, max_states: int
    ) -> tuple[float, NDArray[np.int64], bool]:
        """Best assignment that changes the base choice by core options (flat indices) only."""
        options = self.costs.shape[1]
        group, option = core // options, core % options
        base_cost = self._scaled[group, dual.base[group]]
        change = self._scaled[group, option] - base_cost
        kept = (self._scaled[group, option] > 0).astype(np.int64) - (base_cost > 0)
        surplus, tracked = self._tracked(dual, group, kept)
        # Tracked layers first, each layer's groups together; within a layer by group, the base option
        # leading.
        rank = np.where(tracked[self._layer[group]], self._layer[group], len(self._floor))
        kept[rank == len(self._floor)] = 0
        order = np.lexsort((group, rank))
        group, option, change, kept, rank = group[order], option[order], change[order], kept[order],
        rank[order] head = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else
        np.empty(0, np.int64) first = np.r_[head + np.arange(len(head)), len(group) + len(head)]
        last_of = np.full(len(head), -2, np.int64)
        of_layer = rank[head] if len(head) else head
        inside = of_layer < len(self._floor)
        ends = inside & np.r_[of_layer[1:] != of_layer[:-1], np.ones(min(1, len(head)), bool)]
        last_of[inside] = -1
        last_of[ends] = of_layer[ends]
        sizes = np.bincount(of_layer[inside], minlength=1) if inside.any() else np.zeros(1, np.int64)
        found, picks, complete = search_core(
            first, np.insert(change, head, 0), np.insert(dual.losses[group, option], head, 0.0),
            np.insert(kept, head, 0), last_of, surplus, dual.keep_price, dual.price,
            self._target - dual.base_cost, limit, 2 * int(sizes.max()) + 1, max_states,
        )  # fmt: skip
        choice = dual.base.copy()
        if np.isfinite(found):
            full = np.insert(option, head, dual.base[group[head]]) if len(head) else option
            choice[group[head]] = full[picks]
        return found, choice, complete

    def _tracked(
        self, dual: Dual, group: NDArray[np.int64], kept: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Kept groups above the floor per layer, and the layers whose count the core search has to follow."""
        layers = len(self._floor)
        rows = np.arange(len(self.costs))
        surplus = np.bincount(self._layer, self._scaled[rows, dual.base] > 0, layers).astype(np.int64) -
        self._floor losers = np.unique(group[kept < 0])
        loses = np.bincount(self._layer[losers], minlength=layers)
        changes = np.bincount(self._layer[group[kept != 0]], minlength=layers) > 0
        return surplus, (loses > surplus) | (changes & (dual.keep_price > 0))

    def _cheapest_choice(self) -> NDArray[np.int64]:
        choice = np.empty(len(self.costs), np.int64)
        _, cost = best_at_price(
            np.zeros(self.costs.shape), self._scaled, self.allowed, 1.0, self._floor, self._start,
            self._order, choice, np.zeros(len(self._floor)),
        )  # fmt: skip
        if cost < 0:
            raise BudgetError("a layer has fewer groups with an option of non-zero cost than its floor asks to keep")
        if cost > self._target:
            raise BudgetError(
                f"budget {self.budget} is below {cost * self._unit}, the smallest cost that satisfies every floor"
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


def _array(data: Any) -> NDArray:
    return np.asarray(data.detach().cpu().numpy() if hasattr(data, "detach") else data)


def _integers(data: Any, name: str, dims: int) -> NDArray[np.int64]:
    array = _array(data)
    if not np.issubdtype(array.dtype, np.integer) or array.ndim != dims:
        raise UserError(f"{name} must be integers in {dims} dimensions, got {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _mask(allowed: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if allowed is None:
        return np.ones(shape, bool)
    mask = np.ascontiguousarray(_array(allowed))
    if mask.dtype != np.bool_ or mask.shape != shape:
        raise UserError(f"allowed must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    empty = np.flatnonzero(~mask.any(axis=1))
    if len(empty):
        raise UserError(f"group {empty[0]} has no allowed option")
    return mask


def _layers(layer: Any, floor: Any, groups: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(layer [N], start [L + 1], order [N]): the groups of layer l are order[start[l]:start[l + 1]]."""
    index = np.zeros(groups, np.int64) if layer is None or floor is None else _integers(layer, "layer", 1)
    if index.shape != (groups,) or index.min() < 0:
        raise UserError(f"layer must have one number >= 0 for each of the {groups} groups")
    count = max(int(index.max()) + 1, np.size(_array(floor)) if floor is not None else 1)
    start = np.r_[0, np.cumsum(np.bincount(index, minlength=count))].astype(np.int64)
    return index, start, np.argsort(index, kind="stable")


def _floors(floor: Any, layers: int) -> NDArray[np.int64]:
    if floor is None:
        return np.zeros(layers, np.int64)
    array = _array(floor)
    if not np.issubdtype(array.dtype, np.integer) or array.shape not in ((), (layers,)):
        raise UserError(f"floor must be an integer or integers [{layers}], one for each layer")
    return np.ascontiguousarray(np.broadcast_to(array, (layers,)), dtype=np.int64)
