"""What is made from the code is what the code makes now, and the schema admits what `validate` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from eval.reference import PAGES, schema
from moe_rco import recipe
from moe_rco.errors import RecipeError

VALIDATOR = Draft202012Validator(schema())
BASE: dict[str, Any] = {
    "version": 1, "model": "demo", "options": ["prune", "int4-g64"], "budget": "35%",
    "calibration": {"data": "demo"}, "output": "x",
}  # fmt: skip


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_are_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == PAGES[path](), "python -m eval.reference"


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("name", recipe.shipped())
def test_it_admits_the_shipped_recipes(name: str) -> None:
    text = recipe.shipped()[name].read_text(encoding="utf-8")
    VALIDATOR.validate(yaml.safe_load(text))
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"budget": {"bytes": "20GiB"}},
        {"budget": {"bytes": 10**9}},
        {"budget": ["50%", {"ratio": 0.3}, "2GiB"]},
        {"budget": {"fit": "24GB"}},
        {"budget": {"fit": {"gpu_memory": "24GB", "max_num_seqs": 8}}},
        {"calibration": {"data": ["a.txt", {"data": "b/c", "weight": 2, "split": "test"}]}},
        {"calibration": {"data": {"data": "a.txt"}}},
        {"execution": "streaming"},
        {"execution": None, "search": None, "quantizer": None},
        {"execution": {"device": "cuda:1", "memory_limit": "20GiB"}},
        {"options": ["int3", "int8-g128", "bf16"], "experimental": True},
    ],
)
def test_it_admits_what_validate_does(changes: dict[str, Any]) -> None:
    VALIDATOR.validate(BASE | changes)
    recipe.parse(yaml.safe_dump(BASE | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"budgets": "35%"},
        {"version": 2},
        {"model": ""},
        {"options": []},
        {"options": ["int5"]},
        {"options": ["int4-g0"]},
        {"budget": []},
        {"budget": {"ratio": 1.5}},
        {"budget": {"fit": {"max_num_seqs": 8}}},
        {"layout": "Stock"},
        {"calibration": {}},
        {"calibration": {"data": []}},
        {"calibration": {"data": "demo", "holdout": 1}},
        {"search": {"samples": 3}},
        {"search": {"method": "magic"}},
        {"execution": "gpu"},
        {"execution": {"device": "gpu"}},
    ],
)
def test_it_refuses_what_validate_refuses(changes: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(BASE | changes)
    with pytest.raises(RecipeError):
        recipe.parse(yaml.safe_dump(BASE | changes))


def test_every_key_is_explained() -> None:
    sections = [schema(), *schema()["$defs"].values()]
    missing = [
        (section["title"], key)
        for section in sections
        for key, value in section["properties"].items()
        if not value.get("description")
    ]
    assert missing == []
