"""Exact search over a small core of the knapsack: dynamic programming by lists (Pisinger 1995), with floors.

Only a few options have a small loss against the Lagrangian solution. All combinations of those whose losses
add up to at most `limit` are enumerated group by group, keeping one list of states sorted by cost and free of
dominated states.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def search_core(
    first, option_cost, option_loss, option_kept, last_of, surplus, keep_price, price, target, limit, width,
    max_states,
):  # fmt: skip
    """The smallest loss over all combinations of core options, if it is at most `limit`.

    Args:
        first: [G + 1]; the options of core group g are first[g] to first[g + 1] - 1.
        option_cost, option_loss, option_kept: changes against the base choice (loss >= 0; kept -1, 0 or 1).
        last_of: [G]; the tracked layer that ends with group g, -1 within one, -2 for all other groups.
        surplus, keep_price: [L]; kept groups above the floor in the base choice, and the layer's multiplier.
        price, target: price of cost; cost that the core may add to the base choice (may be negative).
        width: number of values of the kept counter, odd; 1 without tracked layers.
        max_states: size of the pool of states.

    Returns (loss, picks [G], complete): infinite loss when nothing is found; the picked options; False when
    the pool was too small and the states with the largest losses were dropped.
    """
    groups = len(first) - 1
    least, most = _reach(first, option_cost)
    keys = np.empty(max_states, np.int64)
    losses = np.empty(max_states)
    parents = np.empty(max_states, np.int32)
    picks = np.empty(max_states, np.int32)
    # A state's key is cost * width + kept, so that sorting by key sorts by cost.
    keys[0], losses[0], parents[0], picks[0] = width // 2, 0.0, -1, -1
    level = np.zeros(groups + 2, np.int64)
    level[1] = 1
    widest = 1
    for g in range(groups):
        widest = max(widest, first[g + 1] - first[g])
    beam = max_states // (groups + widest + 1)
    complete = True
    result = np.full(groups, -1, np.int64)
    for g in range(groups):
        begin, stop = level[g], level[g + 1]
        options = np.arange(first[g], first[g + 1])
        shift = option_cost[options] * width + option_kept[options]
        pointers = np.full(len(options), begin, np.int64)
        end, ceiling = stop, -np.inf
        while True:
            best, key = -1, 0
            for o in range(len(options)):
                if pointers[o] < stop and (best < 0 or keys[pointers[o]] + shift[o] < key):
                    best, key = o, keys[pointers[o]] + shift[o]
            if best < 0:
                break
            parent = pointers[best]
            pointers[best] += 1
            loss = losses[parent] + option_loss[options[best]]
            room = target - key // width
            if loss > limit or room < least[g + 1] or loss + price * max(0, room - most[g + 1]) > limit:
                continue
            keys[end], losses[end], parents[end], picks[end] = key, loss, parent, options[best]
            end, ceiling = _keep(
                keys, losses, parents, picks, stop, end, price, width, last_of[g] == -2, ceiling
            )
        if last_of[g] >= 0:
            layer = last_of[g]
            end = _close_layer(
                keys, losses, parents, picks, stop, end, surplus[layer], keep_price[layer], price, limit,
                width,
            )  # fmt: skip
        if end - stop > beam:
            end = _thin(keys, losses, parents, picks, stop, end, beam)
            complete = False
        level[g + 2] = end
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
    return best_loss, result, complete


@njit(cache=True, nogil=True)
def _reach(first, option_cost):
    """Least and most cost [G + 1] that the groups from g on can add."""
    groups = len(first) - 1
    least = np.zeros(groups + 1, np.int64)
    most = np.zeros(groups + 1, np.int64)
    for g in range(groups - 1, -1, -1):
        costs = option_cost[first[g] : first[g + 1]]
        least[g], most[g] = least[g + 1] + costs.min(), most[g + 1] + costs.max()
    return least, most


@njit(cache=True, nogil=True)
def _keep(keys, losses, parents, picks, begin, end, price, width, dominate, ceiling):
    """Decide on the state just written at `end`, in order of keys; return (new end, highest gain so far).

    Of equal keys the smaller loss stays. With `dominate` a state must also gain more than every cheaper one.
    """
    gain = price * (keys[end] // width) - losses[end]
    if end > begin and keys[end - 1] == keys[end]:
        if losses[end] < losses[end - 1]:
            losses[end - 1], parents[end - 1], picks[end - 1] = losses[end], parents[end], picks[end]
            return end, max(ceiling, gain)
        return end, ceiling
    if dominate and gain <= ceiling:
        return end, ceiling
    return end + 1, max(ceiling, gain)


@njit(cache=True, nogil=True)
def _close_layer(keys, losses, parents, picks, begin, stop, surplus, keep_price, price, limit, width):
    """Drop states below the floor, charge the multiplier for kept groups above it, forget the counter."""
    end, ceiling = begin, -np.inf
    for state in range(begin, stop):
        above = surplus + keys[state] % width - width // 2
        loss = losses[state] + keep_price * max(0, above)
        if above < 0 or loss > limit:
            continue
        keys[end] = (keys[state] // width) * width + width // 2
        losses[end], parents[end], picks[end] = loss, parents[state], picks[state]
        end, ceiling = _keep(keys, losses, parents, picks, begin, end, price, width, True, ceiling)
    return end


@njit(cache=True, nogil=True)
def _thin(keys, losses, parents, picks, begin, stop, beam):
    """Keep the `beam` states with the smallest losses, in their order; of equal losses an even selection."""
    border = np.partition(losses[begin:stop].copy(), beam - 1)[beam - 1]
    below = (losses[begin:stop] < border).sum()
    ties, wanted = (losses[begin:stop] == border).sum(), beam - below
    end, tie = begin, 0
    for state in range(begin, stop):
        keep = losses[state] < border
        if losses[state] == border:
            keep = (tie * wanted) // ties != ((tie + 1) * wanted) // ties
            tie += 1
        if keep:
            keys[end], losses[end] = keys[state], losses[state]
            parents[end], picks[end] = parents[state], picks[state]
            end += 1
    return end


@njit(cache=True, nogil=True)
def fill_up(values, costs, allowed, ranked, choice, room):
    """Change `choice` by the options `ranked` (flat indices) in turn, where that gains value, fits into `room`
    and drops no kept group."""
    options = values.shape[1]
    for flat in ranked:
        i, k = flat // options, flat % options
        extra = costs[i, k] - costs[i, choice[i]]
        keeps = costs[i, k] > 0 or costs[i, choice[i]] == 0
        if allowed[i, k] and keeps and extra <= room and values[i, k] > values[i, choice[i]]:
            room -= extra
            choice[i] = k
