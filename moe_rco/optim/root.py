"""Many independent increasing scalar equations at once: safeguarded Newton with brackets, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_ITERATIONS = 400
# Newton normally ends within this many evaluations; from there on every third step halves or widens the
# bracket.
_PATIENCE = 5


@dataclass(frozen=True)
class Root:
    """`t` [S], the remaining `residual` [S] and whether `t` is the point evaluated last in every segment."""

    t: Tensor
    residual: Tensor
    is_last: bool


def _newton_step(value: Tensor, slope: Tensor, target: Tensor, full: Tensor) -> Tensor:
    """Newton on logit(value / full): exactly linear in t for two options, nearly so when saturated."""
    room = full - value
    ratio = torch.log(target / value) - torch.log((full - target) / room)
    step = ratio * value * room / (slope * full)
    plain = (target - value) / slope
    return torch.where(torch.isfinite(step), step, plain)


def solve_increasing(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], target: Tensor, full: Tensor, tolerance: Tensor
) -> Root:
    """Find t [S] with |value(t) - target| <= tolerance, starting at 0.

    `evaluate(t)` returns value [S], increasing from 0 to `full` in each segment, and its derivative [S].
    Segments that are already within the tolerance at t = 0 stay there exactly. Returns the best points seen;
    the caller judges the residual. Steps that leave the bracket are replaced by bisection, and by widening
    while there is no bracket.
    """
    t = torch.zeros_like(target)
    low, high = torch.full_like(t, -torch.inf), torch.full_like(t, torch.inf)
    best_t, best_residual = t.clone(), torch.full_like(t, torch.inf)
    for iteration in range(_MAX_ITERATIONS):
        value, slope = evaluate(t)
        error = value - target
        better = error.abs() < best_residual
        best_t, best_residual = (
            torch.where(better, t, best_t),
            torch.where(better, error.abs(), best_residual),
        )
        active = best_residual > tolerance
        if not bool(active.any()):
            return Root(best_t, best_residual, is_last=bool(torch.equal(best_t, t)))
        low, high = torch.where(error < 0, t, low), torch.where(error > 0, t, high)
        new = t + _newton_step(value, slope, target, full)
        safeguard = iteration >= _PATIENCE and iteration % 3 == 2
        new = _keep_inside(new, t, low, high, error, safeguard)
        stuck = (new == t) | (new <= low) | (new >= high)
        if bool((stuck | ~active).all()):
            break
        t = torch.where(active & ~stuck, new, best_t)
    return Root(best_t, best_residual, is_last=bool(torch.equal(best_t, t)))


def _keep_inside(new: Tensor, t: Tensor, low: Tensor, high: Tensor, error: Tensor, safeguard: bool) -> Tensor:
    bracketed = torch.isfinite(low) & torch.isfinite(high)
    middle = low + (high - low) / 2
    direction = torch.where(error < 0, 1.0, -1.0)
    reach = torch.clamp(8 * t.abs(), min=32.0)
    wider = t + direction * torch.clamp(4 * t.abs(), min=4.0)
    # While nothing brackets the root, Newton may go `reach` far at most; a plateau would send it to infinity.
    capped = torch.where((new - t).abs() <= reach, new, t + direction * reach)
    if safeguard:
        return torch.where(bracketed, middle, wider)
    inside = torch.isfinite(new) & (new > low) & (new < high)
    return torch.where(
        bracketed, torch.where(inside, new, middle), torch.where(torch.isfinite(new), capped, wider)
    )
