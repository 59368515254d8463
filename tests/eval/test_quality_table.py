"""The table that says where RCO has won or lost: a verdict must follow from the records alone."""

from __future__ import annotations

from typing import Any

import pytest

from eval.quality_table import render
from eval.rivals import FISHER, RCO

METHODS = ("evolution", "penalty", FISHER, RCO)


def _records(method: str, kls: dict[int, float | None], ratio: float = 0.25) -> list[dict[str, Any]]:
    rest = {"model": "demo", "ratio": ratio, "method": method, "variant": "", "commit": "abc", "seconds": 1.0}
    size = {"budget": 100, "original": 400, "cost": 99}
    return [{"seed": seed, "kl": kl, **rest, **size} for seed, kl in kls.items()]


def _summary(records: list[dict[str, Any]]) -> list[str]:
    lines = render(records, METHODS, "python -m eval.quality").splitlines()
    return next(line for line in lines if line.startswith("| demo |")).strip("| ").split(" | ")


OURS = _records(RCO, {0: 1.0, 1: 3.0}) + _records(FISHER, {0: 2.0, 1: 3.0})


def test_the_verdict_names_the_best_rival_and_the_ratio_to_it() -> None:
    row = _summary(OURS + _records("evolution", {0: 2.5, 1: 2.5}) + _records("penalty", {0: 4.0, 1: 4.0}))
    assert (row[2], row[3], row[6], row[8]) == ("evolution", "2.50000", "0.80 +- 0.40", "below every rival")
    assert row[7] == "-0.50000 +- 0.70711"


def test_a_rival_below_us_is_told() -> None:
    assert _summary(OURS + _records("evolution", {0: 1.5, 1: 1.5}))[8] == "LOST to evolution"


def test_a_rival_with_fewer_seeds_is_compared_over_those() -> None:
    # 1.2 is below the mean of ours, 2.0, but it is of seed 0, where ours has 1.0.
    row = _summary(OURS + _records("evolution", {0: 2.5, 1: 2.5}) + _records("penalty", {0: 1.2}))
    assert (row[2], row[6], row[8]) == ("penalty", "0.83", "below every rival")
    # And 2.9 is above that mean, but below ours of seed 1.
    row = _summary(OURS + _records("evolution", {0: 2.5, 1: 2.5}) + _records("penalty", {1: 2.9}))
    assert (row[2], row[8]) == ("penalty", "LOST to penalty")


def test_above_the_fisher_seed_is_told() -> None:
    records = _records(RCO, {0: 2.1, 1: 3.1}) + _records(FISHER, {0: 2.0, 1: 3.0})
    assert (
        _summary(records + _records("evolution", {0: 9.0}))[8] == "below every rival, above the Fisher seed"
    )


def test_without_rivals_the_fisher_seed_is_still_compared_with() -> None:
    row = _summary(OURS)
    assert (row[2], row[3], row[6], row[8]) == ("-", "-", "-", "no rival was run")
    assert row[7] == "-0.50000 +- 0.70711"


def test_a_method_that_does_not_fit_has_no_figure() -> None:
    text = render(OURS + _records("evolution", {0: None}) + _records("penalty", {0: 9.0}), METHODS, "command")
    assert "| evolution | does not fit |" in text
    assert "nan" not in text


@pytest.mark.parametrize("ratio", [0.25, 0.13])
def test_the_gain_over_the_seed_is_averaged_over_rows(ratio: float) -> None:
    small = _records(RCO, {0: 0.8}, ratio) + _records(FISHER, {0: 1.0}, ratio)
    small += _records("evolution", {0: 2.0}, ratio)
    large = (
        _records(RCO, {0: 1.0}, 0.5) + _records(FISHER, {0: 1.0}, 0.5) + _records("evolution", {0: 2.0}, 0.5)
    )
    text = render(large + small, METHODS, "command")
    assert "RCO / Fisher seed on average: 0.900 over the 2 rows, 0.800 over the 1 at 25 % and below." in text
