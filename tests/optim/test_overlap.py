"""Properties of the manifold with several overlapping budgets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_rco.errors import BudgetError, UserError
from moe_rco.optim import BudgetManifold, OverlappingBudgetManifold
from tests.optim.problems import examples


def problem(seed: int, q: int, groups: int, options: int, wild: bool = False, reach: float = 2.0):
    """Costs, reachable budgets, mask and logits."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(q, groups, options, generator=generator, dtype=torch.float64)
    if wild:
        costs = torch.floor(10 ** (12 * costs))
    allowed = torch.rand(groups, options, generator=generator) < 0.8
    allowed[:, 0] = True
    logits = torch.randn(groups, options, generator=generator, dtype=torch.float64)
    p = torch.softmax((2 * logits.flip(0)).masked_fill(~allowed, -torch.inf), dim=1)
    start = reach * (2 * torch.rand(groups, options, generator=generator, dtype=torch.float64) - 1)
    return costs, (p * costs).sum((1, 2)), allowed, start, logits


def assert_on_budget(manifold: OverlappingBudgetManifold, costs: torch.Tensor, point: torch.Tensor) -> None:
    p = manifold.probabilities(point)
    for table, budget in zip(costs, manifold.budgets.tolist(), strict=True):
        assert abs(math.fsum((p * table).flatten().tolist()) - budget) <= 1e-12 * budget


@examples(60)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(4, 30), st.integers(2, 6), st.booleans())
def test_every_budget_is_met(seed, q, groups, options, wild):
    costs, budgets, allowed, start, _ = problem(seed, q, groups, options, wild, reach=20.0)
    manifold = OverlappingBudgetManifold(costs, budgets, allowed)
    point = manifold.retract(start)
    assert_on_budget(manifold, costs, point)
    assert torch.equal(manifold.retract(point), point)
    assert bool((manifold.probabilities(point)[~allowed] == 0).all())


@pytest.mark.parametrize("seed", range(5))
def test_nearly_deterministic_groups(seed):
    costs, budgets, allowed, start, _ = problem(seed, 3, 12, 4, reach=500.0)
    manifold = OverlappingBudgetManifold(costs, budgets, allowed)
    assert_on_budget(manifold, costs, manifold.retract(start))


def test_the_paper_size():
    costs, budgets, allowed, start, _ = problem(0, 16, 500, 32)
    manifold = OverlappingBudgetManifold(costs, budgets, allowed)
    assert_on_budget(manifold, costs, manifold.retract(start))


@examples(40)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_geometry(seed, q):
    costs, budgets, allowed, start, vector = problem(seed, q, 20, 5)
    manifold = OverlappingBudgetManifold(costs, budgets, allowed)
    point = manifold.retract(start)
    normal = manifold.normal(point)
    h = 1e-5
    slope = (manifold.expected_cost(point + h * vector) - manifold.expected_cost(point - h * vector)) / (
        2 * h
    )
    torch.testing.assert_close((normal * vector).sum((1, 2)), slope, rtol=1e-6, atol=1e-7)
    tangent = manifold.project(point, vector)
    assert float((normal * tangent).sum((1, 2)).abs().max()) <= 1e-13 * float(normal.norm() * vector.norm())
    derivative = (manifold.retract(point + h * tangent) - manifold.retract(point - h * tangent)) / (2 * h)
    derivative = derivative.masked_fill(~allowed, 0.0)
    torch.testing.assert_close(derivative, tangent, rtol=0.0, atol=1e-3)
    there = manifold.retract(point - 0.1 * tangent)
    moved = manifold.transport(there, tangent)
    assert float((manifold.normal(there) * moved).sum((1, 2)).abs().max()) <= 1e-12


def test_one_table_equals_the_single_budget():
    costs, budgets, allowed, start, vector = problem(3, 1, 20, 5)
    single = BudgetManifold(costs[0], budgets, allowed=allowed)
    manifold = OverlappingBudgetManifold(costs, budgets, allowed)
    p = manifold.probabilities(manifold.retract(start))
    torch.testing.assert_close(p, single.probabilities(single.retract(start)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(manifold.project(start, vector), single.project(start, vector))


def test_dependent_budgets_are_no_obstacle():
    costs, budgets, allowed, start, vector = problem(4, 2, 20, 5)
    tables = torch.cat([costs, costs[:1] * 3])
    manifold = OverlappingBudgetManifold(tables, torch.cat([budgets, budgets[:1] * 3]), allowed)
    point = manifold.retract(start)
    assert_on_budget(manifold, tables, point)
    tangent = manifold.project(point, vector)
    assert float((manifold.normal(point) * tangent).sum((1, 2)).abs().max()) <= 1e-12


def test_impossible_budgets_are_refused():
    costs = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    with pytest.raises(BudgetError, match="out of reach"):
        OverlappingBudgetManifold(costs, torch.tensor([3.0, 1.0]))
    manifold = OverlappingBudgetManifold(costs, torch.tensor([1.5, 1.5]))
    with pytest.raises(BudgetError, match="exclude each other"):
        manifold.retract(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(UserError, match="2 budgets"):
        OverlappingBudgetManifold(costs, torch.tensor([1.0]))
