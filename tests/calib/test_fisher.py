"""The gradients behind the Fisher seed have the covariance they are taken for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_rco.calib.fisher import PRUNE_TEMPERATURE, log_likelihood_of_samples
from moe_rco.calib.objective import Pass
from tests.calibrated import Calibration


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradients_have_the_covariance_of_the_softened_distribution(temperature: float) -> None:
    row, draws = torch.tensor([3.0, 0.5, -1.0, 0.0, 2.0]), 200_000
    logits = row.repeat(draws, 1).requires_grad_()
    uniform = torch.rand(1, draws, generator=torch.Generator().manual_seed(0))
    log_likelihood_of_samples(uniform, temperature)(0, slice(0, draws), logits).backward()
    assert logits.grad is not None
    gradients = logits.grad.double()
    p = torch.softmax(row.double() / temperature, 0)
    assert gradients.mean(0).abs().max() < 0.01
    assert torch.allclose(gradients.T @ gradients / draws, p.diag() - p.outer(p), atol=0.005)


def test_softened_gradients_see_tokens_the_model_is_certain_of() -> None:
    logits = torch.tensor([[12.0, 0.0, 0.0, 0.0]]).repeat(1000, 1)
    sizes = []
    for temperature in (1.0, 4.0):
        leaf = logits.clone().requires_grad_()
        uniform = torch.rand(1, len(leaf), generator=torch.Generator().manual_seed(0))
        log_likelihood_of_samples(uniform, temperature)(0, slice(0, len(leaf)), leaf).backward()
        assert leaf.grad is not None
        sizes.append(float(leaf.grad.square().sum(1).mean()))
    assert sizes[0] < 0.001 < 0.05 < sizes[1]


def test_a_weight_scales_the_covariance() -> None:
    row, draws = torch.tensor([3.0, 0.5, -1.0]), 100_000
    logits = row.repeat(draws, 1).requires_grad_()
    uniform = torch.rand(1, draws, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.0, 4.0]).repeat(draws // 2)[None]
    log_likelihood_of_samples(uniform, 1.0, weights)(0, slice(0, draws), logits).backward()
    assert logits.grad is not None
    gradients = logits.grad.double()
    assert not gradients[::2].any()
    p = torch.softmax(row.double(), 0)
    covariance = gradients[1::2].T @ gradients[1::2] / (draws // 2)
    assert torch.allclose(covariance, 4 * (p.diag() - p.outer(p)), atol=0.02)


def test_a_sequence_s_effects_are_what_it_gives_by_itself(ready: Calibration) -> None:
    pool = ready.pools[0]
    together = ready.by_sequence
    assert together.shape == (len(pool), *ready.model.table.costs.shape)
    for row in (0, 5, len(pool) - 1):
        draws = (np.random.default_rng((0, row, number)).random(pool.ids.shape[1]) for number in (0, 1))
        prune = ready.model.table.prune_index
        options = range(len(ready.model.table.options))
        wanted = [[k for k in options if k != prune], 1.0], [[prune], PRUNE_TEMPERATURE]
        passes = [
            Pass(None, log_likelihood_of_samples(torch.from_numpy(draw[None]), temperature), measured)
            for draw, (measured, temperature) in zip(draws, wanted, strict=True)
        ]
        for (measured, _), (_, alone) in zip(
            wanted, ready.model.own_effects(passes, pool.ids[row : row + 1]), strict=True
        ):
            expected = 0.5 * alone.squared[:, measured]
            found = together[row][:, measured]
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * together.max())
