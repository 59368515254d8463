"""Riemannian Adam: every iterate on the budget, momentum tangent, resumable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from moe_rco.errors import UserError
from moe_rco.optim import BudgetManifold, OverlappingBudgetManifold, RiemannianAdam
from tests.optim.problems import Relaxed, exact_costs, examples, relaxed


def manifold_of(problem: Relaxed) -> BudgetManifold:
    return BudgetManifold(problem.costs, problem.budgets, problem.segments, problem.allowed)


@examples(40)
@given(relaxed())
def test_biased_gradients_never_move_the_budget(problem):
    """A straight-through gradient is not tangent; nothing of that may reach the logits or the momentum."""
    manifold = manifold_of(problem)
    adam = RiemannianAdam(manifold, lr=0.5)
    logits = manifold.retract(problem.logits)
    for _ in range(4):
        biased = problem.normal_vector() + 100 * problem.costs
        logits = adam.step(logits, biased)
        exact = exact_costs(
            manifold.probabilities(logits), problem.costs, problem.segments, len(problem.budgets)
        )
        for cost, budget in zip(exact, problem.budgets.tolist(), strict=True):
            assert abs(cost - budget) <= 1e-12 * budget
        assert adam.first is not None
        along = (manifold.normal(logits) * adam.first).sum()
        assert abs(float(along)) <= 1e-11 * float(adam.first.norm())


def test_the_gradients_normal_part_is_ignored():
    problem_costs = torch.arange(12, dtype=torch.float64).reshape(4, 3)
    manifold = BudgetManifold(problem_costs, 20.0)
    start = manifold.retract(torch.zeros(4, 3, dtype=torch.float64))
    gradient = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = RiemannianAdam(manifold).step(start, gradient)
    shifted = RiemannianAdam(manifold).step(start, gradient + 5 * manifold.normal(start))
    torch.testing.assert_close(shifted, plain)


def test_first_step_is_adams():
    """With one group of two options and equal costs the manifold is flat and the step is plain Adam's."""
    manifold = BudgetManifold(torch.ones(1, 2), 1.0)
    adam = RiemannianAdam(manifold, lr=0.1)
    reference = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    other = torch.optim.Adam([reference], lr=0.1)
    logits = reference.detach().clone()
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        gradient = torch.randn(1, 2, dtype=torch.float64, generator=generator)
        logits = adam.step(logits, gradient)
        reference.grad = gradient
        other.step()
        torch.testing.assert_close(logits, reference.detach())


def test_state_continues_bit_identically():
    generator = torch.Generator().manual_seed(2)
    costs = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    manifold = BudgetManifold(costs, float(costs.mean(1).sum()))
    gradients = torch.randn(8, 6, 4, generator=generator, dtype=torch.float64)
    adam = RiemannianAdam(manifold)
    logits = manifold.retract(torch.zeros(6, 4, dtype=torch.float64))
    for step, gradient in enumerate(gradients):
        if step == 4:
            state, middle = adam.state_dict(), logits
        logits = adam.step(logits, gradient)
    again = RiemannianAdam(manifold)
    again.load_state_dict(state)
    for gradient in gradients[4:]:
        middle = again.step(middle, gradient)
    assert torch.equal(middle, logits)
    assert RiemannianAdam(manifold).state_dict() == {"steps": 0}


def test_overlapping_budgets_hold_too():
    generator = torch.Generator().manual_seed(3)
    costs = torch.rand(3, 20, 5, generator=generator, dtype=torch.float64)
    manifold = OverlappingBudgetManifold(costs, costs.mean(2).sum(1))
    adam = RiemannianAdam(manifold)
    logits = manifold.retract(torch.zeros(20, 5, dtype=torch.float64))
    for _ in range(20):
        logits = adam.step(logits, torch.randn(20, 5, generator=generator, dtype=torch.float64))
        miss = (manifold.expected_cost(logits) - manifold.budgets).abs() / manifold.budgets
        assert float(miss.max()) <= 1e-12


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"betas": (1.0, 0.9)}, {"eps": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError):
        RiemannianAdam(BudgetManifold(torch.ones(1, 2), 1.0), **settings)
