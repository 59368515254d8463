"""The whole minimisation on problems whose optimum is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_rco.errors import BudgetError, UserError
from moe_rco.optim import BudgetManifold, SolveResult, minimize, solve_mckp
from tests.optim.problems import large_knapsack


def quadratic(seed: int, groups: int = 6, options: int = 3):
    """A pairwise loss, costs, a budget, and the optimum by enumeration."""
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, 20, (groups, options))
    size = groups * options
    matrix = rng.normal(size=(size, size)) / np.sqrt(size)
    pair, single = torch.from_numpy(matrix + matrix.T), torch.from_numpy(rng.normal(size=size))
    budget = int(np.sort(costs, axis=1)[:, 1].sum())

    def loss(x: Tensor) -> Tensor:
        flat = x.flatten()
        return flat @ pair @ flat / 2 + single @ flat

    best = np.inf
    rows = np.arange(groups)
    for choice in itertools.product(range(options), repeat=groups):
        if costs[rows, choice].sum() <= budget:
            best = min(best, float(loss(one_hot(np.array(choice), options))))
    return loss, torch.from_numpy(costs), budget, best


def one_hot(choice: np.ndarray, options: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(choice), options).double()


def linear(values: np.ndarray) -> Callable[[Tensor], Tensor]:
    weights = torch.from_numpy(values)
    return lambda x: -(x * weights).sum()


@pytest.mark.parametrize("with_evaluate", [False, True])
def test_decomposable_losses_end_at_the_knapsacks_optimum(with_evaluate):
    problem = large_knapsack(0, layers=4, experts=16)
    best = solve_mckp(problem.values, problem.costs, problem.budget, **problem.arguments())
    rows = np.arange(len(problem.costs))
    evaluate = (lambda choice: -float(problem.values[rows, choice].sum())) if with_evaluate else None
    result = minimize(
        linear(problem.values),
        torch.from_numpy(problem.costs),
        problem.budget,
        steps=30,
        evaluate=evaluate,
        **problem.arguments(),
    )
    assert result.value == pytest.approx(-best.value, rel=1e-12)
    assert result.cost <= problem.budget
    assert result.status == "completed"


def test_the_search_alone_comes_close_on_decomposable_losses():
    problem = large_knapsack(1, layers=4, experts=16)
    best = solve_mckp(problem.values, problem.costs, problem.budget, **problem.arguments())
    decodes: list[float] = []
    result = minimize(
        linear(problem.values),
        torch.from_numpy(problem.costs),
        problem.budget,
        lr=0.3,
        on_step=lambda record: decodes.append(record.value) if record.value is not None else None,
        **problem.arguments(),
    )
    assert decodes[-1] == result.history[-1].value
    assert -best.value - 1e-9 <= decodes[-1] <= -1.25 * best.value
    assert result.history[-1].entropy < 0.3 * result.history[0].entropy


def test_small_pairwise_losses_are_solved():
    hits = 0
    for seed in range(6):
        loss, costs, budget, best = quadratic(seed)
        result = minimize(loss, costs, budget, steps=100, seed=seed)
        assert result.value >= best - 1e-9
        assert result.value == pytest.approx(float(loss(one_hot(result.choice, 3))), abs=1e-12)
        hits += result.value <= best + 1e-9
    assert hits >= 5


def test_every_sample_and_every_iterate_keeps_the_constraints():
    problem = large_knapsack(2, layers=4, experts=16, ratio=0.05)
    inner = linear(problem.values)

    def loss(sample: Tensor) -> Tensor:
        hard = sample.detach().round().to(torch.int64)
        torch.testing.assert_close(sample.detach(), hard.double(), rtol=0, atol=1e-12)
        assert problem.feasible(hard.argmax(dim=1).numpy())
        return inner(sample)

    result = minimize(
        loss, torch.from_numpy(problem.costs), problem.budget, steps=20, samples=3, **problem.arguments()
    )
    assert max(record.budget_error for record in result.history) <= 1e-12
    assert len(result.history) == 20
    assert result.evaluations == 20 * 3 + 2 + 20 * 3  # the swaps


def test_never_worse_than_its_candidates():
    loss, costs, budget, _ = quadratic(3)
    candidates = []
    for choice in itertools.product(range(3), repeat=6):
        picked = np.array(choice)
        if int(costs.numpy()[np.arange(6), picked].sum()) <= budget:
            candidates.append((float(loss(one_hot(picked, 3))), picked))
    value, best = min(candidates, key=lambda pair: pair[0])
    result = minimize(loss, costs, budget, steps=2, candidates=[("bad", candidates[0][1]), ("good", best)])
    assert result.value == value
    assert result.name == "good"
    assert np.array_equal(result.choice, best)
    only = minimize(loss, costs, budget, steps=0, candidates={"good": best})
    assert only.name == "good"
    assert only.history == ()


def test_a_margin_keeps_the_earlier_candidate():
    values = np.array([[0.0, 1.0], [0.0, 1.0]])
    costs = torch.tensor([[0, 1], [0, 1]])
    first = np.array([0, 1])
    result = minimize(linear(values), costs, 1, steps=3, candidates={"first": first}, margin=0.5)
    assert result.name == "first"
    better = {"worse": np.array([0, 0]), "first": first}
    assert minimize(linear(values), costs, 1, steps=3, candidates=better, margin=2.0).name == "worse"


def run(loss, costs, budget, **extra) -> SolveResult:
    return minimize(loss, costs, budget, steps=24, samples=3, evaluate_every=5, seed=4, **extra)


@pytest.mark.parametrize("stop", [1, 10, 24])
def test_a_resumed_run_is_bit_identical(stop):
    loss, costs, budget, _ = quadratic(5)
    snapshots = {}

    def interrupt(record):
        if record.step == stop:
            snapshots["state"] = record.state()
            raise KeyboardInterrupt

    whole = run(loss, costs, budget)
    with pytest.raises(KeyboardInterrupt):
        run(loss, costs, budget, on_step=interrupt)
    state = snapshots["state"]
    assert all(isinstance(item, Tensor | int | float | str) for item in state.values())
    resumed = run(loss, costs, budget, state=state)
    assert torch.equal(resumed.logits, whole.logits)
    assert resumed.history == whole.history
    assert np.array_equal(resumed.choice, whole.choice)
    assert (resumed.value, resumed.name, resumed.evaluations) == (whole.value, whole.name, whole.evaluations)


def test_seeds_differ_and_repeat():
    loss, costs, budget, _ = quadratic(6)
    one, same, other = (minimize(loss, costs, budget, steps=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.logits, same.logits)
    assert not torch.equal(one.logits, other.logits)


def test_initial_logits_are_the_start():
    _, costs, budget, _ = quadratic(7)
    prior = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = minimize(lambda x: x.sum(), costs, budget, steps=0, init_logits=prior)
    assert torch.equal(result.logits, BudgetManifold(costs, budget).retract(prior))


def test_patience_stops_a_search_that_stands_still():
    costs = torch.tensor([[0, 1], [0, 1]])
    result = minimize(
        linear(np.array([[0.0, 2.0], [0.0, 1.0]])), costs, 1, steps=500, evaluate_every=1, patience=3
    )
    assert result.status == "stalled"
    assert len(result.history) < 500
    assert result.choice.tolist() == [1, 0]


def test_options_that_are_not_allowed_are_never_chosen():
    values = np.array([[0.0, 9.0, 1.0]] * 4)
    allowed = torch.tensor([[True, False, True]] * 4)
    costs = torch.tensor([[0, 1, 2]] * 4)
    result = minimize(linear(values), costs, 4, steps=20, allowed=allowed)
    assert not (result.choice == 1).any()
    assert result.value == -2.0


def test_broken_losses_are_reported():
    costs = torch.tensor([[0, 1], [0, 1]])
    with pytest.raises(UserError, match="no gradient"):
        minimize(lambda x: x.detach().sum(), costs, 1, steps=2)
    with pytest.raises(UserError, match="no gradient"):
        minimize(lambda x: torch.ones((), requires_grad=True), costs, 1, steps=2)
    with pytest.raises(UserError, match="loss is nan at step 0"):
        minimize(lambda x: x.sum() * torch.nan, costs, 1, steps=2)
    with pytest.raises(UserError, match="value of 'search'"):
        minimize(lambda x: x.sum(), costs, 1, steps=2, evaluate=lambda choice: float("nan"))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ([1, 1], "more than the budget 1"),
        ([0, 0], "fewer groups"),
        ([0, 2], "one of 2"),
        ([0], "for each of 2"),
    ],
)
def test_infeasible_candidates_are_refused(choice, message):
    costs = torch.tensor([[0, 1], [0, 1]])
    with pytest.raises(UserError, match=message):
        minimize(lambda x: x.sum(), costs, 1, floor=1, candidates={"mine": np.array(choice)})


def test_impossible_budgets_are_refused():
    costs = torch.tensor([[2, 3], [2, 3]])
    with pytest.raises(BudgetError, match="smallest cost"):
        minimize(lambda x: x.sum(), costs, 3)
    with pytest.raises(BudgetError, match="between 4 and 6"):
        minimize(lambda x: x.sum(), costs, 7)
    with pytest.raises(UserError, match="another problem"):
        minimize(lambda x: x.sum(), costs, 5, state={"logits": torch.zeros(3, 3)})
