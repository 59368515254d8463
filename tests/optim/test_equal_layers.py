"""Layers that keep equally many groups at one option each: against enumeration, and at full size in time."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_rco.errors import BudgetError, UserError
from moe_rco.optim import EqualLayers, Knapsack, MCKPSolution, minimize, solve_mckp
from tests.optim.problems import examples, large_knapsack


@dataclass(frozen=True)
class Problem:
    """Arguments of EqualLayers, and the column that drops a group (None where there is none)."""

    values: NDArray[np.float64]
    costs: NDArray[np.int64]
    floor: int
    layer: NDArray[np.int64]
    drop: int | None

    def feasible(self) -> list[tuple[int, NDArray[np.int64]]]:
        """(cost, choice) of everything that keeps floor and layout, at any budget."""
        layers, size = int(self.layer.max()) + 1, int(np.sum(self.layer == 0))
        kept = [k for k in range(self.costs.shape[1]) if k != self.drop]
        found = []
        for count in range(self.floor, size + 1) if self.drop is not None else [size]:
            subsets = list(itertools.combinations(range(size), count))
            for picks in itertools.product(itertools.product(kept, subsets), repeat=layers):
                choice = np.full(len(self.costs), -1 if self.drop is None else self.drop)
                for layer, (option, subset) in enumerate(picks):
                    choice[np.flatnonzero(self.layer == layer)[list(subset)]] = option
                found.append((int(self.costs[np.arange(len(choice)), choice].sum()), choice))
        return found

    def solve(self, budget: int):
        return EqualLayers(self.costs, budget, floor=self.floor, layer=self.layer).solve(self.values)


def make_problem(seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    layers, size, options = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 4))
    drop = int(rng.integers(options + 1)) if rng.random() < 0.8 else None
    prices = rng.integers(1, [5, 10**9][int(rng.integers(2))], (layers, options))
    if rng.random() < 0.5:
        prices = np.broadcast_to(prices[0], prices.shape)
    if drop is not None:
        prices = np.insert(prices, drop, 0, axis=1)
    layer = rng.permutation(np.repeat(np.arange(layers), size))
    values = rng.normal(size=(len(layer), prices.shape[1]))
    if rng.random() < 0.4:  # ties
        values = rng.integers(0, 3, values.shape).astype(float)
    return Problem(values, prices[layer], int(rng.integers(0, size + 1)), layer, drop)


@examples(150)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_exact_against_enumeration(seed: int, share: float) -> None:
    problem = make_problem(seed)
    everything = problem.feasible()
    costs = [cost for cost, _ in everything]
    budget = min(costs) + int(share * (max(costs) - min(costs)))
    rows = np.arange(len(problem.costs))
    best = max(problem.values[rows, choice].sum() for cost, choice in everything if cost <= budget)
    found = problem.solve(budget)
    assert found.status == "optimal"
    assert found.value == pytest.approx(best, abs=1e-9)
    assert found.value == pytest.approx(problem.values[rows, found.choice].sum(), abs=1e-9)
    assert found.cost <= budget
    assert any(np.array_equal(found.choice, choice) for cost, choice in everything if cost == found.cost)
    with pytest.raises(BudgetError, match=f"below {min(costs)}, the smallest"):
        problem.solve(min(costs) - 1)


def test_the_count_that_promises_most_is_not_always_the_best() -> None:
    """Two groups at the dear option would cost 20, one more than there is; the bound takes 15/16 of that."""
    values = np.array([[0.0, 1, 10], [0.0, 1, 9]])
    costs = np.array([[0, 2, 10]] * 2)
    found = EqualLayers(costs, 19, floor=0, layer=np.array([0, 0])).solve(values)
    assert (found.choice.tolist(), found.value, found.cost) == ([2, 0], 10, 10)


def test_without_proof_the_bound_is_of_all_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same problem, solved for two counts, the first of which might still hold more than the second."""
    solve, bounds = Knapsack.solve, list[float]()

    def unproved(self: Knapsack, values: object, **arguments: object) -> MCKPSolution:
        bounds.append(100.0 / (1 + len(bounds)))
        return replace(solve(self, values), bound=bounds[-1], status="feasible")

    monkeypatch.setattr(Knapsack, "solve", unproved)
    values = np.array([[0.0, 1, 10], [0.0, 1, 9]])
    costs = np.array([[0, 2, 10]] * 2)
    found = EqualLayers(costs, 19, floor=0, layer=np.array([0, 0])).solve(values)
    assert len(bounds) > 1
    assert (found.value, found.status, found.bound) == (10, "feasible", 100)


