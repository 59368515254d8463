"""Random cost tables for property tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from moe_rco.types import Budget, CostTable, Group, Option, Weight

OPTIONS = ("prune", "int2-g64", "int3-g64", "int4-g64", "int8-g64", "bf16")
PRICES = (0, 9, 13, 17, 33, 64)


def make_table(layers: int, experts: int, floor: int, options: tuple[str, ...] = OPTIONS) -> CostTable:
    """Equal experts whose options cost seven times `PRICES` bytes."""
    unit = 7
    groups = tuple(
        Group(f"layers.{layer}.experts.{index}", layer, index, (Weight(f"{layer}.{index}", (4, 4)),))
        for layer in range(layers)
        for index in range(experts)
    )
    prices = [PRICES[OPTIONS.index(option)] * unit for option in options]
    costs = np.tile(np.array(prices, dtype=np.int64), (len(groups), 1))
    return CostTable(groups, tuple(map(Option.parse, options)), costs, len(groups) * 64 * unit, floor)


@st.composite
def problems(draw: st.DrawFn) -> tuple[CostTable, Budget]:
    """A table and a budget it can meet."""
    experts = draw(st.integers(2, 7))
    options = ("prune", *sorted(draw(st.sets(st.sampled_from(OPTIONS[1:]), min_size=1)), key=OPTIONS.index))
    table = make_table(draw(st.integers(1, 4)), experts, draw(st.integers(1, experts - 1)), options)
    smallest, largest = table.range
    return table, Budget(draw(st.integers(smallest, largest)), "")
