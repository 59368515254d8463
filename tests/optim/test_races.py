"""Refinement by races: against the known optimum of noisy problems, and what it promises whatever the loss."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_rco.errors import UserError
from moe_rco.optim import EqualLayers, Knapsack, SolveResult, StepRecord, refine
from moe_rco.optim.races import FIRST_HEAT, estimate

ROWS = 128


class Problem:
    """Each row of data sees the true effects with its own error; the estimates given are wrong by up to half."""

    def __init__(self, seed: int, groups: int = 12, options: int = 3) -> None:
        rng = np.random.default_rng(seed)
        self.costs = np.sort(rng.integers(1, 50, (groups, options)), axis=1)
        self.costs[:, 0] = 0
        effects = np.sort(rng.exponential(size=(groups, options)), axis=1)[:, ::-1]
        self.noise = rng.standard_normal((ROWS, groups, options)) * effects * 0.5
        self.effects = effects + self.noise.mean(0)
        self._rows = effects + self.noise
        self.estimate = effects * rng.uniform(0.5, 1.5, effects.shape)
        self.feasible = Knapsack(self.costs, int(self.costs.max(1).sum() // 2))
        self.start = self.feasible.solve(-self.estimate).choice
        self.controls = self._rows * rng.uniform(0.5, 1.5, effects.shape)
        self.passes = 0

    def losses(self, choice: np.ndarray, rows: np.ndarray) -> np.ndarray:
        self.feasible.checked(choice, "a choice that was run")
        self.passes += len(rows)
        return self._rows[rows][:, np.arange(len(choice)), choice].sum(1)

    def value(self, choice: np.ndarray) -> float:
        return float(self.effects[np.arange(len(choice)), choice].sum())

    def refined(self, passes: int, **arguments: object) -> SolveResult:
        return refine(
            self.losses, ROWS, self.feasible, self.start, self.estimate, 0.5 * self.estimate,
            passes=passes, **arguments,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip


@pytest.mark.parametrize("truth", [0.0, 1.0, 3.0])
def test_the_estimate_uses_what_was_predicted_and_knows_its_error(truth: float) -> None:
    """On text like the rows, of which these themselves are a sample; whatever the predictions are worth."""
    rng, rows, n = np.random.default_rng(0), 512, 32
    found = []
    for _ in range(2000):
        predicted = rng.exponential(size=rows)
        changes = truth * (predicted - 1) + 0.5 * rng.standard_normal(rows) - 0.2
        change, error = estimate(changes[:n], predicted[:n], predicted)
        found.append((change + 0.2, error, changes[:n].mean() + 0.2))
    change, error, plain = np.array(found).T
    assert abs(change.mean()) < 0.2 * change.std()
    assert (change / error).std() == pytest.approx(1, abs=0.12)
    assert change.std() < (1.2 if truth == 0 else 0.6) * plain.std()


def test_on_all_rows_the_estimate_is_the_mean_with_its_error() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.exponential(size=400)
    changes = predicted + rng.standard_normal(400)
    for control in (predicted, np.zeros(400)):
        change, error = estimate(changes, control, control)
        assert change == pytest.approx(changes.mean())
        assert error == pytest.approx(changes.std() / 20, rel=0.01)


def test_predictions_of_every_row_save_passes() -> None:
    ends: dict[bool, float] = {}
    for given in (False, True):
        ends[given] = 0.0
        for seed in range(8):
            problem = Problem(seed)
            result = problem.refined(600, controls=problem.controls if given else None)
            ends[given] += problem.value(result.choice)
            ends[given] -= problem.value(problem.feasible.solve(-problem.effects).choice)
    assert ends[True] < 0.8 * ends[False]


def test_it_closes_most_of_the_gap_that_wrong_estimates_leave() -> None:
    before = after = 0.0
    for seed in range(6):
        problem = Problem(seed)
        optimum = problem.value(problem.feasible.solve(-problem.effects).choice)
        result = problem.refined(2000)
        before += problem.value(problem.start) - optimum
        after += problem.value(result.choice) - optimum
        assert result.cost == problem.feasible.cost_of(result.choice) <= problem.feasible.budget
        assert result.evaluations == problem.passes
        known = problem.losses(result.choice, np.arange(ROWS)).mean()
        assert result.value == pytest.approx(known, abs=1.0)
    assert after <= 0.25 * before


def test_it_stops_at_its_passes_and_counts_them() -> None:
    problem, records = Problem(0), list[StepRecord]()
    result = problem.refined(500, on_step=records.append)
    assert 500 <= result.evaluations < 500 + 2 * ROWS
    assert [record.step for record in result.history] == list(range(1, len(records) + 1))
    assert records[-1].evaluations == result.evaluations
    assert result.status == "completed"


@pytest.mark.parametrize("after", [1, 7, 20])
def test_interrupted_it_ends_as_if_it_had_not_been(after: int) -> None:
    whole = Problem(1).refined(3000)
    states: list[dict[str, object]] = []

    def stop(record: StepRecord) -> None:
        if record.step == after:
            states.append(record.state())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Problem(1).refined(3000, on_step=stop)
    resumed = Problem(1).refined(3000, state=states[0])
    assert np.array_equal(resumed.choice, whole.choice)
    assert resumed.history == whole.history
    assert resumed.evaluations == whole.evaluations


def test_where_there_is_nothing_to_try_it_says_so() -> None:
    costs = np.array([[1, 5], [1, 5]])
    feasible = Knapsack(costs, 2)
    start = np.zeros(2, dtype=np.int64)
    result = refine(
        lambda choice, rows: np.zeros(len(rows)), 4, feasible, start, costs * 1.0, costs * 0.5, passes=100
    )
    assert result.status == "stalled"
    assert result.evaluations == 0
    assert np.array_equal(result.choice, start)


def test_challengers_are_raced_first() -> None:
    problem = Problem(4)
    optimum = problem.feasible.solve(-problem.effects).choice
    problem.start = problem.feasible.solve(problem.effects).choice
    result = problem.refined(1, challengers=[optimum])
    assert np.array_equal(result.choice, optimum)
    assert len(result.history) == 1
    with pytest.raises(UserError, match="a challenger"):
        problem.refined(1, challengers=[np.zeros(3)])


def test_an_equal_assignment_does_not_replace_the_start() -> None:
    problem = Problem(2)
    result = refine(
        lambda choice, rows: np.ones(len(rows)), ROWS, problem.feasible, problem.start, problem.estimate,
        problem.estimate, passes=2000,
    )  # fmt: skip
    assert np.array_equal(result.choice, problem.start)


def test_one_that_is_worse_does_not_win_by_luck() -> None:
    """It is worse by a third of what the comparison is uncertain by, also where it seems better at first."""
    feasible = Knapsack(np.array([[0, 1]]), 1)
    start, other = np.array([0]), np.array([1])
    noise = np.random.default_rng(0).standard_normal(40)
    noise = (noise - noise.mean()) / noise.std() + 0.05
    whole = 0
    for seed in range(40):
        result = refine(
            lambda choice, rows: noise[rows] * choice[0], 40, feasible, start, np.zeros((1, 2)), np.ones((1, 2)),
            passes=1, challengers=[other], seed=seed,
        )  # fmt: skip
        whole += result.evaluations == 80
        assert np.array_equal(result.choice, start)
    assert whole > 3


def test_one_that_is_far_worse_costs_one_heat() -> None:
    problem = Problem(4)
    worst = problem.feasible.solve(problem.effects).choice
    result = problem.refined(1, challengers=[worst])
    assert result.evaluations == 2 * FIRST_HEAT
    assert np.array_equal(result.choice, problem.start)


@pytest.mark.parametrize(("passes", "rows"), [(1, 128), (1920, 240), (100_000, 4000)])
def test_a_near_tie_costs_a_part_of_the_passes(passes: int, rows: int) -> None:
    """No number of rows tells these two apart, though the challenger seems a little ahead all along."""
    noise = np.random.default_rng(2).standard_normal(4000)
    noise -= noise.mean() + 0.02
    result = refine(
        lambda choice, rows: noise[rows] * choice[0], 4000, Knapsack(np.array([[0, 1]]), 1), np.array([0]),
        np.zeros((1, 2)), np.ones((1, 2)), passes=passes, challengers=[np.array([1])], seed=2,
    )  # fmt: skip
    assert result.history[0].evaluations == 2 * rows  # of both


@pytest.mark.parametrize(("lead", "wins"), [(1.9, False), (2.1, True)])
def test_after_its_last_row_a_lead_of_two_standard_errors_wins(lead: float, wins: bool) -> None:
    changes = np.tile([1.0, -1.0], 14) - lead / math.sqrt(28)  # too few rows to win before the last
    result = refine(
        lambda choice, rows: changes[rows] * choice[0], 28, Knapsack(np.array([[0, 1]]), 1), np.array([0]),
        np.zeros((1, 2)), np.ones((1, 2)), passes=1, challengers=[np.array([1])], seed=3,
    )  # fmt: skip
    assert result.history[0].evaluations == 2 * 28
    assert result.choice[0] == wins


def test_units_are_held_together_so_that_layers_can_move() -> None:
    layer = np.repeat(np.arange(3), 4)
    costs = np.tile([0, 4, 8], (12, 1))
    feasible = EqualLayers(costs, 48, floor=1, layer=layer)
    effects = np.tile([3.0, 0.5, 0.2], (12, 1))
    effects[layer == 0] *= 9.0
    estimate = np.tile([3.0, 0.5, 0.2], (12, 1))
    start = feasible.solve(-estimate).choice

    def losses(choice: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.full(len(rows), effects[np.arange(12), choice].sum())

    result = refine(losses, 8, feasible, start, estimate, estimate, passes=1000, units=layer)
    best = feasible.solve(-effects)
    assert result.value == pytest.approx(-best.value)


def test_a_loss_that_is_no_number_is_refused() -> None:
    problem = Problem(3)
    problem.losses = lambda choice, rows: np.full(len(rows), np.nan)
    with pytest.raises(UserError, match="not a number"):
        problem.refined(100)
