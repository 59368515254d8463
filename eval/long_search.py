"""What is left to gain: exact swaps on the true loss, for an hour, from what the search returned.

    OMP_NUM_THREADS=1 python -m eval.long_search
    OMP_NUM_THREADS=1 python -m eval.long_search --models qwen2_moe --problems 'all options, 20 %' --minutes 5

Every assignment that differs in one group or two (64 partners for each first move where there are many) is raced against
the best so far on the calibration sequences, in random order, from anew after every success; nothing is foretold. It
ends early where no swap is left, and takes what is better on the calibration text whether or not other text agrees.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from eval.posed import options, pose
from eval.prepared import Lines, inputs_of, recipe_of
from eval.results_file import Results, made_at
from moe_rco.calib.losses import row_losses
from moe_rco.calib.search import feasible
from moe_rco.optim.posterior import Posterior
from moe_rco.optim.races import _Run
from moe_rco.optim.swaps import _neighbours
from moe_rco.pipeline import choose
from moe_rco.types import Assignment

PROBLEMS = {
    "prune or bf16, 50 %": (["options=[prune,bf16]"], 0.5),
    "all options, 25 %": ([], 0.25),
    "all options, 20 %": ([], 0.2),
    "all options, 13 %": ([], 0.13),
}
POINTS = 6
"""Times the KL is measured on the way."""


class _Blank(Posterior):
    def observe(self, *_: Any, **__: Any) -> None:
        """Learn nothing."""


class Swaps(_Run):
    """Races whose challengers are the neighbours of the best."""

    options: int
    _at: np.ndarray | None = None
    _left: Iterator[np.ndarray] = iter(())

    def _proposal(self, rng: np.random.Generator) -> np.ndarray | None:
        if self._at is None or not np.array_equal(self._at, self.best):
            self._at = self.best
            self._left = _neighbours(self.best, self.options, self._feasible, rng)
        return next(self._left, None)


def search(name: str, seed: int, problem: str, minutes: float) -> list[dict[str, float]]:
    """KL by minute: on calibration text, on what was kept out of the search before, and held out."""
    settings, ratio = PROBLEMS[problem]
    at = pose(name, seed, settings, ratio)
    prepared, table = at.prepared, at.table
    start = choose(prepared, at.budget, at.recipe, Lines()).best.assignment.choice
    losses = row_losses(prepared.model, prepared.pools[0], prepared.calibrated.train)
    blank = _Blank(np.zeros(table.costs.shape), np.zeros(table.costs.shape))
    run = Swaps(losses, len(prepared.pools[0]), feasible(table, at.budget), start, blank, [], None, seed)
    run.options = len(table.options)
    points: list[dict[str, float]] = []

    def note(elapsed: float) -> None:
        every = np.arange(len(prepared.pools[0]))
        points.append(
            {
                "minutes": elapsed / 60,
                "passes": run.passes,
                "races": len(run.history),
                "moved": int((run.best != start).sum()),
                "train": float(losses(run.best, every).mean()),
                "kept_out": at.kept_out(run.best),
                "held_out": at.heldout(Assignment(table, run.best)),
            }
        )
        print(f"  {points[-1]}", flush=True)

    note(0.0)
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < minutes * 60 and run.advance():
        if elapsed > minutes * 60 * len(points) / POINTS:
            note(elapsed)
    note(time.monotonic() - began)
    return points


def render(records: list[dict[str, Any]]) -> str:
    """The tables in Markdown."""
    lines = [
        "# What a long search by exact swaps finds", "",
        "Made by `python -m eval.long_search`, some models and problems at a time.", "",
        "From the assignment that the search returned, KL in nats per token on the calibration text the swaps were raced on, on",
        "the text kept out of the first search, and on the held-out text. The last line of a table is where the time that it was",
        "given had passed, or no swap was left.", "",
        *made_at(records, list(PROBLEMS)),
    ]  # fmt: skip
    for record in records:
        lines += [
            "",
            f"## {record['model']}, seed {record['seed']}, {record['method']}\n",
            "| minutes | sequences run | races | groups moved | calibration | kept out | held out |",
            "|--:|--:|--:|--:|--:|--:|--:|",
        ]
        lines += [
            f"| {p['minutes']:.0f} | {p['passes']:,} | {p['races']:,} | {p['moved']} | {p['train']:.5f} | "
            f"{p['kept_out']:.5f} | {p['held_out']:.5f} |"
            for p in record["points"]
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = options(__doc__, "long_search.md")
    parser.set_defaults(models=["mixtral"], seeds=[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    results = Results(arguments.output.with_suffix(".json"))
    for name, seed, problem in itertools.product(arguments.models, arguments.seeds, arguments.problems):
        settings, ratio = PROBLEMS[problem]
        key, inputs = (name, ratio, seed, problem), inputs_of(recipe_of(name, seed, settings))
        if results.get(key, inputs) is None:
            print(f"{name}, seed {seed}, {problem}", flush=True)
            record = {"model": name, "ratio": ratio, "seed": seed, "method": problem, "inputs": inputs}
            results.put(record | {"points": search(name, seed, problem, arguments.minutes)})
    arguments.output.write_text(render(results.all()), encoding="utf-8")


if __name__ == "__main__":
    main()
