"""Exact search over a small core of the knapsack: dynamic programming by lists (Pisinger 1995), with floors.

Only a few options have a small loss against the Lagrangian solution. All combinations of those whose losses
add up to at most `limit` are enumerated group by group, keeping one list of states sorted by cost and free
of dominated states.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def _push(keys, losses, parents, picks, begin, end, key, loss, parent, pick, price, width, dominate, ceiling):
    """Append a state unless dominated; return (end, ceiling), the highest gain in the list so far.

    States arrive sorted by key = cost * width + kept. Equal keys keep the smaller loss; with `dominate` a
    state must also gain more than every cheaper one.
    """
    gain = price * (key // width) - loss
    if end > begin and keys[end - 1] == key:
        if loss >= losses[end - 1]:
            return end, ceiling
        end -= 1
    elif dominate and gain <= ceiling:
        return end, ceiling
    keys[end], losses[end], parents[end], picks[end] = key, loss, parent, pick
    return end + 1, max(ceiling, gain)


@njit(cache=True, nogil=True)
def search_core(
    first,
    option_cost,
    option_loss,
    option_kept,
    last_of,
    surplus,
    keep_price,
    price,
    target,
    limit,
    width,
    max_states,
):
    """The smallest loss over all combinations of core options, if it is at most `limit`.

    Args:
        first: [G + 1]; options first[g]..first[g + 1] belong to core group g.
        option_cost, option_loss, option_kept: changes against the base choice (cost, loss >= 0, kept
        -1/0/+1).
        last_of: [G], tracked layer that ends with group g, -1 within one, -2 for groups of untracked layers.
        surplus, keep_price: per tracked layer, kept groups above the floor in the base choice, and its
        multiplier.
        price, target: price of cost, and the cost that the core may add to the base choice (may be negative).
        width: number of values of the kept counter (odd; 1 without tracked layers).
        max_states: size of the pool of states.

    Returns (loss, picks [G], complete): infinite loss when nothing is found, picks index into the options,
    `complete` False when the pool was too small and states with large losses were dropped.
    """
    groups = len(first) - 1
    middle = width // 2
    least = np.zeros(groups + 1, np.int64)
    most = np.zeros(groups + 1, np.int64)
    for g in range(groups - 1, -1, -1):
        low = high = option_cost[first[g]]
        for o in range(first[g], first[g + 1]):
            low, high = min(low, option_cost[o]), max(high, option_cost[o])
        least[g], most[g] = least[g + 1] + low, most[g + 1] + high
    keys = np.empty(max_states, np.int64)
    losses = np.empty(max_states)
    parents = np.empty(max_states, np.int32)
    picks = np.empty(max_states, np.int32)
    level = np.zeros(groups + 2, np.int64)
    keys[0], losses[0], parents[0], picks[0] = middle, 0.0, -1, -1
    level[1] = 1
    result = np.full(groups, -1, np.int64)
    for g in range(groups):
        begin, stop = level[g], level[g + 1]
        count = first[g + 1] - first[g]
        if (stop - begin) * count > max_states - stop:
            return np.inf, result, False
        tracked = last_of[g] != -2
        pointers = np.full(count, begin, np.int64)
        end, ceiling = stop, -np.inf
        while True:
            best, key = -1, 0
            for o in range(count):
                if pointers[o] < stop:
                    k = keys[pointers[o]] + option_cost[first[g] + o] * width + option_kept[first[g] + o]
                    if best < 0 or k < key:
                        best, key = o, k
            if best < 0:
                break
            parent = pointers[best]
            pointers[best] += 1
            loss = losses[parent] + option_loss[first[g] + best]
            if loss > limit:
                continue
            cost = key // width
            if cost + least[g + 1] > target:
                continue
            if loss + price * max(0, target - cost - most[g + 1]) > limit:
                continue
            end, ceiling = _push(
                keys,
                losses,
                parents,
                picks,
                stop,
                end,
                key,
                loss,
                parent,
                first[g] + best,
                price,
                width,
                not tracked,
                ceiling,
            )
        if last_of[g] >= 0:
            end = _close_layer(
                keys,
                losses,
                parents,
                picks,
                stop,
                end,
                surplus[last_of[g]],
                keep_price[last_of[g]],
                price,
                limit,
                width,
            )
        level[g + 2] = end
        if end == stop:
            return np.inf, result, True
    best_state, best_loss = -1, np.inf
    for state in range(level[groups], level[groups + 1]):
        total = losses[state] + price * (target - keys[state] // width)
        if total < best_loss and total <= limit:
            best_state, best_loss = state, total
    state = best_state
    for g in range(groups - 1, -1, -1):
        if state >= 0:
            result[g] = picks[state]
            state = parents[state]
    return best_loss, result, True


@njit(cache=True, nogil=True)
def _close_layer(keys, losses, parents, picks, begin, stop, surplus, keep_price, price, limit, width):
    """Drop states below the layer's floor, charge its multiplier for kept groups above it, forget the
    counter."""
    middle = width // 2
    end, ceiling = begin, -np.inf
    for state in range(begin, stop):
        above = surplus + keys[state] % width - middle
        loss = losses[state] + keep_price * max(0, above)
        if above < 0 or loss > limit:
            continue
        key = (keys[state] // width) * width + middle
        end, ceiling = _push(
            keys,
            losses,
            parents,
            picks,
            begin,
            end,
            key,
            loss,
            parents[state],
            picks[state],
            price,
            width,
            True,
            ceiling,
        )
    return end
