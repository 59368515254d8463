"""A recipe made concrete: which groups are chosen for, and what the budget then covers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from moe_rco.ckpt.reader import Checkpoint
from moe_rco.errors import BudgetError, RecipeError
from moe_rco.job import size
from moe_rco.recipe import Recipe, parse
from moe_rco.types import KINDS
from tests.conftest import MINIMAL
from tests.tiny_models import save_tiny

ALL = f"groups=[{', '.join(KINDS)}]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("models") / "tiny")


def recipe(model: Path, *overrides: str) -> Recipe:
    return parse(MINIMAL, "mine.yaml", [f"model={model}", *overrides])


def test_a_recipe_without_groups_is_what_it_was() -> None:
    plain, named = parse(MINIMAL), parse(MINIMAL, overrides=["groups=[experts]"])
    assert plain == named
    assert "groups" not in plain.to_yaml()
    written = plain.model_dump(mode="json", exclude={"output"})
    assert "groups" not in written
    assert plain.digest() == hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
    assert parse(MINIMAL, overrides=["groups=[experts, head]"]).digest() != plain.digest()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["groups=[head]"], "'experts' must be among them"),
        (["groups=[experts, head, head]"], "'head' is listed twice"),
        (["groups=[experts, router]"], "groups"),
        (["groups=[experts, head]", "layout=stock"], "layout stock knows experts only"),
        (["groups=[experts, head]", "search.method=linearity"], "linearity knows experts only"),
    ],
)
def test_what_groups_cannot_be(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse(MINIMAL, "mine.yaml", overrides)
    assert "\n" not in str(caught.value)


def test_the_budget_covers_every_group_that_is_named(model: Path) -> None:
    checkpoint = Checkpoint(model)
    names = {
        "attention": lambda name: "self_attn" in name and name.endswith("proj.weight"),
        "shared_experts": lambda name: ".shared_expert." in name,
        "embeddings": lambda name: "embed_tokens" in name,
        "head": lambda name: name == "lm_head.weight",
    }
    experts = size(recipe(model)).table.original_bytes
    total = experts
    for kind, is_of in names.items():
        sized = size(recipe(model, f"groups=[experts, {kind}]", "budget.ratio=1"))
        of_kind = sum(tensor.nbytes for name, tensor in checkpoint.tensors.items() if is_of(name))
        assert sized.table.original_bytes == experts + of_kind == sized.budgets[0].bytes
        assert {sized.table.groups[row].kind for row in sized.table.dense} == {kind}
        assert sized.table.experts.original_bytes == experts
        total += of_kind
    whole = size(recipe(model, ALL))
    assert whole.table.original_bytes == total
    assert whole.budgets[0].bytes == total // 4
    assert whole.other_numel == size(recipe(model)).other_numel - (total - experts) // 2


def test_fit_takes_no_weight_off_twice(model: Path) -> None:
    fit = ["budget={fit: {gpu_memory: 4GB, max_model_len: 64}}"]
    rooms = []
    for groups in ("groups=[experts]", ALL):
        with pytest.raises(BudgetError, match="nothing needs to be done") as caught:
            size(recipe(model, groups, *fit))
        rooms.append(int(str(caught.value).split("budget ")[1].split(" bytes")[0].replace(",", "")))
    gained = size(recipe(model, ALL)).table.numel - size(recipe(model)).table.numel
    assert rooms[1] - rooms[0] == 2 * gained


def test_budgets_that_cannot_be_met(model: Path) -> None:
    smallest, largest = size(recipe(model, ALL)).table.range
    assert size(recipe(model, ALL, f"budget={smallest}B")).budgets[0].bytes == smallest
    with pytest.raises(BudgetError, match=f"smallest possible is {smallest:,} bytes"):
        size(recipe(model, ALL, f"budget={smallest - 1}B"))
    with pytest.raises(BudgetError, match="more than the groups that the budget covers take"):
        size(recipe(model, ALL, f"budget={largest + 10**6}B"))


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("qwen3_moe", ["groups=[experts, shared_experts]"], "have no shared experts"),
        (
            "mixtral",
            ["groups=[experts, embeddings]"],
            "vLLM reads the embeddings of mixtral models as they are",
        ),
        (
            "qwen3_moe",
            ["groups=[experts, attention]", "options=[prune, int4-g64]"],
            r"none of prune, int4-g64 can be taken by model.layers.0.self_attn.o_proj, whose inputs are 96 wide",
        ),
    ],
)
def test_groups_that_a_model_does_not_have_or_cannot_take(
    family: str, overrides: list[str], message: str, tmp_path: Path
) -> None:
    heads: dict[str, Any] = {"head_dim": 24} if family == "qwen3_moe" else {}
    with pytest.raises(RecipeError, match=message) as caught:
        size(recipe(save_tiny(family, tmp_path / "model", **heads), *overrides))
    assert "\n" not in str(caught.value)


def test_a_group_takes_what_divides_its_widths(tmp_path: Path) -> None:
    model = save_tiny("qwen3_moe", tmp_path / "model", head_dim=24)
    table = size(recipe(model, "groups=[experts, attention]")).table
    taken = {
        table.groups[row].name.rpartition(".")[2]: [
            option.name for option, has in zip(table.options, table.allowed[row], strict=True) if has
        ]
        for row in table.dense
    }
    assert taken == {"qkv_proj": ["int4-g64", "int8-g64", "bf16"], "o_proj": ["bf16"]}


def test_tied_embeddings_are_one_group_with_the_head(tmp_path: Path) -> None:
    model = save_tiny("qwen3_moe", tmp_path / "model", tie_word_embeddings=True)
    tables = [
        size(recipe(model, f"groups=[experts, {kind}]")).table
        for kind in ("head", "embeddings", "head, embeddings")
    ]
    for table in tables:
        assert [table.groups[row].name for row in table.dense] == ["model.embed_tokens"]
