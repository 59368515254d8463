"""What was tried in the gradient search: estimators, noise, batches, start and schedule, one change at a time.

    python -m eval.estimators
    python -m eval.estimators --models mixtral --seeds 0 --output out/estimators.md

Every variant is a gradient search of 40 steps (fewer steps of more samples, so that all take as many passes) from the same
start; races, which come after it in the product, are left out. Results are kept in a JSON file beside the table; a
rerun does only what is missing.
"""

from __future__ import annotations

import itertools
import math
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch

from eval.estimator_variants import Pruning, Width, estimator
from eval.posed import Posed, options, pose
from eval.prepared import inputs_of, recipe_of
from eval.results_file import Results
from moe_rco.calib.losses import SampledLoss
from moe_rco.calib.search import feasible, start_logits
from moe_rco.optim import minimize
from moe_rco.optim.gumbel import gumbel_noise
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


def solve(at: Posed, variant: Variant) -> float:
    """Held-out KL of what a variant finds."""
    prepared, table = at.prepared, at.table
    search = at.recipe.search.model_copy(update={"samples": variant.samples, "batch": variant.batch})
    steps = STEPS * SAMPLES * 4 // (variant.samples * variant.batch)
    loss = Tried(
        variant, prepared.model, prepared.effects, prepared.pools[0], prepared.calibrated.train, search
    )
    with estimator(variant.pruning, variant.width), _noise(variant.antithetic):
        result = minimize(
            loss, torch.from_numpy(table.costs), at.budget.bytes, steps=steps, samples=variant.samples,
            lr=search.learning_rate, tau=variant.tau, seed=search.seed, floor=table.floor, layer=table.layer,
            feasible=feasible(table, at.budget), evaluate=at.kept_out,
            evaluate_every=0 if variant.last else max(1, steps // 8),
            init_logits=start_logits(prepared.effects, at.start) if variant.start == "candidate" else None,
        )  # fmt: skip
    return at.heldout(Assignment(table, result.choice))


def render(records: Sequence[dict[str, Any]], command: str) -> str:
    """The table in Markdown."""
    cases = {(r["model"], r["problem"], r["seed"]): r["kl"] for r in records}
    lines = [
        "# What was tried in the gradient search", "", f"Made by `{command}`.", "",
        f"Searches of {STEPS} steps of {SAMPLES} samples on 4 sequences, or as many passes; no races after them. Held-out KL of",
        "a variant over that of the search as it is: geometric mean over models and seeds, +- its standard error, and in how",
        "many of the cases the variant is lower. Below 1 is better than what is used. Seeds: " + "; ".join(
            f"{model} {', '.join(str(seed) for seed in sorted({s for m, _, s in cases if m == model}))}"
            for model in sorted({m for m, _, _ in cases})
        ) + ".", "",
        *_idle(cases.values()),
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


def _idle(cases: Collection[Mapping[str, float]]) -> list[str]:
    """Names the variants that ended at the usual KL in every case."""
    same = [v for v in VARIANTS if v != USUAL and all(v in kl and kl[v] == kl[USUAL] for kl in cases)]
    return [f"The same KL as it is in every case: {', '.join(same)}.", ""] if same else []


def main() -> None:
    arguments = options(__doc__, "estimators.md").parse_args()
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
        at = pose(name, seed, settings, ratio)
        record["kl"]["start"] = at.heldout(at.start)
        for variant in missing:
            record["kl"][variant] = solve(at, VARIANTS[variant])
            print(f"  {variant}: {record['kl'][variant]:.5f}", flush=True)
            results.put(record)
            arguments.output.write_text(render(records, command), encoding="utf-8")
    arguments.output.write_text(render(records, command), encoding="utf-8")


if __name__ == "__main__":
    main()
