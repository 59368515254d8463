"""Scores over items, and whether two models differ: against scipy and against enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moe_rco.scoring.paired import MCNEMAR, SIGN_FLIP, Items, classify, compare, mcnemar, p_value, sign_flip

COUNTS = st.integers(0, 300)
VALUES = st.floats(-10, 10, allow_subnormal=False)


def mean(values: np.ndarray) -> Items:
    return Items(values.astype(float), np.ones(len(values)), "mean")


@given(COUNTS, COUNTS)
def test_mcnemar_is_the_binomial_test_on_discordant_items(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


@given(st.lists(VALUES, min_size=1, max_size=9))
def test_sign_flip_of_few_items_counts_every_pattern(differences: list[float]) -> None:
    values = np.array(differences)
    observed = abs(values.sum()) - 1e-12 * np.abs(values).sum()
    patterns = list(itertools.product((-1, 1), repeat=len(values)))
    expected = np.mean([abs(np.dot(pattern, values)) >= observed for pattern in patterns])
    assert sign_flip(values) == pytest.approx(expected)


def test_sign_flip_of_many_items_agrees_with_scipys_permutation_test() -> None:
    rng = np.random.default_rng(3)
    for shift in (0.0, 0.1, 0.2, 0.5):
        differences = rng.normal(shift, 1, 150)
        expected = stats.permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            n_resamples=20_000,
            rng=np.random.default_rng(1),
        ).pvalue
        # Standard error of a share of 10,000 draws, and of scipy's 20,000.
        assert sign_flip(differences) == pytest.approx(expected, abs=5 * 0.006 + 2e-4)
        assert sign_flip(differences) == sign_flip(differences)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_right_and_wrong_answers_get_mcnemars_test_which_is_the_sign_flip_test(
    pairs: list[tuple[bool, bool]],
) -> None:
    first, second = np.array(pairs, dtype=float).T
    p, name = p_value(first, second)
    assert name == MCNEMAR
    assert p == pytest.approx(sign_flip(second - first))


def test_other_scores_get_the_sign_flip_test() -> None:
    p, name = p_value(np.array([0.5, 1, 0]), np.array([1, 1, 1]))
    assert (p, name) == (0.5, SIGN_FLIP)  # two of the four patterns of two differences of one sign


@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=50))
def test_a_mean_has_the_textbook_errors(pairs: list[tuple[float, float]]) -> None:
    first, second = np.array(pairs).T
    assert mean(first).stderr == pytest.approx(stats.sem(first), abs=1e-9)
    difference = compare(mean(first), mean(second))
    assert difference.value == pytest.approx(np.mean(second - first), abs=1e-9)
    assert difference.stderr == pytest.approx(stats.sem(second - first), abs=1e-9)


@pytest.mark.parametrize("kind", ["perplexity", "bits"])
def test_errors_of_a_perplexity_agree_with_the_jackknife(kind: str) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(200, 400, 300).astype(float)
    first = -lengths * rng.normal(0.7, 0.1, 300)
    second = first - lengths * rng.normal(0.002, 0.01, 300)

    def score(values: np.ndarray, keep: np.ndarray) -> float:
        return Items(values[keep], lengths[keep], kind).score  # pyright: ignore[reportArgumentType]

    def jackknife(statistic: list[float]) -> float:
        n = len(statistic)
        return math.sqrt((n - 1) ** 2 / n * np.var(statistic, ddof=1))

    left_out = [np.arange(300) != index for index in range(300)]
    one = Items(first, lengths, kind)  # pyright: ignore[reportArgumentType]
    two = Items(second, lengths, kind)  # pyright: ignore[reportArgumentType]
    assert one.stderr == pytest.approx(jackknife([score(first, keep) for keep in left_out]), rel=0.02)
    difference = compare(one, two)
    expected = jackknife([score(second, keep) - score(first, keep) for keep in left_out])
    assert difference.stderr == pytest.approx(expected, rel=0.02)
    assert difference.value == pytest.approx(two.score - one.score)
    assert difference.value > 0  # less likely text: a higher perplexity


def test_equal_models_do_not_differ() -> None:
    items = mean(np.array([1, 0, 1]))
    difference = compare(items, items)
    assert (difference.value, difference.stderr, difference.p) == (0, 0, 1)


def test_a_score_is_recognised_from_its_items() -> None:
    values, weights = np.array([-300.0, -500.0]), np.array([200.0, 250.0])
    ratio = -800 / 450
    for kind, score in (
        ("mean", ratio),
        ("perplexity", math.exp(-ratio)),
        ("bits", -ratio / math.log(2)),
    ):
        items = classify(score, values, weights)
        assert items is not None
        assert items.kind == kind
    assert classify(1.23, values, weights) is None  # an F1, say
    with np.errstate(invalid="raise"):
        assert classify(0.0, np.array([]), np.array([])) is None
        assert classify(0.0, np.array([np.nan]), np.array([1.0])) is None


def test_different_items_are_refused() -> None:
    with pytest.raises(ValueError, match="not the same"):
        compare(mean(np.zeros(2)), Items(np.zeros(2), np.array([1.0, 2.0]), "mean"))


def test_one_item_has_no_error() -> None:
    assert mean(np.ones(1)).stderr is None
    assert compare(mean(np.ones(1)), mean(np.zeros(1))).stderr is None
