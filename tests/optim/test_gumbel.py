"""Noise, straight-through samples, temperature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moe_rco.errors import UserError
from moe_rco.optim.gumbel import gumbel_noise, straight_through, temperature


def test_both_halves_of_a_pair_are_gumbel_distributed_and_opposed():
    first, second, third = gumbel_noise((40_000, 2), 3, torch.Generator().manual_seed(0))
    for noise in (first, second, third):
        assert float(noise.mean()) == pytest.approx(np.euler_gamma, abs=0.02)
        assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
        assert float((noise < 0).double().mean()) == pytest.approx(math.exp(-1), abs=0.01)
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten(), third.flatten()]))
    assert float(correlation[0, 1]) < -0.8
    assert abs(float(correlation[0, 2])) < 0.02
    both = torch.exp(-torch.exp(-first)) + torch.exp(-torch.exp(-second))
    torch.testing.assert_close(both, torch.ones_like(both))


def test_noise_is_finite_and_reproducible():
    draws = [list(gumbel_noise((100, 3), 4, torch.Generator().manual_seed(7))) for _ in range(2)]
    for a, b in zip(*draws, strict=True):
        assert bool(torch.isfinite(a).all())
        assert torch.equal(a, b)


def test_straight_through_has_the_hard_value_and_the_soft_gradient():
    logits = torch.tensor([[0.3, -0.2, 1.0]], dtype=torch.float64, requires_grad=True)
    hard = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64)
    soft = torch.softmax(logits, dim=1)
    sample = straight_through(hard, soft)
    torch.testing.assert_close(sample.detach(), hard)
    (expected,) = torch.autograd.grad((soft * weights).sum(), logits, retain_graph=True)
    (actual,) = torch.autograd.grad((sample * weights).sum(), logits)
    assert torch.equal(actual, expected)


def test_temperature_decays_exponentially():
    values = [temperature(step, 5, (1.0, 0.0625)) for step in range(5)]
    assert values == pytest.approx([1.0, 0.5, 0.25, 0.125, 0.0625])
    assert temperature(0, 1, (1.0, 0.05)) == 1.0
    with pytest.raises(UserError):
        temperature(0, 5, (1.0, 0.0))
