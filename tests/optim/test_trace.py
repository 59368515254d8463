"""Records and the best assignment survive being stored."""

from __future__ import annotations

import numpy as np
import pytest

from moe_rco.optim.trace import Incumbent, StepRecord, pack_history, unpack_history


def test_the_incumbent_remembers_the_best_and_the_latest():
    incumbent = Incumbent(margin=0.0)
    good, latest, new = np.array([0, 1]), np.array([1, 1]), np.array([0, 0])
    incumbent.judge(good, 1.0, "good")
    incumbent.judge(latest, 3.0, "latest")
    restored = Incumbent(margin=0.0)
    restored.load(incumbent.state())
    for each in (incumbent, restored):
        assert (each.recall(good), each.recall(latest), each.recall(new)) == (1.0, 3.0, None)
        assert (each.value, each.name, each.misses) == (1.0, "good", 1)


def test_history_survives_packing():
    history = [
        StepRecord(1, 2.5, 1e-13, 1.0, 0.7, None, float("inf"), 4),
        StepRecord(2, 2.0, 0.0, 0.5, 0.6, 1.25, 1.25, 9),
    ]
    assert unpack_history(pack_history(history)) == history
    assert unpack_history(pack_history([])) == []
    with pytest.raises(RuntimeError, match="on_step"):
        history[0].state()
