"""What was tried in the gradient search: estimators, noise, batches, start and schedule, one change at a time.

    python -m eval.estimators
    python -m eval.estimators --models mixtral --seeds 0 --output out/estimators.md

Every variant is a gradient search of 40 steps (fewer steps of more samples, so that all take as many passes) from the same
start; races, which come after it in the product, are left out. Results are kept in a JSON file beside the table; a
rerun does only what is missing.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch

from eval.estimator_variants import Pruning, Width, estimator
from eval.prepared import MODELS, inputs_of, recipe_of, subject
from eval.quality import Judge
from eval.results_file import Results
from moe_rco.baselines import starting_points
from moe_rco.calib.losses import KeptOut, SampledLoss
from moe_rco.calib.search import SEED, feasible, knapsack, start_logits
from moe_rco.optim import minimize
from moe_rco.optim.gumbel import gumbel_noise
from moe_rco.recipe import Search
from moe_rco.types import Assignment

PROBLEMS = {
    "prune or bf16, 50 %": (["options=[prune,bf16]"], 0.5),
    "prune, 4, 8, 16 bits, 25 %": (["options=[prune,int4-g64,int8-g64,bf16]"], 0.25),
}
STEPS, SAMPLES, FIXED = 40, 4, 64


@dataclass(frozen=True)
class Variant:
    """What is done otherwise than usual."""

    pruning: Pruning = "routed again"
    width: Width = "output"
    curvature: Literal["both", "new", "none"] = "both"
    samples: int = SAMPLES
    batch: int = 4
    antithetic: bool = True
    fixed: bool = False
    start: Literal["candidate", "flat"] = "candidate"
    tau: tuple[float, float] = (1.0, 0.05)
    last: bool = False


USUAL = "as it is"
VARIANTS = {
    USUAL: Variant(),
    "pruning: router weight inside the renormalisation": Variant(pruning="inside"),
    "pruning: union of the two top-k, not renormalised": Variant(pruning="union"),
    "pruning: published, scaled after routing": Variant(pruning="scaled"),
    "precision in weight space": Variant(width="weight"),
    "precision and pruning in weight space": Variant(width="weight, prune too"),
    "no curvature": Variant(curvature="none"),
    "curvature of the new option only": Variant(curvature="new"),
    "published: scaled, weight space for precision, no curvature": Variant(
        pruning="scaled", width="weight", curvature="none"
    ),
    "independent samples": Variant(antithetic=False),
    "2 samples, twice the steps": Variant(samples=2),
    "8 samples, half the steps": Variant(samples=8),
    "2 sequences a batch, twice the steps": Variant(batch=2),
    "8 sequences a batch, half the steps": Variant(batch=8),
    f"the same {FIXED} sequences throughout": Variant(fixed=True),
    "flat initial logits": Variant(start="flat"),
    "temperature 1 throughout": Variant(tau=(1.0, 1.0)),
    "temperature 0.3 to 0.05": Variant(tau=(0.3, 0.05)),
    "the last iterate, not the best on kept-out text": Variant(last=True),
}


class Tried(SampledLoss):
    """The search's loss with another curvature, or with the same sequences in every batch."""

    def __init__(self, variant: Variant, *args: Any) -> None:
        super().__init__(*args)
        self._variant = variant

    def rows(self, step: int) -> torch.Tensor:
        if not self._variant.fixed:
            return super().rows(step)
        order = np.random.default_rng((self._search.seed, step)).permutation(min(FIXED, len(self._pool)))
        return torch.from_numpy(order[: self._search.batch].copy())

    def gradient(self, linear: np.ndarray, choice: np.ndarray) -> np.ndarray:
        if self._variant.curvature == "none":
            return linear.copy()
        return linear + self._q if self._variant.curvature == "new" else super().gradient(linear, choice)


