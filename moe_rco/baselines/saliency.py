"""Prune the experts with the lowest score and keep all others at one option.

With routed token counts as scores this is frequency pruning, with `Usage.saliency` it is REAP (arXiv
2510.13999).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from moe_rco.types import Assignment, Budget, CostTable, Option

Scores = Mapping[int, torch.Tensor]
"""By layer, one score [E] per expert, not negative; the larger, the more it is worth."""


def prune_lowest(
    table: CostTable, budget: Budget, scores: Scores, option: Option, *, per_layer: bool = False
) -> Assignment | None:
    """Keep the best experts at `option`, as many as fit, and prune the others.

    Each layer first gets the experts a token needs. Then experts are taken in order of their score divided by
    the sum of their layer's; with `per_layer` layers take turns instead, so that their counts differ by at
    most one. None where prune is not an option, or where the best `floor` experts of every layer do not fit.
    """
    prune = table.prune_index
    if prune is None:
        return None
    share, rank = np.zeros(len(table.groups)), np.zeros(len(table.groups), dtype=np.int64)
    for layer in table.layers:
        rows, score = table.rows(layer), scores[layer].double().cpu().numpy()
        share[rows] = score / max(score.sum(), 1e-300)
        rank[rows[np.argsort(-score, kind="stable")]] = np.arange(len(rows))
    turn = np.maximum(rank, table.floor) if per_layer else np.full_like(rank, table.floor)
    order = np.lexsort((-share, np.where(rank < table.floor, -1, turn)))
    kept = table.option_index(option)
    choice, left = np.full(len(order), prune, dtype=np.int64), budget.bytes - int(table.costs[:, prune].sum())
    for row in order:
        price = int(table.costs[row, kept] - table.costs[row, prune])
        if price <= left:
            choice[row], left = kept, left - price
        elif rank[row] < table.floor:
            return None
    return Assignment(table, choice) if left >= 0 else None
