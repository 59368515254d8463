"""The knapsack solver against enumeration and against HiGHS."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.synthetic import highs
from moe_rco.errors import BudgetError, UserError
from moe_rco.optim import MCKPSolution, mckp, solve_mckp
from tests.optim.problems import Knapsack, examples, large_knapsack, small_knapsack


def solve(problem: Knapsack, **extra) -> MCKPSolution:
    return solve_mckp(problem.values, problem.costs, problem.budget, **problem.arguments(), **extra)


def assert_exact(problem: Knapsack) -> bool:
    """Compare with enumeration; return whether the problem was feasible."""
    best, cheapest = problem.enumerate()
    if best is None:
        with pytest.raises(BudgetError) as caught:
            solve(problem)
        assert cheapest is None or f" {cheapest}, the smallest cost" in str(caught.value)
        return False
    solution = solve(problem)
    rows = np.arange(len(problem.costs))
    assert problem.feasible(solution.choice)
    assert solution.cost == problem.costs[rows, solution.choice].sum()
    assert solution.status == "optimal"
    tolerance = 1e-12 * (1 + np.abs(problem.values).max(axis=1).sum())
    assert solution.value == pytest.approx(problem.values[rows, solution.choice].sum(), abs=tolerance)
    assert solution.value == pytest.approx(best, abs=tolerance)
    assert solution.bound >= best - tolerance
    return True


@examples(200)
@given(st.integers(0, 2**32))
def test_equals_enumeration(seed):
    assert_exact(small_knapsack(np.random.default_rng(seed)))


def test_equals_enumeration_on_three_thousand_problems():
    rng = np.random.default_rng(0)
    feasible = sum(assert_exact(small_knapsack(rng)) for _ in range(3000))
    assert 1000 < feasible < 2900


def test_floors_that_bind_in_every_layer():
    rng = np.random.default_rng(1)
    for trial in range(1500):
        groups = 6
        costs = np.c_[np.zeros(groups, np.int64), rng.integers(1, 12, (groups, 2))]
        # Keeping loses value, or gains less than it costs elsewhere: then slack can pay for more than the floor.
        dropped = rng.normal(5 * (trial % 2), 1, groups)
        values = np.c_[dropped, rng.normal(2, 1, (groups, 2))]
        layer = np.repeat(np.arange(3), 2)
        floor = rng.integers(1, 3, 3)
        problem = Knapsack(values, costs, int(rng.integers(5, 50)), floor, layer, np.ones(costs.shape, bool))
        assert_exact(problem)


@pytest.mark.parametrize("seed", range(6))
def test_equals_highs(seed):
    problem = large_knapsack(seed, ratio=[0.5, 0.3, 0.13, 0.05, 0.03, 0.02][seed])
    if seed == 3:  # costs without a common divisor, options missing
        rng = np.random.default_rng(seed)
        costs = problem.costs + (problem.costs > 0) * rng.integers(0, 999, problem.costs.shape)
        allowed = rng.random(costs.shape) < 0.8
        allowed[:, 1] = allowed[:, 0] = True
        problem = dataclasses.replace(problem, costs=costs, allowed=allowed)
    solution = solve(problem)
    assert solution.status == "optimal"
    assert problem.feasible(solution.choice)
    assert solution.value == pytest.approx(
        highs(problem.values, problem.costs, problem.budget, **problem.arguments()), rel=1e-7
    )


@pytest.mark.parametrize("ratio", [0.5, 0.2, 0.05, 0.02])
def test_the_size_of_qwen3_30b_is_proved_optimal(ratio):
    problem = large_knapsack(0, layers=48, experts=128, ratio=ratio)
    rng = np.random.default_rng(1)
    warm = None
    for _ in range(3):
        noisy = dataclasses.replace(
            problem, values=10 * problem.values + rng.gumbel(size=problem.values.shape)
        )
        solution = solve(noisy, warm=warm)
        assert solution.status == "optimal"
        assert problem.feasible(solution.choice)
        assert solution.bound - solution.value <= 1e-12 * abs(solution.bound)
        cold = solve(noisy)
        assert solution.value == pytest.approx(cold.value, rel=1e-12)
        warm = solution


def subset_sum(seed: int) -> Knapsack:
    """Value equals cost, costs share no divisor and nothing fills the budget: the bound proves nothing."""
    rng = np.random.default_rng(seed)
    costs = np.c_[np.zeros(60, np.int64), 10**9 * rng.integers(10**5, 10**6, 60) + rng.integers(0, 2, 60)]
    half = int(costs[:, 1].sum() // 2 // 10**9 * 10**9)
    ones = np.zeros(60, np.int64)
    return Knapsack(costs.astype(float), costs, half - 1, ones[:1], ones, np.ones(costs.shape, bool))


def test_a_search_that_runs_out_of_memory_is_feasible_with_an_honest_bound():
    rng = np.random.default_rng(5)
    for _ in range(200):
        problem = small_knapsack(rng)
        best, _ = problem.enumerate()
        if best is None:
            continue
        knapsack = mckp.Knapsack(problem.costs, problem.budget, **problem.arguments())
        solution = knapsack.solve(problem.values, max_states=12)
        assert problem.feasible(solution.choice)
        assert solution.value - 1e-9 <= best <= solution.bound + 1e-9
        if solution.status == "optimal":
            assert solution.value == pytest.approx(best, abs=1e-9)
    hard = subset_sum(0)
    knapsack = mckp.Knapsack(hard.costs, hard.budget)
    solution = knapsack.solve(hard.values, max_states=1 << 12)
    assert solution.status == "feasible"
    assert hard.feasible(solution.choice)
    assert 0 <= solution.bound - solution.value <= 1e-3 * solution.bound


def test_torch_tensors_and_numpy_arrays_give_the_same():
    problem = large_knapsack(2)
    solution = solve(problem)
    again = solve_mckp(
        torch.from_numpy(problem.values).requires_grad_(True),
        torch.from_numpy(problem.costs),
        problem.budget,
        floor=torch.from_numpy(problem.floor),
        layer=torch.from_numpy(problem.layer),
        allowed=torch.from_numpy(problem.allowed),
    )
    assert np.array_equal(solution.choice, again.choice)


def test_one_number_as_floor_holds_in_every_layer():
    values, costs = np.array([[5.0, 0.0]] * 6), np.array([[0, 7]] * 6)
    solution = solve_mckp(values, costs, 42, floor=2, layer=np.array([0, 0, 0, 1, 1, 1]))
    assert solution.cost == 28
    assert solution.value == 10.0


def test_the_smallest_feasible_cost_is_in_the_message():
    values, costs = np.zeros((4, 2)), np.array([[0, 70], [0, 90], [0, 50], [0, 20]])
    with pytest.raises(BudgetError, match="budget 89 is below 90"):
        solve_mckp(values, costs, 89, floor=1, layer=np.array([0, 0, 1, 1]))
    with pytest.raises(BudgetError, match="fewer groups"):
        solve_mckp(values, costs, 300, floor=3, layer=np.array([0, 0, 1, 1]))


@pytest.mark.parametrize(
    "arguments",
    [
        {"values": np.zeros((2, 3))},
        {"values": np.array([[0.0, np.nan], [0.0, 0.0]])},
        {"costs": np.array([[0.0, 1.0], [0.0, 1.0]])},
        {"costs": np.array([[0, -1], [0, 1]])},
        {"costs": np.array([[0, 1 << 62], [0, 1 << 62]])},
        {"budget": 1.5},
        {"allowed": np.array([[False, False], [True, True]])},
        {"allowed": np.ones((2, 2))},
        {"floor": 0.5},
        {"floor": np.array([0, 0, 0])[:0]},
        {"floor": 1, "layer": np.array([0, -1])},
        {"floor": 1, "layer": np.array([0])},
    ],
)
def test_malformed_input_is_refused(arguments):
    good = {"values": np.zeros((2, 2)), "costs": np.array([[0, 1], [0, 1]]), "budget": 1}
    with pytest.raises(UserError):
        solve_mckp(**(good | arguments))
