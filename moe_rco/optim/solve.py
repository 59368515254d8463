"""One interface to every method that needs nothing but a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_rco.errors import UserError
from moe_rco.optim.evolution import GROWTH, OFFSPRING, Value, evolve, passes
from moe_rco.optim.feasible import FeasibleSet
from moe_rco.optim.mckp import Knapsack
from moe_rco.optim.solver import Constraint, SolveResult, minimize
from moe_rco.optim.trace import StepRecord

Method = Literal["rco", "penalty", "lagrangian", "evolution"]
SEARCHES: dict[str, Method] = {method: method for method in get_args(Method)}
"""The methods by name, for names from elsewhere."""
BACKWARD = 2
"""Forward passes that a backward pass is counted as."""


def step_passes(samples: int, batch: int) -> int:
    """Forward passes of one sequence that a step is counted as, with so many samples on batches of so many sequences."""
    return samples * (1 + BACKWARD) * batch


def evolution_steps(steps: int, samples: int, growth: int = GROWTH) -> int:
    """Generations that take as many passes as `steps` steps of `samples` samples, and without growth their swaps."""
    return max(1, steps * samples * (1 + BACKWARD + (growth == 0)) // passes(growth))


def solve(
    costs: Any,
    budget: int,
    loss: Callable[[Tensor], Tensor],
    *,
    method: Method = "rco",
    steps: int = 300,
    samples: int = 4,
    start: Any = None,
    value: Value | None = None,
    floor: Any = None,
    layer: Any = None,
    allowed: Any = None,
    feasible: FeasibleSet | None = None,
    evaluate: Callable[[NDArray[np.int64]], float] | None = None,
    evaluate_every: int = 0,
    on_step: Callable[[StepRecord], None] | None = None,
    state: Any = None,
    seed: int = 0,
    **options: Any,
) -> SolveResult:
    """Choose one option per group with a method of your choice, at the price of `steps` times `samples` passes.

    Args:
        method: "rco"; "penalty" or "lagrangian", the same search with the budget as a price in the loss;
            "evolution", which needs no gradients and takes as many forward passes as those others take forward
            and, each counted as two, backward.
        start: a choice int64 [N] to start from; evolution's first parent, for the others one candidate.
            Where it is left out evolution starts from the cheapest assignment, its raises filling the budget.
        value: for evolution, see `evolve`; without it the loss stands in, which must then be deterministic.
        options: further arguments of `minimize`, such as `lr`, `init_logits` and `weight`.

    The other arguments, and errors, are those of `minimize`. `evaluations` of the result counts calls of the
    loss, or forward passes of evolution.
    """
    if method not in SEARCHES:
        raise UserError(f"no method {method!r}; there are {', '.join(SEARCHES)}")
    costs = torch.as_tensor(costs)
    if feasible is None:
        feasible = Knapsack(costs, budget, floor=floor, layer=layer, allowed=allowed)
    shared: dict[str, Any] = {
        "evaluate": evaluate, "evaluate_every": evaluate_every, "on_step": on_step, "state": state, "seed": seed,
    }  # fmt: skip
    if method == "evolution":
        if start is None:
            start = feasible.solve(-costs.double()).choice
        prices, growth = costs.cpu().numpy(), GROWTH if value else 0
        return evolve(
            value or _remembered(loss, prices.shape), prices, feasible, start, growth=growth,
            generations=evolution_steps(steps, samples, growth), **shared,
        )  # fmt: skip
    constraint: dict[str, Constraint] = {"rco": "manifold", "penalty": "penalty", "lagrangian": "lagrangian"}
    return minimize(
        loss, costs, budget, steps=steps, samples=samples, floor=floor, layer=layer, allowed=allowed,
        feasible=feasible, constraint=constraint[method], candidates={} if start is None else {"start": start},
        **shared, **options,
    )  # fmt: skip


def _remembered(loss: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> Value:
    """A deterministic loss of one-hot tensors as a function of a choice, remembering a generation's values."""
    known: dict[bytes, float] = {}

    def value(choice: NDArray[np.int64], generation: int, batches: int) -> float:
        key = choice.tobytes()
        if key not in known:
            if len(known) > 2 * OFFSPRING:
                known.pop(next(iter(known)))
            hard = torch.zeros(shape, dtype=torch.float64)
            with torch.no_grad():
                known[key] = float(loss(hard.scatter_(1, torch.from_numpy(choice)[:, None], 1.0)))
        return known[key]

    return value
