"""Properties of the budget manifold."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_rco.errors import BudgetError, MoeRcoError, UserError
from moe_rco.optim import BudgetManifold
from tests.optim.problems import Relaxed, exact_costs, examples, relaxed


def manifold_of(problem: Relaxed) -> BudgetManifold:
    return BudgetManifold(problem.costs, problem.budgets, problem.segments, problem.allowed)


def per_segment(problem: Relaxed, rows: torch.Tensor) -> torch.Tensor:
    owner = torch.zeros(len(rows), dtype=torch.int64) if problem.segments is None else problem.segments
    return torch.zeros(len(problem.budgets), dtype=torch.float64).index_add_(0, owner, rows)


def assert_tangent(problem: Relaxed, logits: torch.Tensor, vector: torch.Tensor, scale: torch.Tensor) -> None:
    normal = manifold_of(problem).normal(logits)
    unit = normal / normal.abs().amax().clamp(min=1e-300)
    along = per_segment(problem, (unit * vector).sum(1)).abs().max()
    assert float(along) <= 1e-13 * float(unit.norm() * scale.norm())


@examples(60)
@given(relaxed())
def test_normal_is_the_gradient_of_the_expected_cost(problem):
    manifold = manifold_of(problem)
    direction = problem.normal_vector()
    h = 1e-5
    ahead = manifold.expected_cost(problem.logits + h * direction)
    behind = manifold.expected_cost(problem.logits - h * direction)
    slope = per_segment(problem, (manifold.normal(problem.logits) * direction).sum(1))
    torch.testing.assert_close((ahead - behind) / (2 * h), slope, rtol=1e-6, atol=1e-6)


@examples(60)
@given(relaxed())
def test_expected_cost_is_the_sum_of_probability_times_cost(problem):
    manifold = manifold_of(problem)
    p = manifold.probabilities(problem.logits)
    exact = exact_costs(p, problem.costs, problem.segments, len(problem.budgets))
    torch.testing.assert_close(manifold.expected_cost(problem.logits).tolist(), exact, rtol=1e-13, atol=0.0)
    assert bool((p[~problem.allowed] == 0).all())
    torch.testing.assert_close(p.sum(1), torch.ones(len(p), dtype=torch.float64))


@examples(60)
@given(relaxed(), st.sampled_from([1.0, 60.0]))
def test_projection_is_tangent_and_idempotent(problem, sharpness):
    manifold = manifold_of(problem)
    logits, vector = sharpness * problem.logits, problem.normal_vector()
    tangent = manifold.project(logits, vector)
    assert_tangent(problem, logits, tangent, vector)
    assert bool((tangent[~problem.allowed] == 0).all())
    torch.testing.assert_close(manifold.project(logits, tangent), tangent, rtol=1e-9, atol=1e-9)


@examples(150)
@given(relaxed(wild=True))
def test_retraction_meets_every_budget(problem):
    manifold = manifold_of(problem)
    point = manifold.retract(problem.logits)
    exact = exact_costs(manifold.probabilities(point), problem.costs, problem.segments, len(problem.budgets))
    for cost, budget in zip(exact, problem.budgets.tolist(), strict=True):
        assert abs(cost - budget) <= 1e-12 * budget


@examples(60)
@given(relaxed(wild=True))
def test_points_on_the_manifold_stay_where_they_are(problem):
    manifold = manifold_of(problem)
    point = manifold.retract(problem.logits)
    assert torch.equal(manifold.retract(point), point)


@examples(60)
@given(relaxed())
def test_retraction_is_the_identity_to_first_order(problem):
    manifold = manifold_of(problem)
    point = manifold.retract(problem.logits)
    tangent = manifold.project(point, problem.normal_vector())
    h = 1e-5
    derivative = (manifold.retract(point + h * tangent) - manifold.retract(point - h * tangent)) / (2 * h)
    derivative = derivative.masked_fill(~problem.allowed, 0.0)
    torch.testing.assert_close(derivative, tangent, rtol=0.0, atol=1e-3)


@examples(60)
@given(relaxed())
def test_expected_cost_grows_along_the_cost_direction(problem):
    manifold = manifold_of(problem)
    masked = problem.costs.masked_fill(~problem.allowed, torch.inf)
    low = masked.amin(1, keepdim=True)
    span = problem.costs.masked_fill(~problem.allowed, -torch.inf).amax(1, keepdim=True) - low
    direction = (problem.costs - low) / span
    costs = [manifold.expected_cost(problem.logits + t * direction) for t in (-3.0, -1.0, 0.0, 0.5, 4.0)]
    for before, after in itertools.pairwise(costs):
        assert bool((after > before).all())


@examples(40)
@given(relaxed())
def test_retraction_moves_along_the_cost_direction(problem):
    manifold = manifold_of(problem)
    moved = (manifold.retract(problem.logits) - problem.logits)[problem.allowed.all(1)]
    costs = problem.costs[problem.allowed.all(1)]
    # Up to a constant per group, the move is a multiple of the cost.
    moved, costs = moved - moved.mean(1, keepdim=True), costs - costs.mean(1, keepdim=True)
    cross = moved[:, :1] * costs - costs[:, :1] * moved
    torch.testing.assert_close(cross, torch.zeros_like(cross), rtol=0.0, atol=1e-9)


@examples(40)
@given(relaxed())
def test_transported_vectors_are_tangent_at_the_new_point(problem):
    manifold = manifold_of(problem)
    point = manifold.retract(problem.logits)
    momentum = manifold.project(point, problem.normal_vector())
    there = manifold.retract(point - 0.3 * momentum)
    assert_tangent(problem, there, manifold.transport(there, momentum), momentum)


@examples(40)
@given(relaxed())
def test_segments_equal_separate_manifolds(problem):
    manifold = manifold_of(problem)
    point = manifold.retract(problem.logits)
    vector = problem.normal_vector()
    tangent = manifold.project(point, vector)
    owner = torch.zeros(len(point), dtype=torch.int64) if problem.segments is None else problem.segments
    for s, budget in enumerate(problem.budgets):
        rows = owner == s
        alone = BudgetManifold(problem.costs[rows], budget, allowed=problem.allowed[rows])
        torch.testing.assert_close(alone.retract(problem.logits[rows]), point[rows], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone.project(point[rows], vector[rows]), tangent[rows])


def test_many_groups_in_uneven_segments_add_up_exactly():
    generator = torch.Generator().manual_seed(0)
    groups = 200_000
    costs = torch.floor(10 ** (12 * torch.rand(groups, 3, generator=generator, dtype=torch.float64)))
    segments = torch.randint(0, 50, (groups,), generator=generator).clamp(max=3)
    low, high = costs.amin(1), costs.amax(1)
    budgets = torch.zeros(4, dtype=torch.float64).index_add_(0, segments, 0.7 * low + 0.3 * high)
    manifold = BudgetManifold(costs, budgets, segments)
    point = manifold.retract(torch.randn(groups, 3, generator=generator, dtype=torch.float64))
    for cost, budget in zip(
        exact_costs(manifold.probabilities(point), costs, segments, 4), budgets.tolist(), strict=True
    ):
        assert abs(cost - budget) <= 1e-12 * budget


@pytest.mark.parametrize("budget", [2.5, 30.5])
def test_unreachable_budgets_are_refused_with_the_range(budget):
    costs = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    with pytest.raises(BudgetError, match=r"between 3 and 30"):
        BudgetManifold(costs, budget)


@pytest.mark.parametrize("budget", [3.0, 30.0])
def test_extreme_budgets_are_reached(budget):
    manifold = BudgetManifold(torch.tensor([[1.0, 10.0], [2.0, 20.0]]), budget)
    point = manifold.retract(torch.zeros(2, 2, dtype=torch.float64))
    assert abs(float(manifold.expected_cost(point)) - budget) <= 1e-12 * budget


def test_options_that_are_not_allowed_do_not_make_a_budget_reachable():
    costs = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    allowed = torch.tensor([[True, False], [True, True]])
    with pytest.raises(BudgetError, match="between 3 and 21"):
        BudgetManifold(costs, 25.0, allowed=allowed)


@pytest.mark.parametrize(
    "arguments",
    [
        {"costs": torch.ones(3)},
        {"costs": torch.tensor([[1.0, -1.0]])},
        {"costs": torch.tensor([[1.0, torch.nan]])},
        {"allowed": torch.ones(2, 2)},
        {"allowed": torch.tensor([[True, True], [False, False]])},
        {"budgets": torch.tensor([3.0, 3.0])},
        {"budgets": torch.tensor([3.0, 3.0]), "segments": torch.tensor([0, 0])},
        {"segments": torch.tensor([0.0, 0.0])},
    ],
)
def test_malformed_input_is_refused(arguments):
    with pytest.raises(UserError):
        BudgetManifold(**({"costs": torch.tensor([[0.0, 2.0], [1.0, 4.0]]), "budgets": 3.0} | arguments))


def test_logits_that_cannot_express_the_budget_are_refused():
    manifold = BudgetManifold(torch.tensor([[1.0, 3.0], [1.0, 7.0]]), 3.1)
    with pytest.raises(MoeRcoError, match="retraction"):
        manifold.retract(torch.tensor([[1e17, -1e17], [3e17, -2e17]], dtype=torch.float64))
    with pytest.raises(UserError, match="finite"):
        manifold.retract(torch.full((2, 2), torch.nan, dtype=torch.float64))
    with pytest.raises(UserError, match="float64"):
        manifold.retract(torch.zeros(2, 2))