def _independent(shape: tuple[int, int], count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    for _ in range(count):
        yield from gumbel_noise(shape, 1, generator)


@contextmanager
def _noise(antithetic: bool) -> Iterator[None]:
    if antithetic:
        yield
    else:
        with patch("moe_rco.optim.solver.gumbel_noise", _independent):
            yield


class Problem:
    """One problem of one model and seed, ready for every variant."""

    def __init__(self, name: str, seed: int, problem: str) -> None:
        settings, ratio = PROBLEMS[problem]
        recipe = recipe_of(name, seed, [*settings, f"budget={{ratio: {ratio}}}"])
        found = subject(name, recipe_of(name, seed, settings))
        self._judge, self._prepared, self._search = Judge(found), found.prepared, recipe.search
        model, calibrated = found.prepared.model, found.prepared.calibrated
        self._budget = recipe.budget.resolve(model.table)
        self._kept_out = KeptOut(model, found.prepared.pools[1], calibrated.kept_out)
        points = {SEED: knapsack(found.prepared.effects, model.table, self._budget)}
        points |= starting_points(model.table, self._budget, calibrated.usage, found.prepared.errors)
        self._start = min(points.values(), key=lambda point: self._kept_out(point.choice))

    def start(self) -> float:
        return self._judge(self._start).all.kl

    def solve(self, variant: Variant) -> float:
        """Held-out KL of what a variant finds."""
        table, q = self._prepared.model.table, self._prepared.effects
        search: Search = self._search.model_copy(update={"samples": variant.samples, "batch": variant.batch})
        steps = STEPS * SAMPLES * 4 // (variant.samples * variant.batch)
        loss = Tried(
            variant, self._prepared.model, q, self._prepared.pools[0], self._prepared.calibrated.train, search
        )
        with estimator(variant.pruning, variant.width), _noise(variant.antithetic):
            result = minimize(
                loss, torch.from_numpy(table.costs), self._budget.bytes, steps=steps, samples=variant.samples,
                lr=search.learning_rate, tau=variant.tau, seed=search.seed, floor=table.floor, layer=table.layer,
                feasible=feasible(table, self._budget), evaluate=self._kept_out,
                evaluate_every=0 if variant.last else max(1, steps // 8),
                init_logits=start_logits(q, self._start) if variant.start == "candidate" else None,
            )  # fmt: skip
        return self._judge(Assignment(table, result.choice)).all.kl


def render(records: Sequence[dict[str, Any]], command: str) -> str:
    """The table in Markdown."""
    cases = {(r["model"], r["problem"], r["seed"]): r["kl"] for r in records}
    lines = [
        "# What was tried in the gradient search", "", f"Made by `{command}`.", "",
        f"Searches of {STEPS} steps of {SAMPLES} samples on 4 sequences, or as many passes; no races after them. Held-out KL of",
        "a variant over that of the search as it is: geometric mean over models and seeds, +- its standard error, and in how",
        "many of the cases the variant is lower. Below 1 is better than what is used.", "",
        "| variant | " + " | ".join(f"{p} | lower" for p in PROBLEMS) + " |",
        "|:--|" + "--:|" * 2 * len(PROBLEMS),
    ]  # fmt: skip
    for name in ("start", *VARIANTS):
        cells = []
        for problem in PROBLEMS:
            ratios = [
                math.log(kl[name] / kl[USUAL])
                for (_, p, _), kl in cases.items()
                if p == problem and name in kl and USUAL in kl
            ]
            if not ratios:
                cells += ["", ""]
                continue
            error = stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
            cells.append(f"{math.exp(mean(ratios)):.3f} ± {error:.3f}")
            cells.append(f"{sum(ratio < 0 for ratio in ratios)} of {len(ratios)}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("eval/results/estimators.md"))
    arguments = parser.parse_args()
    results = Results(arguments.output.with_suffix(".json"))
    records = []
    command = shlex.join(["python", "-m", "eval.estimators", *sys.argv[1:]])
    for seed, name, problem in itertools.product(arguments.seeds, arguments.models, PROBLEMS):
        settings, ratio = PROBLEMS[problem]
        key, inputs = (name, ratio, seed, problem), inputs_of(recipe_of(name, seed, settings))
        record = results.get(key, inputs) or {
            "model": name, "ratio": ratio, "seed": seed, "method": problem, "problem": problem, "inputs": inputs, "kl": {},
        }  # fmt: skip
        records.append(record)
        missing = [variant for variant in VARIANTS if variant not in record["kl"]]
        if not missing:
            continue
        print(f"{name}, seed {seed}, {problem}", flush=True)
        at = Problem(name, seed, problem)
        record["kl"]["start"] = at.start()
        for variant in missing:
            record["kl"][variant] = at.solve(VARIANTS[variant])
            print(f"  {variant}: {record['kl'][variant]:.5f}", flush=True)
            results.put(record)
            arguments.output.write_text(render(records, command), encoding="utf-8")
    arguments.output.write_text(render(records, command), encoding="utf-8")


if __name__ == "__main__":
    main()