@examples(100)
@given(st.integers(0, 2**32))
def test_checked_knows_the_set(seed: int) -> None:
    """Every choice there is: those that are enumerated pass, and no other."""
    problem = make_problem(seed)
    everything = {tuple(choice.tolist()): cost for cost, choice in problem.feasible()}
    budget = sorted(everything.values())[len(everything) // 2]
    exact = EqualLayers(problem.costs, budget, floor=problem.floor, layer=problem.layer)
    rng = np.random.default_rng(seed)
    others = rng.integers(0, problem.costs.shape[1], (50, len(problem.costs)))
    for choice in (*everything, *map(tuple, others.tolist())):
        if everything.get(choice, budget + 1) <= budget:
            assert exact.checked(np.array(choice), "it").tolist() == list(choice)
        else:
            with pytest.raises(UserError, match="it "):
                exact.checked(np.array(choice), "it")


@pytest.mark.parametrize("ratio", [0.13, 0.3, 0.6])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_full_size_is_proved_in_time(ratio: float, noise: float) -> None:
    problem = large_knapsack(3, layers=48, experts=128, ratio=ratio)
    rng = np.random.default_rng(0)
    values = problem.values + noise * rng.gumbel(size=problem.values.shape)
    exact = EqualLayers(problem.costs, problem.budget, floor=8, layer=problem.layer)
    exact.solve(values)
    start = time.process_time()
    found = exact.solve(values)
    assert time.process_time() - start < 0.5  # 0.02 s on a quiet core
    assert found.status == "optimal"
    options = found.choice.reshape(48, 128)
    counts = (options > 0).sum(1)
    assert (counts == counts[0]).all()
    assert counts[0] >= 8
    assert all(len(set(row[row > 0].tolist())) == 1 for row in options)
    assert problem.budget - 48 * counts[0] * 129 * 73728 < found.cost <= problem.budget
    free = solve_mckp(values, problem.costs, problem.budget, floor=8, layer=problem.layer)
    assert found.value <= free.value + 1e-9 * abs(free.value)


def test_every_sample_of_a_search_is_in_the_set() -> None:
    problem = large_knapsack(2, layers=4, experts=16, ratio=0.2)
    exact = EqualLayers(problem.costs, problem.budget, floor=2, layer=problem.layer)
    samples = []

    def loss(sample: torch.Tensor) -> torch.Tensor:
        samples.append(exact.checked(sample.detach().argmax(1).numpy(), "sample"))
        return -(sample * torch.from_numpy(problem.values)).sum()

    result = minimize(
        loss, torch.from_numpy(problem.costs), problem.budget, steps=30, feasible=exact, swaps=0
    )
    assert len(samples) == result.evaluations == 30 * 4 + 2
    assert len({sample.tobytes() for sample in samples}) > 30
    assert result.value == pytest.approx(-exact.solve(problem.values).value, rel=1e-12)
    outside = solve_mckp(problem.values, problem.costs, problem.budget).choice
    with pytest.raises(UserError, match="equally many"):
        minimize(
            loss, torch.from_numpy(problem.costs), problem.budget, steps=1, feasible=exact,
            candidates={"outside": outside},
        )  # fmt: skip


PRICES = np.array([[0, 2, 4]] * 4)


@pytest.mark.parametrize(
    ("costs", "layer", "floor", "error", "message"),
    [
        (PRICES, [0, 0, 0, 1], 1, UserError, "equally many groups, not 1 to 3"),
        (PRICES, [0, 0, 1], 1, UserError, "one number for each of the 4"),
        (PRICES * [[1], [2], [1], [1]], [0, 0, 1, 1], 1, UserError, "same costs"),
        (PRICES * [[1, 0, 1]], [0, 0, 1, 1], 1, UserError, "one option at most"),
        (PRICES * 0, [0, 0, 1, 1], 0, UserError, "one option at most"),
        (PRICES[:, :1], [0, 0, 1, 1], 0, UserError, "no option keeps"),
        (PRICES, [0, 0, 1, 1], 3, BudgetError, "2 groups, fewer than their floor of 3"),
    ],
)
def test_problems_that_are_none(costs, layer, floor: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EqualLayers(costs, 100, floor=floor, layer=np.array(layer))


def test_wrong_values() -> None:
    exact = EqualLayers(PRICES, 100, floor=1, layer=np.array([0, 0, 1, 1]))
    with pytest.raises(UserError, match=r"values must be \[4, 3\]"):
        exact.solve(np.zeros((4, 2)))
    with pytest.raises(UserError, match="finite"):
        exact.solve(np.full((4, 3), np.nan))
