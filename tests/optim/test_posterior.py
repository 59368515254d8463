"""The belief about options: against conditioning a Gaussian by hand, and what it must remember."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rco.optim import posterior
from moe_rco.optim.posterior import Posterior

MEAN = np.array([[0.0, 1.0], [0.5, 2.0], [1.0, 1.0]])
SPREAD = np.array([[0.1, 1.0], [0.3, 0.8], [0.5, 0.0]])
START = np.array([0, 0, 0])
SEEN = [(np.array([1, 0, 0]), 0.4, 0.2), (np.array([1, 1, 0]), 3.0, 0.1), (np.array([0, 1, 1]), 1.2, 0.5)]


def conditioned(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean [6] and covariance [6, 6] after SEEN."""
    rows = np.zeros((3, 3, 2))
    for row, (choice, _, _) in enumerate(SEEN):
        rows[row, np.arange(3), choice] += 1
        rows[row, np.arange(3), START] -= 1
    a, prior = rows.reshape(3, 6), np.diag(scale**2 * SPREAD.ravel() ** 2)
    noise = np.diag([error**2 + (0.25 * change) ** 2 for _, change, error in SEEN])
    gain = prior @ a.T @ np.linalg.inv(a @ prior @ a.T + noise)
    changes = np.array([change for _, change, _ in SEEN])
    return MEAN.ravel() + gain @ (changes - a @ MEAN.ravel()), prior - gain @ a @ prior


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_draws_have_the_conditional_mean_and_covariance(
    monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    monkeypatch.setattr(posterior, "_SCALES", np.array([scale]))
    belief = Posterior(MEAN, SPREAD)
    for choice, change, error in SEEN:
        belief.observe(START, choice, change, error, near=START)
    rng = np.random.default_rng(0)
    draws = np.stack([belief.sample(rng).ravel() for _ in range(40_000)])
    mean, covariance = conditioned(scale)
    assert draws.mean(0) == pytest.approx(mean, abs=0.03 * scale)
    assert np.cov(draws.T) == pytest.approx(covariance, abs=0.03 * scale**2)


@given(st.floats(0.2, 4.0), st.integers(0, 100))
def test_the_spread_is_scaled_to_what_was_measured(factor: float, seed: int) -> None:
    rng, groups = np.random.default_rng(seed), 200
    mean, spread = np.zeros((groups, 2)), np.tile([0.0, 1.0], (groups, 1))
    belief = Posterior(mean, spread)
    start = np.zeros(groups, dtype=np.int64)
    for group in range(60):
        choice = start.copy()
        choice[group] = 1
        belief.observe(start, choice, factor * rng.standard_normal(), 1e-3, near=start)
    assert factor / 2.5 <= belief._scale <= factor * 2.5  # from powers of two, by sixty draws


def test_what_was_measured_holds_in_every_draw() -> None:
    belief = Posterior(MEAN, SPREAD)
    belief.observe(START, np.array([1, 1, 0]), 0.0, 1e-9, near=START)
    rng = np.random.default_rng(1)
    for _ in range(20):
        drawn = belief.sample(rng)
        assert drawn[0, 1] + drawn[1, 1] == pytest.approx(drawn[0, 0] + drawn[1, 0], abs=1e-6)


@pytest.mark.parametrize("spread", [SPREAD, 0 * SPREAD])
def test_exact_measurements_may_repeat(spread: np.ndarray) -> None:
    belief = Posterior(MEAN, spread)
    for choice in (SEEN[0][0], SEEN[0][0], SEEN[1][0], SEEN[0][0]):
        belief.observe(START, choice, 0.0, 0.0, near=START)
    drawn = belief.sample(np.random.default_rng(3))
    assert np.isfinite(drawn).all()
    if spread.any():
        assert drawn[0, 1] == pytest.approx(drawn[0, 0], abs=1e-3)


def test_it_goes_on_where_it_was_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posterior, "_MEMORY", 2)
    belief, again = Posterior(MEAN, SPREAD), Posterior(MEAN, SPREAD)
    for choice, change, error in SEEN:
        belief.observe(START, choice, change, error, near=START)
    again.load(belief.state(), START)
    one, other = (kept.sample(np.random.default_rng(2), widen=3.0) for kept in (belief, again))
    assert np.array_equal(one, other)
    assert [belief.knows(choice) for choice, _, _ in SEEN] == [False, True, True]
    again.load(Posterior(MEAN, SPREAD).state(), START)
    assert not again.knows(SEEN[1][0])


def test_what_was_measured_elsewhere_counts_less_and_blind_draws_forget_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(posterior, "_SCALES", np.array([1.0]))
    choice, change, error = SEEN[0]
    means = []
    for near in (START, np.array([0, 1, 1])):
        belief = Posterior(MEAN, SPREAD)
        belief.observe(START, choice, change, error, near=near)
        rng = np.random.default_rng(4)
        draws = np.stack([belief.sample(rng) for _ in range(20_000)])
        means.append((draws[:, 0, 1] - draws[:, 0, 0]).mean())
    prior = 1.0**2 + 0.1**2
    for mean, elsewhere in zip(means, (0, 2), strict=True):
        noise = error**2 + (0.25 * change) ** 2 * (1 + elsewhere)
        assert mean == pytest.approx(1.0 + prior / (prior + noise) * (change - 1.0), abs=0.01)
    drawn = belief.sample(np.random.default_rng(5), 2.0, blind=True)
    expected = Posterior(MEAN, SPREAD).sample(np.random.default_rng(5), 2.0)
    assert np.array_equal(drawn, expected)
