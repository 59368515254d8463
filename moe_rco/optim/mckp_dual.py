"""The Lagrangian dual of the knapsack with floors: an upper bound, its multipliers and a solution within the
budget.

For a price lambda per unit of cost, every group takes its best option of v - lambda c; a layer left with
fewer than `floor` kept groups then switches the groups for which keeping costs least. That choice is optimal
for the price (the floor is a matroid constraint), so the dual value bounds the optimum and equals the bound
of the linear relaxation (Zemel 1980; Dyer 1984). The best price is found by intersecting the lines of the
two neighbouring solutions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

_MAX_LINES = 200
_HINT_STEP = 1.02


@njit(cache=True, nogil=True)
def best_at_price(values, costs, allowed, price, floor, start, order, choice, keep_price):
    """Write the best floor-feasible choice [N] at a price and each layer's multiplier [L]; return (value,
    cost).

    `order[start[l]:start[l + 1]]` are the groups of layer l. A floor that cannot be met shows as cost -1.
    Ties go to the cheaper option.
    """
    total_value, total_cost = 0.0, 0
    options = values.shape[1]
    longest = 0
    for layer in range(len(floor)):
        longest = max(longest, start[layer + 1] - start[layer])
    gaps = np.empty(longest)
    members = np.empty(longest, np.int64)
    upgrades = np.empty(longest, np.int64)
    for layer in range(len(floor)):
        kept, droppable = 0, 0
        for position in range(start[layer], start[layer + 1]):
            i = order[position]
            best_drop, best_keep = -np.inf, -np.inf
            drop, keep = -1, -1
            for k in range(options):
                if not allowed[i, k]:
                    continue
                reduced = values[i, k] - price * costs[i, k]
                if costs[i, k] == 0:
                    if reduced > best_drop:
                        best_drop, drop = reduced, k
                elif reduced > best_keep or (reduced == best_keep and costs[i, k] < costs[i, keep]):
                    best_keep, keep = reduced, k
            if best_keep > best_drop:
                choice[i] = keep
                kept += 1
            else:
                choice[i] = drop
                if keep >= 0:
                    gaps[droppable], members[droppable], upgrades[droppable] = best_drop - best_keep, i, keep
                    droppable += 1
        keep_price[layer] = 0.0
        missing = floor[layer] - kept
        if missing > droppable:
            return 0.0, -1
        if missing > 0:
            ranked = np.argsort(gaps[:droppable], kind="mergesort")
            for rank in range(missing):
                choice[members[ranked[rank]]] = upgrades[ranked[rank]]
            keep_price[layer] = gaps[ranked[missing - 1]]
    for i in range(len(choice)):
        total_cost += costs[i, choice[i]]
        term = values[i, choice[i]]
        total_value += term
    return total_value, total_cost


@njit(cache=True, nogil=True)
def _search(values, costs, allowed, budget, floor, start, order, hint, feasible, base, keep_price):
    """Find the price at which the lines of the two solutions around the budget meet, and return it.

    `feasible` enters as a cheapest choice and leaves as the best one seen within the budget; `base` leaves
    as the best choice at the price, over the budget or not.
    """
    low_value, low_cost = 0.0, 0
    for i in range(len(feasible)):
        low_value += values[i, feasible[i]]
        low_cost += costs[i, feasible[i]]
    high_value, high_cost = best_at_price(values, costs, allowed, 0.0, floor, start, order, base, keep_price)
    if high_cost <= budget:
        feasible[:] = base
        return 0.0
    hints = 2 if hint > 0.0 else 0
    price = hint
    for _ in range(_MAX_LINES):
        meeting = (high_value - low_value) / (high_cost - low_cost)
        if hints == 0:
            price = meeting
        value, cost = best_at_price(values, costs, allowed, price, floor, start, order, base, keep_price)
        line = high_value - price * high_cost
        if hints == 0 and (value - price * cost) - line <= 1e-15 * abs(line):
            if cost <= budget and value > low_value:
                feasible[:] = base
            return price
        if cost > budget:
            high_value, high_cost = value, cost
        else:
            low_value, low_cost = value, cost
            feasible[:] = base
        if hints > 0:
            # The price of a similar problem, then a step towards the budget, normally encloses the new price.
            price = hint * (_HINT_STEP if cost > budget else 1.0 / _HINT_STEP)
            hints -= 1
    best_at_price(values, costs, allowed, price, floor, start, order, base, keep_price)
    return price


@njit(cache=True, nogil=True)
def reduced_losses(values, costs, allowed, price, keep_price, layer, choice, losses):
    """Loss [N, K] of every option against the chosen one at the prices, never negative; infinite where not
    allowed.

    Returns the cost of the choice and the sum of the magnitudes of its values.
    """
    cost, size = 0, 0.0
    for i in range(values.shape[0]):
        extra = keep_price[layer[i]]
        k0 = choice[i]
        base = values[i, k0] - price * costs[i, k0] + (extra if costs[i, k0] > 0 else 0.0)
        for k in range(values.shape[1]):
            if allowed[i, k]:
                here = values[i, k] - price * costs[i, k] + (extra if costs[i, k] > 0 else 0.0)
                losses[i, k] = max(0.0, base - here)
            else:
                losses[i, k] = np.inf
        losses[i, k0] = 0.0
        cost += costs[i, k0]
        size += abs(values[i, k0])
    return cost, size


@dataclass(frozen=True)
class Dual:
    """Multipliers, the choice `base` that is best at them, and the best choice seen that keeps the budget.

    Every choice that keeps budget and floors has a value <= `bound` - (the sum of its `losses`).
    """

    base: NDArray[np.int64]
    feasible: NDArray[np.int64]
    price: float
    keep_price: NDArray[np.float64]
    losses: NDArray[np.float64]
    base_cost: int
    bound: float
    size: float


def solve_dual(values, costs, allowed, budget, floor, layout, cheapest, hint: float) -> Dual:
    """Best price for the budget. `layout` is (layer, start, order); `hint` a price from a similar problem or
    0."""
    layer, start, order = layout
    feasible, base = cheapest.copy(), np.empty_like(cheapest)
    keep_price = np.zeros(len(floor))
    price = _search(values, costs, allowed, budget, floor, start, order, hint, feasible, base, keep_price)
    losses = np.empty(values.shape)
    cost, size = reduced_losses(values, costs, allowed, price, keep_price, layer, base, losses)
    # Added up pairwise: the bound must not lose to rounding what the core search wins.
    value = float(np.sum(values[np.arange(len(base)), base]))
    return Dual(base, feasible, price, keep_price, losses, cost, value + price * (budget - cost), size)
