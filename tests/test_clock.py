"""Stages with their times and what was predicted, and the memory taken."""

from __future__ import annotations

import numpy as np

from moe_rco.clock import Clock
from moe_rco.types import Silent
from tests.reports import preflight


def test_stages_have_their_own_name_whatever_the_budget_and_their_prediction() -> None:
    clock = Clock(Silent(), times={"search": 12.0})
    for name in ("search", "rest"):
        with clock.at("25pct").stage(name, 1) as advance:
            advance(1)
    assert [(stage.name, stage.predicted) for stage in clock.stages] == [("search", 12.0), ("rest", None)]
    assert all(stage.seconds >= 0 for stage in clock.stages)


def test_memory_is_what_the_system_counted() -> None:
    assert Clock(Silent()).memory is None
    clock = Clock(Silent(), expected=preflight(memory=123))
    before = clock.memory
    assert before is not None
    taken = np.ones(before.host // 4)  # twice as much as ever before
    after = clock.memory
    assert after is not None
    assert after.host > 2 * before.host > 0 == taken.sum() - len(taken)
    assert (after.predicted_host, after.device, after.predicted_device) == (123, 0, 0)
