"""Every simple method stays within the budget and the floors, and uses the budget up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_rco.baselines import OutputErrors, starting_points, uniform
from moe_rco.baselines.saliency import prune_equally, prune_lowest
from moe_rco.calib.calibrate import Usage
from moe_rco.calib.search import knapsack
from moe_rco.errors import BudgetError
from moe_rco.types import Assignment, Budget, CostTable, Option
from tests.baselines.tables import make_table, problems


def random_scores(table: CostTable, seed: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 9, (len(table.layers), len(table.groups)), generator=generator).double()
    return {layer: scores[n, : len(table.rows(layer))] for n, layer in enumerate(table.layers)}


def random_errors(table: CostTable, seed: int) -> OutputErrors:
    generator = np.random.default_rng(seed)
    groups = len(table.groups)
    return OutputErrors(
        generator.random(table.costs.shape), generator.random(groups), generator.random(groups)
    )


PROXIES = {"proxy (absolute)", "proxy (block)", "proxy (stream)"}


@given(problems(), st.integers(0, 99))
def test_starting_points_are_feasible(problem: tuple[CostTable, Budget], seed: int) -> None:
    table, budget = problem
    usage = Usage(random_scores(table, seed), random_scores(table, seed + 1))
    found = starting_points(table, budget, usage, random_errors(table, seed))
    assert found, "a budget that can be met has a candidate"
    for assignment in found.values():
        assignment.check(budget)


@given(problems(), st.integers(0, 99), st.booleans())
def test_one_more_expert_would_not_fit(problem: tuple[CostTable, Budget], seed: int, per_layer: bool) -> None:
    table, budget = problem
    scores = random_scores(table, seed)
    for index, option in enumerate(table.options[1:], 1):
        least = table.floor * len(table.layers) * int(table.costs[0, index])
        assignment = prune_lowest(table, budget, scores, option, per_layer=per_layer)
        assert (assignment is None) == (least > budget.bytes)
        if assignment is not None:
            assignment.check(budget)
            pruned = assignment.choice == 0
            assert not pruned.any() or budget.bytes - assignment.cost < table.costs[0, index]


@given(problems(), st.integers(0, 99))
def test_the_best_of_a_layer_are_kept(problem: tuple[CostTable, Budget], seed: int) -> None:
    table, budget = problem
    scores = random_scores(table, seed)
    assignment = prune_lowest(table, budget, scores, table.options[1])
    if assignment is None:
        return
    for layer in table.layers:
        kept = assignment.choice[table.rows(layer)] > 0
        score = scores[layer].numpy()
        assert score[kept].min() >= score[~kept].max(initial=-np.inf)


@given(problems(), st.integers(0, 99))
def test_layers_taking_turns_keep_equally_many(problem: tuple[CostTable, Budget], seed: int) -> None:
    table, budget = problem
    assignment = prune_lowest(table, budget, random_scores(table, seed), table.options[1], per_layer=True)
    if assignment is not None:
        counts = [len(assignment.kept(layer)) for layer in table.layers]
        assert max(counts) - min(counts) <= 1


def test_scores_are_compared_within_their_layer() -> None:
    table = make_table(2, 4, 1)
    # Layer 1 routes a hundred times fewer tokens (a shorter text, say): its shares count, not its totals.
    scores = {0: torch.tensor([40.0, 30, 20, 10]), 1: torch.tensor([0.1, 0.1, 0.1, 0.7])}
    four = Budget(4 * int(table.costs[0, -1]), "")
    assignment = prune_lowest(table, four, scores, Option.parse("bf16"))
    assert assignment is not None
    assert (assignment.kept(0), assignment.kept(1)) == ([0, 1, 2], [3])
    turns = prune_lowest(table, four, scores, Option.parse("bf16"), per_layer=True)
    assert turns is not None
    assert (turns.kept(0), turns.kept(1)) == ([0, 1], [0, 3])


@pytest.mark.parametrize(
    ("ratio", "name"), [(1, "bf16"), (0.9, "int8-g64"), (0.3, "int4-g64"), (0.15, "int2-g64")]
)
def test_uniform_is_the_widest_that_fits(ratio: float, name: str) -> None:
    table = make_table(2, 4, 1)
    assignment = uniform(table, Budget(int(ratio * table.original_bytes), ""))
    assert assignment is not None
    assert set(assignment.choice) == {table.option_index(Option.parse(name))}


def test_what_does_not_fit_is_left_out() -> None:
    table = make_table(2, 4, 1)
    scores = {0: torch.ones(4), 1: torch.ones(4)}
    assert uniform(table, Budget(table.costs[0, 1] * 8 - 1, "")) is None
    found = starting_points(
        table, Budget(int(table.costs[0, 3]) * 3, ""), Usage(scores, scores), random_errors(table, 0)
    )
    options = ("int2-g64", "int3-g64", "int4-g64")
    pruned = {f"{score} + {option}" for score in ("frequency", "REAP") for option in options}
    assert set(found) == pruned | PROXIES


def test_without_prune_there_is_nothing_to_rank() -> None:
    table = make_table(2, 4, 1, options=("int4-g64", "bf16"))
    scores = {0: torch.ones(4), 1: torch.ones(4)}
    budget = Budget(Assignment.uniform(table, Option.parse("int4-g64")).cost, "")
    found = starting_points(table, budget, Usage(scores, scores), random_errors(table, 0))
    assert set(found) == {"uniform int4-g64"} | PROXIES


@given(problems(), st.integers(0, 99))
def test_starting_points_of_the_stock_layout(problem: tuple[CostTable, Budget], seed: int) -> None:
    table, budget = replace(problem[0], layout="stock"), problem[1]
    usage = Usage(random_scores(table, seed), random_scores(table, seed + 1))
    found = starting_points(table, budget, usage, random_errors(table, seed))
    assert found, "a budget that can be met has a candidate"
    for name, assignment in found.items():
        assignment.check(budget)
        if name.startswith(("uniform", "proxy")):
            continue
        scores = usage.counts if name.startswith("frequency") else usage.saliency
        option = next(option for option in table.options if name.endswith(f"+ {option}"))
        assert set(assignment.counts()) >= {"prune", option.name}
        more = len(table.layers) * int(table.costs[0, table.option_index(option)])
        assert assignment.cost + more > budget.bytes  # one more of every layer would not fit
        for layer in table.layers:
            score, kept = scores[layer].numpy(), assignment.choice[table.rows(layer)] > 0
            assert score[kept].min() >= score[~kept].max(initial=-np.inf)


def test_equal_pruning_needs_room_for_the_floor_and_an_option_to_prune() -> None:
    table = make_table(2, 4, 2)
    scores, four = {0: torch.ones(4), 1: torch.ones(4)}, table.option_index(Option.parse("int4-g64"))
    price = int(table.costs[0, four])
    assert prune_equally(table, Budget(4 * price - 1, ""), scores, table.options[four]) is None
    kept = prune_equally(table, Budget(6 * price - 1, ""), scores, table.options[four])
    assert kept is not None
    assert (len(kept.kept(0)), len(kept.kept(1))) == (2, 2)
    without = make_table(2, 4, 2, options=("int4-g64", "bf16"))
    assert prune_equally(without, Budget(10**6, ""), scores, Option.parse("bf16")) is None


@given(problems())
def test_the_range_of_costs_is_that_of_both_layouts(problem: tuple[CostTable, Budget]) -> None:
    table = replace(problem[0], layout="stock")
    smallest, largest = table.range
    zeros = np.zeros(table.costs.shape)
    assert knapsack(-table.costs.astype(float), table, Budget(largest, "")).cost == largest
    assert knapsack(zeros, table, Budget(smallest, "")).cost == smallest
    with pytest.raises(BudgetError):
        knapsack(zeros, table, Budget(smallest - 1, ""))
