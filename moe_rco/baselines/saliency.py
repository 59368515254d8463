"""Prune the experts with the lowest score and keep all others, and what is dense, at one option.

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
    experts = table.experts.groups
    share, rank = np.zeros(len(experts)), np.zeros(len(experts), dtype=np.int64)
    for layer in table.layers:
        rows, score = table.rows(layer), scores[layer].double().cpu().numpy()
        share[rows] = score / max(score.sum(), 1e-300)
        rank[rows[np.argsort(-score, kind="stable")]] = np.arange(len(rows))
    turn = np.maximum(rank, table.floor) if per_layer else np.full_like(rank, table.floor)
    order = np.lexsort((-share, np.where(rank < table.floor, -1, turn)))
    kept, choice = table.option_index(option), table.like(option)
    choice[: len(experts)] = prune
    left = budget.bytes - Assignment(table, choice).cost
    for row in order:
        price = int(table.costs[row, kept] - table.costs[row, prune])
        if price <= left:
            choice[row], left = kept, left - price
        elif rank[row] < table.floor:
            return None
    return Assignment(table, choice) if left >= 0 else None


def prune_equally(table: CostTable, budget: Budget, scores: Scores, option: Option) -> Assignment | None:
    """Keep the best experts of every layer at `option`, equally many of each and as many as fit.

    None where prune is not an option, or where the best `floor` experts of every layer do not fit.
    """
    prune, kept = table.prune_index, table.option_index(option)
    if prune is None:
        return None
    ranked = [
        table.rows(layer)[np.argsort(-scores[layer].double().cpu().numpy(), kind="stable")]
        for layer in table.layers
    ]
    best: Assignment | None = None
    for count in range(table.floor, min(map(len, ranked)) + 1):
        choice = table.like(option)
        choice[: len(table.experts.groups)] = prune
        choice[np.concatenate([rows[:count] for rows in ranked])] = kept
        assignment = Assignment(table, choice)
        if assignment.cost > budget.bytes:
            break
        best = assignment
    return best
