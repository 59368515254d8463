"""Local search by exact swaps, for losses that are cheap and do not change from call to call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_rco.errors import UserError
from moe_rco.optim.feasible import FeasibleSet

_PARTNERS = 64
"""Second moves tried with a first one."""
_KICK = 3


def improve(
    value: Callable[[NDArray[np.int64]], float],
    feasible: FeasibleSet,
    options: int,
    choice: NDArray[np.int64],
    best: float,
    *,
    evaluations: int,
    seed: int = 0,
) -> tuple[NDArray[np.int64], float]:
    """Move one group or two at a time to any other options while that lowers the loss.

    Where no such move does, a few random moves lead away from there, and from the best assignment again if that
    leads nowhere. Ends after `evaluations` calls of `value`.

    Args:
        value: loss of a choice int64 [N].
        feasible: the assignments allowed.
        options: K.
        choice, best: where to start, and its loss.

    Returns the best choice and its loss.
    """
    rng, left = np.random.default_rng(seed), evaluations
    here, level = choice, best
    while left > 0:
        for other in _neighbours(here, options, feasible, rng):
            left -= 1
            found = value(other)
            if found < level:
                here, level = other, found
                break
            if left <= 0:
                break
        else:
            here, left = _kicked(choice, options, feasible, rng), left - 1
            level = value(here)
        if level < best:
            choice, best = here, level
    return choice, best


def _neighbours(
    choice: NDArray[np.int64], options: int, feasible: FeasibleSet, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Feasible choices that differ in one group, then in two, in random order."""
    size = len(choice) * options
    for first in rng.permutation(size):
        yield from _moved(choice, [first], options, feasible)
    for first in rng.permutation(size):
        seconds = rng.permutation(size) if size <= _PARTNERS else rng.integers(size, size=_PARTNERS)
        for second in seconds:
            if first < second or size > _PARTNERS:
                yield from _moved(choice, [first, second], options, feasible)


def _moved(
    choice: NDArray[np.int64], moves: Sequence[Any], options: int, feasible: FeasibleSet
) -> Iterator[NDArray[np.int64]]:
    """The choice after some moves, each group * options + option, if that is another one and allowed."""
    groups, chosen = np.divmod(np.array(moves), options)
    if len(set(groups.tolist())) < len(groups) or (choice[groups] == chosen).any():
        return
    changed = choice.copy()
    changed[groups] = chosen
    try:
        yield feasible.checked(changed, "a swap")
    except UserError:
        return


def _kicked(
    choice: NDArray[np.int64], options: int, feasible: FeasibleSet, rng: np.random.Generator
) -> NDArray[np.int64]:
    """A few random moves away."""
    for _ in range(_PARTNERS):
        moves = rng.integers(len(choice) * options, size=min(_KICK, len(choice)))
        for changed in _moved(choice, moves.tolist(), options, feasible):
            return changed
    return choice
