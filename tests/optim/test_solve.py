"""What every method behind `solve` promises, and what is particular to the rivals."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_rco.errors import UserError
from moe_rco.optim import BudgetManifold, Knapsack, Method, evolve, solve, solve_mckp
from moe_rco.optim.evolution import OFFSPRING, passes
from moe_rco.optim.relaxation import Penalized
from moe_rco.optim.solve import evolution_steps
from tests.optim.problems import large_knapsack

METHODS = get_args(Method)
PROBLEM = large_knapsack(0, layers=3, experts=8, ratio=0.2)
VALUES = torch.from_numpy(PROBLEM.values)


def loss(sample: Tensor) -> Tensor:
    """Not a sum over groups: neighbours of the same layer weigh on each other."""
    each = -(sample * VALUES).sum(1).reshape(3, 8)
    return each.sum() + 0.3 * (each[:, 1:] * each[:, :-1]).sum()


def value_of(choice: np.ndarray) -> float:
    return float(loss(torch.nn.functional.one_hot(torch.from_numpy(choice), 6).double()))


def run(method: Any, **extra: Any) -> Any:
    settings = {"steps": 60, "samples": 2, "seed": 1, "weight": 100.0} | PROBLEM.arguments() | extra
    if method == "evolution":
        settings.pop("weight")
    return solve(PROBLEM.costs, PROBLEM.budget, loss, method=method, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_results_are_feasible_valued_and_repeatable(method: Any) -> None:
    result = run(method)
    assert PROBLEM.feasible(result.choice)
    assert result.assignment is result.choice
    assert result.cost == PROBLEM.costs[np.arange(24), result.choice].sum() <= PROBLEM.budget
    assert result.value == pytest.approx(value_of(result.choice), rel=1e-12)
    assert result.status == "completed"
    assert result.evaluations > 0
    assert np.array_equal(result.choice, run(method).choice)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_improves_on_its_start(method: Any) -> None:
    start = solve_mckp(np.random.default_rng(3).random(PROBLEM.costs.shape), PROBLEM.costs, PROBLEM.budget,
                       **PROBLEM.arguments()).choice  # fmt: skip
    result = run(method, start=start)
    assert result.value < 0.8 * value_of(start)
    with pytest.raises(UserError, match="start"):
        run(method, start=np.full(24, 5))


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on(method: Any) -> None:
    seen: dict[int, Any] = {}
    whole = run(method, on_step=lambda record: seen.setdefault(record.step, record.state()))
    resumed = run(method, state=seen[7])
    assert resumed.history == whole.history
    assert np.array_equal(resumed.choice, whole.choice)
    assert (resumed.value, resumed.evaluations) == (whole.value, whole.evaluations)


@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_of_its_own_decides(method: Any) -> None:
    result = run(method, evaluate=lambda choice: float((choice != 2).sum()), evaluate_every=1)
    assert result.value == (result.choice != 2).sum()


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_of_nothing_buys_what_costs_nothing(method: Any) -> None:
    costs = torch.tensor([[0, 3], [0, 5], [2, 0]])
    result = solve(costs, 0, lambda sample: sample[:, 1].sum(), method=method, steps=3)
    assert result.choice.tolist() == [0, 0, 1]


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(UserError, match=r"'annealing'; there are rco, penalty"):
        run("annealing")


def test_evolution_takes_as_many_passes_as_the_others() -> None:
    assert evolution_steps(60, 2) * passes(4) <= 60 * 2 * 3 < (evolution_steps(60, 2) + 1) * passes(4)
    assert run("evolution").evaluations == 60 * 2 * 4 // OFFSPRING * OFFSPRING


def test_evolution_compares_a_generation_on_the_same_batches() -> None:
    calls: list[tuple[int, int]] = []

    def value(choice: np.ndarray, generation: int, batches: int) -> float:
        calls.append((generation, batches))
        return value_of(choice)

    feasible = Knapsack(PROBLEM.costs, PROBLEM.budget, **PROBLEM.arguments())
    start = feasible.solve(np.zeros(PROBLEM.costs.shape)).choice
    evolve(value, PROBLEM.costs, feasible, start, generations=2)
    assert calls == [(0, 4)] + [(1, 1)] * 8 + [(1, 4)] * 3 + [(2, 1)] * 8 + [(2, 4)] * 3
    with pytest.raises(UserError, match="not a number"):
        evolve(lambda *_: float("nan"), PROBLEM.costs, feasible, start, generations=1)


@pytest.mark.parametrize("dual", [False, True])
def test_the_price_of_missing_the_budget_is_its_own_gradient(dual: bool) -> None:
    manifold = BudgetManifold(torch.from_numpy(PROBLEM.costs), float(PROBLEM.budget))
    logits = torch.randn(PROBLEM.costs.shape, dtype=torch.float64).requires_grad_()
    missed = manifold.expected_cost(logits).sum() / PROBLEM.budget - 1
    price = 7 * missed**2 + (7 / 10 * missed.detach() * missed if dual else 0)
    (expected,) = torch.autograd.grad(price, logits)
    relaxation = Penalized(manifold, 0.1, (0.0, 0.0), 7.0, dual=dual)
    relaxation.step(logits.detach(), torch.zeros_like(logits))
    assert torch.allclose(relaxation.state_dict()["first"], expected, rtol=1e-9, atol=1e-12)


def test_dual_ascent_meets_the_budget() -> None:
    result = run("lagrangian", steps=400, weight=3.0)
    assert result.history[-1].budget_error < 0.05
    assert run("penalty", weight=1e-6, steps=400).history[-1].budget_error > 0.5
