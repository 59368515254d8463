"""Streamed execution gives what resident execution gives, whatever fits into its window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_rco.adapters import get_adapter
from moe_rco.baselines import output_errors
from moe_rco.calib.bank import OptionBank
from moe_rco.calib.calibrate import calibrate
from moe_rco.calib.fisher import fisher_effects
from moe_rco.calib.losses import SampledLoss
from moe_rco.calib.objective import AssignedModel, Pass
from moe_rco.calib.reference import divergence
from moe_rco.calib.runner import Runner
from moe_rco.calib.search import knapsack
from moe_rco.calib.streaming import Streaming
from moe_rco.ckpt.store import Store
from moe_rco.recipe_sections import Search
from moe_rco.types import Budget, Silent
from tests.calibrated import CPU, Calibration

HELD = [Streaming(0, 16, 1), Streaming(60_000, 100, 1 << 18, True), Streaming(1 << 30, 1 << 15, 1 << 30)]
"""Nothing and one of each, some, and everything."""


@pytest.fixture(params=HELD)
def streamed(request: pytest.FixtureRequest, ready: Calibration) -> AssignedModel:
    checkpoint = ready.model.bank.checkpoint
    adapter = get_adapter(checkpoint.config)
    bank = OptionBank(checkpoint, ready.model.table, CPU, torch.float32, request.param)
    runner = Runner(checkpoint, adapter, CPU, torch.float32, request.param)
    return AssignedModel(runner, adapter, checkpoint.config, bank, ready.store)


def choices(ready: Calibration) -> list[np.ndarray]:
    """Assignments that differ, some with pruned experts."""
    size = ready.model.table.original_bytes
    return [knapsack(ready.q, ready.model.table, Budget(int(size * r), "")).choice for r in (0.17, 0.2, 0.5)]


def test_hidden_states_and_logits(ready: Calibration, streamed: AssignedModel) -> None:
    for choice in (None, *choices(ready)):
        resident, ours = (model.hidden(ready.pools[0].ids[:3], choice) for model in (ready.model, streamed))
        torch.testing.assert_close(ours, resident, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(streamed.runner.logits(ours), ready.model.runner.logits(resident))


def test_effects_of_several_samples_at_once(ready: Calibration, streamed: AssignedModel) -> None:
    reference = ready.calibrated.train.of(slice(0, 4), CPU)

    def loss(row: int, positions: slice, logits: torch.Tensor) -> torch.Tensor:
        return divergence(reference.at(row, positions), logits).sum()

    passes = [Pass(choice, loss) for choice in choices(ready)]
    passes += [Pass(None, loss, [0]), Pass(passes[0].choice, loss, [1, 2])]
    results = [model.effects(passes, ready.pools[0].ids[:4], stride=3) for model in (ready.model, streamed)]
    for (value, effects), (expected, known) in zip(*reversed(results), strict=True):
        assert value == pytest.approx(expected, rel=1e-5)
        for ours, theirs in ((effects.linear, known.linear), (effects.squared, known.squared)):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * np.abs(theirs).max())


def test_losses_of_a_step(ready: Calibration, streamed: AssignedModel) -> None:
    search = Search(samples=2, batch=4)
    one_hot = [
        torch.nn.functional.one_hot(torch.from_numpy(c), len(ready.model.table.options)).double()
        for c in choices(ready)[:2]
    ]
    found = []
    for model in (ready.model, streamed):
        loss = SampledLoss(model, ready.q, ready.pools[0], ready.calibrated.train, search)
        leaves = [sample.clone().requires_grad_() for sample in one_hot]
        values = loss.together(leaves)
        torch.stack(values).sum().backward()
        found.append(([float(value.detach()) for value in values], [leaf.grad for leaf in leaves]))
    (expected, slopes), (values, ours) = found
    assert values == pytest.approx(expected, rel=1e-5)
    for slope, our in zip(slopes, ours, strict=True):
        torch.testing.assert_close(our, slope, rtol=1e-3, atol=1e-5)


def test_the_fisher_estimate_and_output_errors(ready: Calibration, streamed: AssignedModel) -> None:
    found = fisher_effects(streamed, ready.pools[0], 0, Silent())
    np.testing.assert_allclose(found, ready.by_sequence, rtol=1e-3, atol=1e-6 * ready.by_sequence.max())
    ours, resident = (output_errors(model, ready.pools[0], Silent()) for model in (streamed, ready.model))
    for name, values in vars(resident).items():
        np.testing.assert_allclose(vars(ours)[name], values, rtol=1e-3, atol=1e-6 * values.max())


def test_divergences(ready: Calibration, streamed: AssignedModel) -> None:
    pool, reference = ready.pools[1], ready.calibrated.kept_out
    for choice in choices(ready):
        ours, resident = (m.divergences(choice, pool, reference) for m in (streamed, ready.model))
        np.testing.assert_allclose(ours, resident, rtol=1e-4)


def test_calibration(ready: Calibration, streamed: AssignedModel, tmp_path: Path) -> None:
    """The store is the same to the byte: the same experts in the same order on the same tokens."""
    store = Store(tmp_path / "store", "tiny")
    original = AssignedModel(streamed.runner, get_adapter(config_of(ready)), config_of(ready), streamed.bank)
    found = calibrate(original, store, ready.pools, "gptq", Silent())
    for ours, theirs in zip(
        (found.train, found.kept_out), (ready.calibrated.train, ready.calibrated.kept_out), strict=True
    ):
        torch.testing.assert_close(ours.log_p, theirs.log_p, rtol=1e-4, atol=1e-5)
    for layer, counts in ready.calibrated.usage.counts.items():
        torch.testing.assert_close(found.usage.counts[layer], counts)
        torch.testing.assert_close(found.usage.saliency[layer], ready.calibrated.usage.saliency[layer])
        for option in ready.model.table.options:
            if option.is_quantized:
                same = store.read(layer, option), ready.store.read(layer, option)
                assert all(torch.equal(same[0][name], value) for name, value in same[1].items())


def config_of(ready: Calibration) -> dict:
    return ready.model.bank.config
