"""Local search by exact swaps: against enumeration, and within its budget of calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eval.synthetic import pairwise, separable
from moe_rco.optim import Knapsack, minimize
from moe_rco.optim.swaps import improve


def value_of(problem, choice: np.ndarray) -> float:
    options = problem.costs.shape[1]
    return float(problem.loss(torch.nn.functional.one_hot(torch.from_numpy(choice), options).double()))


@pytest.mark.parametrize("seed", range(3))
def test_given_enough_calls_it_finds_the_optimum(seed: int) -> None:
    problem = pairwise(seed, groups=6, options=3)
    feasible = Knapsack(problem.costs, problem.budget)
    calls: list[np.ndarray] = []

    def value(choice: np.ndarray) -> float:
        calls.append(feasible.checked(choice, "a call"))
        return value_of(problem, choice)

    start = feasible.solve(np.zeros(problem.costs.shape)).choice
    first = value_of(problem, start)
    choice, best = improve(value, feasible, 3, start, first, evaluations=1500)
    assert len(calls) == 1500
    assert best == pytest.approx(problem.optimum, abs=1e-9)
    assert best == pytest.approx(value_of(problem, choice), abs=1e-12)
    some, better = improve(value, feasible, 3, start, first, evaluations=40)
    assert len(calls) == 1540
    assert better <= first
    assert better == pytest.approx(value_of(problem, some), abs=1e-12)


def test_minimize_ends_with_swaps_unless_judged_on_other_data() -> None:
    problem = pairwise(1)
    alone = minimize(problem.loss, problem.costs, problem.budget, steps=50, swaps=0)
    both = minimize(problem.loss, problem.costs, problem.budget, steps=50)
    assert both.evaluations == alone.evaluations + 50 * 4
    assert both.value <= alone.value
    judged = minimize(
        problem.loss,
        problem.costs,
        problem.budget,
        steps=2,
        evaluate=lambda choice: value_of(problem, choice),
    )
    assert judged.name != "swaps"


def test_known_optima_are_true() -> None:
    problem = separable(8, seed=0, options=3)
    every = np.stack(np.meshgrid(*[np.arange(3)] * 8), axis=-1).reshape(-1, 8)
    fits = problem.costs[np.arange(8), every].sum(1) <= problem.budget
    assert min(value_of(problem, choice) for choice in every[fits]) == pytest.approx(problem.optimum)
    small = pairwise(0, groups=4, options=3)
    every = np.stack(np.meshgrid(*[np.arange(3)] * 4), axis=-1).reshape(-1, 4)
    fits = small.costs[np.arange(4), every].sum(1) <= small.budget
    assert min(value_of(small, choice) for choice in every[fits]) == pytest.approx(small.optimum)
    assert small.costs[np.arange(4), small.start()].sum() <= small.budget
