"""Held-out KL of RCO and of everything it has to beat, at equal bytes, on the trained models.

    python -m eval.quality
    python -m eval.quality --models demo --ratios 0.25 --seeds 0
    python -m eval.quality --set calibration.sequences=64 --set search.steps=4 --set search.refine=4 --output out/small.md

All methods choose among the same GPTQ weights of one (model, seed). The seed decides the split of the
calibration text, the Fisher draws and the search's noise. KL(original || compressed) is over the whole
vocabulary, on the shipped held-out text of all domains. Results are kept in a JSON file beside the table
after every method; a rerun does only what is missing, and redoes what was made with another model or other
settings. A change of the code is not noticed, but the commit is kept: delete the JSON file to make all of it again.
What was quantised stays in out/eval.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.prepared import MODELS, Subject, inputs_of, recipe_of, subject
from eval.quality_table import render
from eval.results_file import Results
from eval.rivals import FISHER, LINEARITY, PROXY, RCO, SEARCHES, UNIFORM, Methods, Variants
from moe_rco.calib.measure import Scores, measure
from moe_rco.reload import Assigned
from moe_rco.types import Assignment, Budget, Silent

SCORED = [f"{score} + {label}" for score in ("frequency", "REAP") for label in ("bf16", "int4", "best width")]
METHODS = (UNIFORM, *SCORED, PROXY, LINEARITY, *SEARCHES, FISHER, RCO)


class Judge:
    """Measures assignments of one model on the held-out text; the same one only once."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._before = _Remembered(Assigned(subject.prepared.model, None), {})
        self._known: dict[bytes, Scores] = {}

    def __call__(self, assignment: Assignment) -> Scores:
        key = assignment.choice.tobytes()
        if key not in self._known:
            model = self._subject.prepared.model
            after, pool = Assigned(model, assignment.choice), self._subject.heldout
            self._known[key] = measure(self._before, after, pool, model.runner.vocab_size, Silent(), 16)
        return self._known[key]


@dataclass(frozen=True)
class _Remembered:
    """A model whose hidden states are kept, by the ids they are of."""

    model: Assigned
    states: dict[bytes, torch.Tensor]

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        key = ids.numpy().tobytes()
        if key not in self.states:
            self.states[key] = self.model.hidden(ids)
        return self.states[key]

    def head(self) -> AbstractContextManager[Callable[[torch.Tensor], torch.Tensor]]:
        return self.model.head()


def record_of(judge: Judge, variants: Variants, budget: Budget) -> dict[str, Any]:
    """The variant with the lowest held-out KL, and the KL of each."""
    scores = {name: judge(assignment) for name, assignment in variants.items()}
    name = min(scores, key=lambda variant: scores[variant].all.kl)
    best, assignment = scores[name], variants[name]
    assignment.check(budget)
    return {
        "variant": name,
        "kl": best.all.kl,
        "kl_stderr": best.all.kl_stderr,
        "loss_before": best.all.loss_before,
        "loss_after": best.all.loss_after,
        "domains": {score.name: score.kl for score in best.domains},
        "variants": {variant: score.all.kl for variant, score in scores.items()},
        "cost": assignment.cost,
        "counts": assignment.counts(),
    }


def measure_model(
    name: str,
    seed: int,
    ratios: Sequence[float],
    settings: Sequence[str],
    names: Sequence[str],
    results: Results,
) -> None:
    """The named methods at every ratio for one model and seed."""
    recipe = recipe_of(name, seed, settings)
    inputs = inputs_of(recipe)
    todo = [(r, m) for r in ratios for m in names if results.get((name, r, seed, m), inputs) is None]
    if not todo:
        print(f"{name}, seed {seed}: nothing to do", flush=True)
        return
    start = time.monotonic()
    print(f"{name}, seed {seed}: {len(todo)} results to make", flush=True)
    prepared = subject(name, recipe)
    judge, methods = Judge(prepared), Methods(prepared)
    print(f"  prepared in {time.monotonic() - start:.0f} s", flush=True)
    for ratio, method in todo:
        start = time.monotonic()
        at_ratio = recipe_of(name, seed, [*settings, f"budget={{ratio: {ratio}}}"])
        budget = at_ratio.budget[0].resolve(prepared.sized.table)
        variants = methods.all(budget, at_ratio)[method]()
        chosen = time.monotonic() - start
        record = {"model": name, "ratio": ratio, "seed": seed, "method": method, "inputs": inputs}
        record |= {"budget": budget.bytes, "original": prepared.sized.table.original_bytes}
        record["seconds"] = round(chosen, 1)
        record |= record_of(judge, variants, budget) if variants else {"kl": None}
        results.put(record)
        kl = "does not fit" if record["kl"] is None else f"KL {record['kl']:.5f} ({record['variant']})"
        print(f"  {ratio:.0%} {method}: {kl}, {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.35, 0.25, 0.2, 0.13])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path("eval/results/quality.md"))
    parser.add_argument(
        "--known", action="store_true", help="make the table of the results there are, no more"
    )
    arguments = parser.parse_args()
    results = Results(arguments.output.with_suffix(".json"))
    for name in [] if arguments.known else arguments.models:
        for seed in arguments.seeds:
            measure_model(name, seed, arguments.ratios, arguments.settings, arguments.methods, results)
    records = []
    for name, seed in itertools.product(arguments.models, arguments.seeds):
        inputs = inputs_of(recipe_of(name, seed, arguments.settings))
        keys = itertools.product([name], arguments.ratios, [seed], METHODS)
        records += [record for key in keys if (record := results.get(key, inputs))]
    given = [argument for argument in sys.argv[1:] if argument != "--known"]
    command = shlex.join(["python", "-m", "eval.quality", *given])
    table = render(records, METHODS, command)
    arguments.output.write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
