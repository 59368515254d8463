"""KL taken to be linear in every expert's own weight error: HIGGS's linearity theorem (arXiv 2411.17525) and a knapsack."""

from __future__ import annotations

import numpy as np
import torch

from moe_rco.calib.data import TokenPool
from moe_rco.calib.objective import AssignedModel
from moe_rco.calib.reference import Reference
from moe_rco.types import Progress


@torch.no_grad()
def linear_losses(
    model: AssignedModel, pool: TokenPool, reference: Reference, progress: Progress
) -> np.ndarray:
    """Predicted KL float64 [N, K]: a_i |W_ik - W_i|^2 / |W_i|^2, pruning being an error of 1.

    a_i is measured: the KL of the model in which group i alone is at the option with the largest error that keeps it,
    or pruned where nothing else is coarse, over that error. N passes over the pool.
    """
    errors = _weight_errors(model)
    kept = np.array([not option.is_prune for option in model.table.options])
    probes = np.where(kept, errors, 0.0).argmax(1)
    probes = np.where(errors[np.arange(len(errors)), probes] > 0, probes, errors.argmax(1))
    losses, unchanged = np.zeros_like(errors), np.full(len(errors), errors.shape[1])
    with progress.stage("measure every expert's coefficient", len(errors)) as advance:
        for group, option in enumerate(probes):
            choice = unchanged.copy()
            choice[group] = option
            kl = float(model.divergences(choice, pool, reference).mean())
            coefficient = max(kl, 0.0) / max(errors[group, option], 1e-300)
            losses[group] = coefficient * errors[group]
            advance(1)
    return losses


def _weight_errors(model: AssignedModel) -> np.ndarray:
    """Relative squared errors of the weights, float64 [N, K]; 1 where pruned."""
    table = model.table
    errors = np.ones(table.costs.shape)
    for layer in table.layers:
        bank, rows = model.layer_bank(layer), table.rows(layer)
        for option in bank.quantities:
            for expert, row in enumerate(rows):
                before, after = bank.weights(expert, bank.original), bank.weights(expert, option)
                size = sum(float(w.double().square().sum()) for w in before)
                changed = sum(
                    float((b.double() - a.double()).square().sum())
                    for b, a in zip(before, after, strict=True)
                )
                errors[row, option] = changed / max(size, 1e-300)
    return errors
