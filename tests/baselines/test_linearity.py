"""The linearity method's coefficients, against measuring each option itself."""

from __future__ import annotations

import numpy as np
import pytest

from moe_rco.baselines import linear_losses
from moe_rco.calib.reference import divergence
from moe_rco.types import Silent
from tests.calibrated import Calibration


def test_coefficients_are_measured_and_errors_are_relative(ready: Calibration) -> None:
    model, pool, reference = ready.model, ready.pools[1], ready.calibrated.kept_out
    losses = linear_losses(model, pool, reference, Silent())
    table, bank = model.table, model.layer_bank(model.table.layers[0])
    assert losses.shape == table.costs.shape
    coarse = min((o for o in table.options if not o.is_prune), key=lambda option: option.bits)
    narrowest, expert = table.option_index(coarse), 1
    choice = np.full(len(table.groups), len(table.options))
    choice[table.rows(table.layers[0])[expert]] = narrowest
    logits = model.runner.logits(model.hidden(pool.ids, choice))
    measured = float(divergence(reference, logits).mean())
    row = table.rows(table.layers[0])[expert]
    assert losses[row, narrowest] == pytest.approx(measured, rel=1e-3)
    before, after = bank.weights(expert, bank.original), bank.weights(expert, narrowest)
    changed = sum(float((b - a).square().sum()) for b, a in zip(before, after, strict=True))
    relative = changed / sum(float(b.square().sum()) for b in before)
    assert table.prune_index is not None
    assert losses[row, table.prune_index] * relative == pytest.approx(losses[row, narrowest], rel=1e-5)
