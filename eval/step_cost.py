"""Wall-clock of one RCO step per Gumbel sample over one plain forward and backward of the same tokens.

    python -m eval.step_cost
    python -m eval.step_cost --models demo --repeats 20 --ratio 0.35

A step is everything `minimize` does: noise, exact knapsack, the deployed model forward and backward with the effects
of all moves, optimiser and retraction; its time is divided by the number of samples. After every step each of the
plain passes runs once, in rotating order, on as many tokens; shown is the median of the ratios of such neighbours
with the 10 % and 90 % quantiles. Targets: at most 1.4 with all options, 1.0 for pruning only, over our own runner
with weight gradients.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from eval.plain_pass import Pass, our_runner, our_runner_frozen, transformers_model
from eval.prepared import MODELS, Subject, recipe_of, subject
from moe_rco.calib.losses import SampledLoss
from moe_rco.calib.search import knapsack, start_logits
from moe_rco.optim import StepRecord, minimize
from moe_rco.recipe import Recipe

OPTIONS = {
    "5 options": "[prune, int3-g64, int4-g64, int8-g64, bf16]",
    "6 options": "[prune, int2-g64, int3-g64, int4-g64, int8-g64, bf16]",
    "prune only": "[prune, bf16]",
}
SEQUENCES = 64
"""Calibration sequences: what a step costs does not depend on them, getting ready does."""

INTRODUCTION = """# Cost of a search step

Made by `python -m eval.step_cost --repeats {repeats}`: seconds of one RCO step per Gumbel sample over a plain
forward and backward of the same tokens, median and 10 % to 90 % quantiles.
"""


class Stopwatch:
    """Times the plain passes between two steps, and the steps between two visits."""

    def __init__(self, passes: Mapping[str, Pass], ids: torch.Tensor, samples: int) -> None:
        self._passes, self._ids, self._samples = dict(passes), ids, samples
        self.ratios: dict[str, list[float]] = {name: [] for name in passes}
        self.samples: list[float] = []
        self._left = 0.0

    def visit(self, record: StepRecord) -> None:
        """Called after every step."""
        sample = (time.perf_counter() - self._left) / self._samples
        names = list(self._passes)
        turn = record.step % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            self._passes[name](self._ids)
            if record.step > 1:  # the first step and the first passes warm caches up
                self.ratios[name].append(sample / (time.perf_counter() - start))
        if record.step > 1:
            self.samples.append(sample)
        self._left = time.perf_counter()


def time_steps(prepared: Subject, recipe: Recipe, repeats: int) -> Stopwatch:
    """Run a search of `repeats` steps after one to warm up."""
    model, search = prepared.prepared.model, recipe.search
    pool, budget = prepared.prepared.pools[0], recipe.budget[0].resolve(model.table)
    effects = prepared.prepared.effects
    passes = {
        "ours": our_runner(prepared),
        "ours, no weight gradients": our_runner_frozen(prepared),
        "transformers, eager": transformers_model(prepared, "eager"),
        "transformers, grouped_mm": transformers_model(prepared, "grouped_mm"),
    }
    watch = Stopwatch(passes, pool.ids[: search.batch].to(model.runner.device), search.samples)
    minimize(
        SampledLoss(model, effects, pool, prepared.prepared.calibrated.train, search),
        torch.from_numpy(model.table.costs),
        budget.bytes,
        steps=repeats + 1,
        samples=search.samples,
        lr=search.learning_rate,
        tau=(search.tau_start, search.tau_end),
        init_logits=start_logits(effects, knapsack(effects, model.table, budget)),
        floor=model.table.floor,
        layer=model.table.layer,
        evaluate=lambda choice: 0.0,
        on_step=watch.visit,
        seed=search.seed,
    )
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--ratio", type=float, default=0.35)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path("eval/results/step_cost.md"))
    arguments = parser.parse_args()
    rows: list[tuple[str, str, Stopwatch]] = []
    for name in arguments.models:
        for label in arguments.options:
            settings = [
                f"options={OPTIONS[label]}",
                f"budget={{ratio: {arguments.ratio}}}",
                f"calibration.sequences={SEQUENCES}",
                *arguments.settings,
            ]
            recipe = recipe_of(name, 0, settings)
            print(f"{name}, {label}", flush=True)
            rows.append((name, label, time_steps(subject(name, recipe), recipe, arguments.repeats)))
    text = f"{INTRODUCTION.format(repeats=arguments.repeats)}\n{table(rows)}\n"
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


def table(rows: Sequence[tuple[str, str, Stopwatch]]) -> str:
    """Median ratios with their spread, in Markdown."""
    names = list(rows[0][2].ratios)
    lines = [f"| model | options | ms a sample | {' | '.join(f'over {name}' for name in names)} |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for model, label, watch in rows:
        ratios = (f"{_median(watch.ratios[name])}" for name in names)
        lines.append(f"| {model} | {label} | {1000 * np.median(watch.samples):.0f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def _median(values: Sequence[float]) -> str:
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
