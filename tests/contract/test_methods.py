"""What every method that a recipe can name promises, on a trained model prepared once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from moe_rco import recipe as recipes
from moe_rco.calib.search import SEED
from moe_rco.ckpt.locate import fetch_model
from moe_rco.errors import UserError
from moe_rco.job import open_inputs, size
from moe_rco.optim.solve import SEARCHES
from moe_rco.pipeline import Prepared, choose, prepare
from moe_rco.recipe import Recipe
from moe_rco.recipe_sections import SearchMethod
from moe_rco.types import Budget, Silent

MODEL = Path(__file__).resolve().parents[2] / "eval" / "models" / "mixtral"
METHODS = get_args(SearchMethod)


def recipe_of(method: str, *settings: str) -> Recipe:
    small = [
        "calibration.sequences=16",
        "search.steps=8",
        "search.refine=8",
        "search.samples=2",
        "search.batch=2",
    ]
    own = [f"model={MODEL}", "quantizer.method=rtn", f"search.method={method}"]
    return recipes.load("demo", [*own, *small, *settings])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    recipe = recipe_of("rco")
    return prepare(open_inputs(size(recipe), fetch_model(recipe)), tmp_path_factory.mktemp("work"), Silent())


@pytest.fixture(scope="module")
def budget(prepared: Prepared) -> Callable[[float], Budget]:
    return lambda ratio: Budget(int(prepared.model.table.original_bytes * ratio), "test")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits_the_budget_and_says_what_it_measured(
    prepared: Prepared, budget: Callable[[float], Budget], method: str
) -> None:
    within = budget(0.2)
    chosen = choose(prepared, within, recipe_of(method), Silent())
    chosen.best.assignment.check(within)
    names = {candidate.name for candidate in chosen.candidates}
    assert chosen.best.name in names
    assert bool(chosen.history) == (method in SEARCHES)
    assert (SEED in names) == (method in ("rco", "fisher")), "the seed is ours, no rival starts from it"
    assert all(np.isfinite(candidate.kl) for candidate in chosen.candidates)
    if method != "rco":
        assert chosen.best.kl == min(candidate.kl for candidate in chosen.candidates)
    again = choose(prepared, within, recipe_of(method), Silent())
    assert np.array_equal(again.best.assignment.choice, chosen.best.assignment.choice)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("uniform", ["options=[prune,int4-g64,bf16]", "budget.ratio=0.1"]),
        ("reap", ["options=[prune,int4-g64]", "budget.ratio=0.27"]),
    ],
)
def test_a_method_with_nothing_that_fits_says_so_before_any_work(method: str, settings: list[str]) -> None:
    with pytest.raises(UserError, match=f"search.method: {method} has no assignment that uses this budget"):
        size(recipe_of(method, *settings))
