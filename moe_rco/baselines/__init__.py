"""The methods to beat: uniform widths, frequency pruning, REAP, and an output error proxy with a knapsack."""

from __future__ import annotations

import numpy as np
import torch

from moe_rco.baselines.linearity import linear_losses
from moe_rco.baselines.proxy import PROXY_STRIDE, SCALES, OutputErrors, output_errors, proxy
from moe_rco.baselines.saliency import prune_equally, prune_lowest
from moe_rco.baselines.uniform import uniform
from moe_rco.calib.calibrate import Usage
from moe_rco.errors import UserError
from moe_rco.types import Assignment, Budget, CostTable

__all__ = [
    "PROXY_STRIDE",
    "SCALES",
    "SIMPLE",
    "OutputErrors",
    "check_method",
    "linear_losses",
    "output_errors",
    "proxy",
    "prune_equally",
    "prune_lowest",
    "simple_assignments",
    "starting_points",
    "uniform",
    "unmeasured",
]


SIMPLE = ("uniform", "frequency", "reap", "proxy")


def simple_assignments(
    method: str, table: CostTable, budget: Budget, usage: Usage, errors: OutputErrors
) -> dict[str, Assignment]:
    """What one of the methods `SIMPLE` has to offer, by name. Raises UserError where nothing of its kind fits."""
    points = starting_points(table, budget, usage, errors)
    found = {name: assignment for name, assignment in points.items() if name.lower().startswith(method)}
    if not found:
        raise UserError(f"search.method: {method} has no assignment that uses this budget with these options")
    return found


def check_method(method: str, table: CostTable, budget: Budget) -> None:
    """Raise UserError where a method will have nothing to offer, whatever is measured."""
    if method in SIMPLE:
        simple_assignments(method, table, budget, *unmeasured(table))


def unmeasured(table: CostTable) -> tuple[Usage, OutputErrors]:
    """What is asked for here before anything was measured: all experts are alike."""
    same = {layer: torch.ones(len(table.rows(layer))) for layer in table.layers}
    ones = np.ones(len(table.groups))
    return Usage(same, same), OutputErrors(np.ones(table.costs.shape), ones, ones)


def starting_points(
    table: CostTable, budget: Budget, usage: Usage, errors: OutputErrors
) -> dict[str, Assignment]:
    """Cheap assignments within budget and layout, by name, for a search to start from.

    What the options do not allow or what does not fit is left out, and so are options at which nothing has to
    be pruned: the widest of those is the uniform assignment.
    """
    prune = prune_equally if table.layout == "stock" else prune_lowest
    found: dict[str, Assignment] = {}
    widest = uniform(table, budget)
    if widest is not None:
        found[f"uniform {widest.option(0)}"] = widest
    for name, scores in (("frequency", usage.counts), ("REAP", usage.saliency)):
        for option in table.options:
            if option.is_prune or Assignment.uniform(table, option).cost <= budget.bytes:
                continue
            pruned = prune(table, budget, scores, option)
            if pruned is not None:
                found[f"{name} + {option}"] = pruned
    for scale in SCALES:
        found[f"proxy ({scale})"] = proxy(table, budget, errors, scale)
    return found
