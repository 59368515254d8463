"""Plans: from and to assignments, their file, and every contradiction that is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rco.errors import PlanError
from moe_rco.plan import Plan, costs_digest
from moe_rco.types import Assignment, Budget, CostTable, Group, Option, Weight

OPTIONS = tuple(Option.parse(name) for name in ("prune", "int4-g64", "bf16"))
LAYERS, EXPERTS, FLOOR = (0, 2, 10), 4, 2


def make_table(options: tuple[Option, ...] = OPTIONS, bytes_bf16: int = 100) -> CostTable:
    groups = tuple(
        Group(f"{layer}.{index}", layer, index, (Weight(f"{layer}.{index}.weight", (5, 10)),))
        for layer in LAYERS
        for index in range(EXPERTS)
    )
    costs = np.tile(np.array([0, 30, bytes_bf16])[: len(options)], (len(groups), 1))
    return CostTable(groups, options, costs, 100 * len(groups), FLOOR)


TABLE = make_table()
CHOICE = np.array([0, 1, 2, 0, 1, 1, 1, 1, 2, 2, 0, 1])


def make_plan(budget: int = 600, **changes: Any) -> Plan:
    plan = Plan.from_assignment(
        Assignment(TABLE, CHOICE),
        Budget(budget, "test"),
        model_digest="m",
        recipe_digest="r",
        losses={"kl": 0.5},
    )
    return plan.model_copy(update=changes)


def test_fields() -> None:
    plan = make_plan()
    assert (plan.cost, plan.budget, plan.slack) == (30 * 6 + 100 * 3, 600, 120)
    assert plan.options == ("prune", "int4-g64", "bf16")
    assert plan.layers == {
        0: {"prune": (0, 3), "int4-g64": (1,), "bf16": (2,)},
        2: {"int4-g64": (0, 1, 2, 3)},
        10: {"bf16": (0, 1), "prune": (2,), "int4-g64": (3,)},
    }


@given(st.lists(st.integers(0, 2), min_size=12, max_size=12))
def test_assignments_come_back(choice: list[int]) -> None:
    for layer in range(3):
        choice[4 * layer : 4 * layer + 2] = [1, 2]
    assignment = Assignment(TABLE, np.array(choice))
    plan = Plan.from_assignment(assignment, Budget(5000, ""), model_digest="m", recipe_digest="r")
    again = Plan.model_validate_json(plan.to_json())
    assert again == plan
    assert (again.check(TABLE).choice == assignment.choice).all()


def test_the_file_is_sorted_and_deterministic(tmp_path: Path) -> None:
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(tmp_path) == plan
    value = json.loads((tmp_path / "plan.json").read_text())
    assert list(value) == sorted(value)
    assert list(value["layers"]) == ["0", "2", "10"]
    shuffled = {key: value[key] for key in reversed(value)}
    shuffled["layers"] = {
        layer: {name: ids[::-1] for name, ids in reversed(by.items())}
        for layer, by in reversed(value["layers"].items())
    }
    assert Plan.model_validate(shuffled).to_json() == plan.to_json()


def test_quantization_config() -> None:
    config = make_plan().quantization_config()
    assert json.loads(json.dumps(config)) == config
    assert config["quant_method"] == "moe_rco"
    assert config["format_version"] == 1
    assert config["layers"]["10"] == {"bf16": [0, 1], "int4-g64": [3], "prune": [2]}


def test_a_plan_cannot_be_made_over_its_budget_or_under_the_floor() -> None:
    with pytest.raises(PlanError, match="needs 480 bytes, the budget is 479"):
        make_plan(budget=479)
    pruned = CHOICE.copy()
    pruned[:3] = 0
    with pytest.raises(PlanError, match="layer 0 keeps 0 experts"):
        Plan.from_assignment(Assignment(TABLE, pruned), Budget(5000, ""), model_digest="m", recipe_digest="r")


def change_layer(layer: int, by_option: dict[str, tuple[int, ...]] | None) -> dict[str, Any]:
    layers = dict(make_plan().layers)
    if by_option is None:
        del layers[layer]
    else:
        layers[layer] = by_option
    return {"layers": layers}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 479, "slack": -1}, "needs 480 bytes, the budget is 479"),
        ({"cost": 470, "slack": 130}, "says it costs 470 bytes, its options cost 480"),
        ({"costs": "0"}, "made from other costs"),
        ({"options": ("prune", "bf16")}, "options are prune, bf16, the cost table's"),
        (change_layer(0, None), "expert 0 of layer 0 no option"),
        (change_layer(2, {"int4-g64": (0, 1, 3)}), "expert 2 of layer 2 no option"),
        (
            change_layer(2, {"int4-g64": (0, 1, 2, 3, 4)}),
            "expert 4 of layer 2, which the model does not have",
        ),
        (change_layer(1, {"bf16": (0,)}), "expert 0 of layer 1, which the model does not have"),
        (
            change_layer(2, {"int4-g64": (0, 1, 2, 3), "bf16": (1,)}),
            "expert 1 of layer 2 is given two options",
        ),
        (change_layer(2, {"int4-g64": (0, 1, 2, 3, 3)}), "expert 3 of layer 2 is given two options"),
        (change_layer(2, {"int9": (0, 1, 2, 3)}), "layer 2: unknown option 'int9'"),
        (change_layer(2, {"int8": (0, 1, 2, 3)}), "the option int8, which is not one of its options"),
        (
            {**change_layer(2, {"prune": (0, 1, 2), "bf16": (3,)}), "cost": 460, "slack": 140},
            "layer 2 keeps 1 experts, but 2 are used per token",
        ),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], words: str) -> None:
    make_plan().check(TABLE)
    with pytest.raises(PlanError, match=words):
        make_plan(**changes).check(TABLE)


def test_the_costs_digest_sees_costs_options_and_floor() -> None:
    floor = CostTable(TABLE.groups, TABLE.options, TABLE.costs, TABLE.original_bytes, 1)
    tables = [TABLE, make_table(bytes_bf16=101), make_table(OPTIONS[:2]), floor]
    assert len({costs_digest(table) for table in tables}) == 4
    assert costs_digest(make_table()) == costs_digest(TABLE)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"surplus": 1}, {"cost": -1}, {"budget": "many"}, {"losses": {"kl": float("nan")}},
        {"layers": {"x": {}}}, {"layers": {"0": {"bf16": [-1]}}}, {"options": None},
    ],
)  # fmt: skip
def test_a_file_that_is_no_plan(tmp_path: Path, change: dict[str, Any]) -> None:
    value = {**json.loads(make_plan().to_json()), **change}
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(PlanError, match=f"is not a plan: {next(iter(change))}"):
        Plan.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slack": 1}, "it says its slack is 1 bytes, it is 120"),
        ({"budget": 479, "slack": -1}, "it needs 480 bytes, its budget is 479"),
        ({"cost": 470}, "it says its slack is 120 bytes, it is 130"),
    ],
)
def test_a_file_whose_bytes_do_not_add_up(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({**json.loads(make_plan().to_json()), **change}))
    with pytest.raises(PlanError, match=f"is not a plan: .*{words}"):
        Plan.load(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read the plan"):
        Plan.load(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(PlanError, match="is not a plan"):
        Plan.load(tmp_path)


def stock_plan(choice: list[int], budget: int = 5000) -> Plan:
    assignment = Assignment(replace(TABLE, layout="stock"), np.array(choice))
    return Plan.from_assignment(assignment, Budget(budget, ""), model_digest="m", recipe_digest="r")


STOCK = [0, 1, 1, 0, 2, 0, 0, 2, 0, 0, 1, 1]


def test_the_stock_layout_is_part_of_a_plan(tmp_path: Path) -> None:
    plan = stock_plan(STOCK)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path).layout == "stock"
    assert plan.check(replace(TABLE, layout="stock")).choice.tolist() == STOCK
    assert [plan.kept(layer) for layer in (0, 2, 10)] == [(1, 2), (0, 3), (2, 3)]
    with pytest.raises(PlanError, match="the plan's layout is stock, the cost table's mixed"):
        plan.check(TABLE)
    with pytest.raises(PlanError, match="the plan's layout is mixed, the cost table's stock"):
        make_plan().check(replace(TABLE, layout="stock"))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ([1, 1, 1, 0, *STOCK[4:]], "layer 2 keeps 2 experts and layer 0 3, but with layout stock all layers"),
        ([0, 1, 2, 0, *STOCK[4:]], "layer 0 keeps experts at bf16 and int4-g64, but with layout stock"),
    ],
)
def test_the_stock_layout_is_checked(choice: list[int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        stock_plan(choice)


def test_a_plan_written_before_there_were_layouts_is_mixed() -> None:
    data = json.loads(make_plan().to_json())
    del data["layout"]
    assert Plan.model_validate(data) == make_plan()
