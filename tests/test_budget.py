"""The budget's three forms and their one resolution to bytes."""

from __future__ import annotations

import numpy as np
import pytest

from moe_rco.budget import BudgetSpec
from moe_rco.errors import BudgetError
from moe_rco.types import BF16, PRUNE, CostTable, Group, Option, Weight

INT4 = Option(4, 64)


def table(options: tuple[Option, ...] = (PRUNE, INT4, BF16), floor: int = 2) -> CostTable:
    """2 layers of 4 experts of 1,000 weights: 0, 530 or 2,000 bytes."""
    cost = {PRUNE: 0, INT4: 530, BF16: 2000}
    groups = tuple(
        Group(f"{layer}.{index}", layer, index, (Weight(f"{layer}.{index}.w", (10, 100)),))
        for layer in range(2)
        for index in range(4)
    )
    costs = np.array([[cost[option] for option in options]] * 8, dtype=np.int64)
    return CostTable(groups, options, costs, original_bytes=16_000, floor=floor)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"bytes": 5000}, 5000),
        ({"bytes": "5kB"}, 5000),
        ({"bytes": "4KiB"}, 4096),
        ({"bytes": "4.0009765625 KiB"}, 4097),
        ({"ratio": 0.25}, 4000),
        ({"ratio": 0.35}, 5600),
        ({"ratio": 1.0}, 16_000),
        ({"ratio": 1 / 3}, 5333),
        ({"avg_bits": 4.25}, 4250),
        ({"avg_bits": 16.0}, 16_000),
    ],
)
def test_resolves_once_to_whole_bytes_rounded_down(spec: dict[str, object], expected: int) -> None:
    assert BudgetSpec.model_validate(spec).resolve(table()).bytes == expected


def test_a_ratio_is_meant_in_decimal_digits() -> None:
    # 0.29 as a binary float is a little below 29/100, and the product would be rounded down to one byte less.
    assert int(0.29 * 100) == 28
    odd = CostTable(table().groups, (PRUNE, INT4, BF16), table().costs, original_bytes=15_900, floor=0)
    assert BudgetSpec(ratio=0.29).resolve(odd).bytes == 4611
    hundred = CostTable(table().groups, (PRUNE, BF16), np.array([[0, 12]] * 8), original_bytes=100, floor=0)
    assert BudgetSpec(ratio=0.29).resolve(hundred).bytes == 29


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ({"bytes": 2119}, ["2,119 bytes", "smallest possible is 2,120 bytes", "largest 16,000 bytes"]),
        ({"ratio": 0.1}, ["ratio 0.1 (1,600 bytes)", "ratio 0.1325 (2,120 bytes)", "ratio 1 (16,000 bytes)"]),
        # As written, although a third of a byte was dropped.
        ({"ratio": 0.0001}, ["ratio 0.0001 (1 bytes)"]),
        ({"avg_bits": 1.0}, ["avg_bits 1 (1,000 bytes)", "avg_bits 2.12 (2,120", "avg_bits 16 (16,000"]),
    ],
)
def test_too_small_names_both_ends_in_the_users_unit(spec: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(BudgetError) as caught:
        BudgetSpec.model_validate(spec).resolve(table())
    for part in (*parts, "too small for the options prune, int4-g64, bf16", "keeps at least 2 experts"):
        assert part in str(caught.value)


def test_the_smallest_figure_shown_is_accepted() -> None:
    uneven = CostTable(table().groups, (INT4,), np.full((8, 1), 531), original_bytes=16_001, floor=2)
    with pytest.raises(BudgetError) as caught:
        BudgetSpec(ratio=0.01).resolve(uneven)
    smallest = float(str(caught.value).split("smallest possible is ratio ")[1].split(" ")[0])
    assert BudgetSpec(ratio=smallest).resolve(uneven).bytes >= 8 * 531


@pytest.mark.parametrize("spec", [{"bytes": 16_001}, {"bytes": "1GiB"}, {"avg_bits": 17.0}])
def test_more_than_uncompressed_is_refused(spec: dict[str, object]) -> None:
    with pytest.raises(BudgetError, match="more than the routed experts take uncompressed: nothing needs"):
        BudgetSpec.model_validate(spec).resolve(table())


def test_between_the_dearest_option_and_uncompressed_is_granted() -> None:
    assert BudgetSpec(ratio=0.9).resolve(table(options=(PRUNE, INT4))).bytes == 14_400


def test_without_prune_the_floor_is_not_mentioned() -> None:
    with pytest.raises(BudgetError) as caught:
        BudgetSpec(bytes=10).resolve(table(options=(INT4, BF16)))
    assert "4,240 bytes" in str(caught.value)
    assert "at least" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"bytes": 12 * 2**20}, "12.00 MiB"),
        ({"ratio": 0.35}, "ratio 0.35"),
        ({"avg_bits": 4.25}, "4.25 bits per weight"),
    ],
)
def test_text(spec: dict[str, object], text: str) -> None:
    assert BudgetSpec.model_validate(spec).text == text


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("50%", "50pct"),
        ("12.5%", "12.5pct"),
        ({"ratio": 1e-5}, "0.001pct"),
        ({"ratio": 1.0}, "100pct"),
        ({"avg_bits": 4.25}, "4.25bit"),
        ("20GiB", "20GiB"),
        ("20GB", "20GB"),
        ("1.5MiB", "1.5MiB"),
        ({"bytes": 12 * 2**20 + 1}, "12582913B"),
        ({"bytes": 1}, "1B"),
    ],
)
def test_name(spec: object, name: str) -> None:
    assert BudgetSpec.model_validate(spec).name == name
    assert BudgetSpec.model_validate({"ratio": 0.25}).resolve(table()).name == "25pct"
