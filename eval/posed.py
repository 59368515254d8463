"""A problem of one model and seed, ready for searches that are run by themselves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.prepared import MODELS, recipe_of, subject
from eval.quality import Judge
from moe_rco.baselines import starting_points
from moe_rco.calib.losses import KeptOut
from moe_rco.calib.search import knapsack, predicted
from moe_rco.pipeline import Prepared
from moe_rco.recipe import Recipe
from moe_rco.types import Assignment, Budget, CostTable


@dataclass(frozen=True)
class Posed:
    """`start` is the simple methods' or the Fisher estimate's assignment with the lowest KL on the kept-out text."""

    recipe: Recipe
    prepared: Prepared
    budget: Budget
    kept_out: KeptOut
    judge: Judge
    fisher: Assignment
    start: Assignment

    @property
    def table(self) -> CostTable:
        return self.prepared.model.table

    @property
    def far_off(self) -> float:
        """KL of `start` on the kept-out text as a multiple of what the Fisher estimate predicts of it."""
        choice = self.start.choice
        return self.kept_out(choice) / predicted(self.prepared.effects, choice)

    def heldout(self, assignment: Assignment) -> float:
        """KL on the held-out text."""
        return self.judge(assignment).all.kl


def pose(name: str, seed: int, settings: Sequence[str], ratio: float) -> Posed:
    """Calibrate, quantise, and find where to start."""
    recipe = recipe_of(name, seed, [*settings, f"budget={{ratio: {ratio}}}"])
    found = subject(name, recipe_of(name, seed, settings))
    prepared, table = found.prepared, found.prepared.model.table
    budget = recipe.budget[0].resolve(table)
    kept_out = KeptOut(prepared.model, prepared.pools[1], prepared.calibrated.kept_out)
    fisher = knapsack(prepared.effects, table, budget)
    points = starting_points(table, budget, prepared.calibrated.usage, prepared.errors)
    start = min([fisher, *points.values()], key=lambda point: kept_out(point.choice))
    return Posed(recipe, prepared, budget, kept_out, Judge(found), fisher, start)


def options(description: str | None, output: str) -> argparse.ArgumentParser:
    """What every such program can be told."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("eval/results") / output)
    return parser
