"""What the parts of the search gain, at equal passes: gradients alone, races alone, some of each, and evolution.

The search decides by how far off the Fisher estimate is at its start how much of each it does; the table has that too.

    python -m eval.search_parts
    python -m eval.search_parts --models mixtral --seeds 0 --output out/parts.md

Every part starts from the same assignment and takes as many passes as 80 steps of the demo recipe. Results are kept in
a JSON file beside the table; a rerun does only what is missing, and the table has all there is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import mean
from typing import Any
from unittest.mock import patch

from eval.posed import Posed, options, pose
from eval.prepared import Lines, inputs_of, recipe_of
from eval.results_file import Results, made_at
from moe_rco.calib import search
from moe_rco.calib.search import FAR_OFF, REFINED, SEED, find
from moe_rco.recipe_sections import SearchMethod
from moe_rco.types import Assignment

PROBLEMS = {
    "prune or bf16, 50 %": (["options=[prune,bf16]"], 0.5),
    "prune or bf16, 75 %": (["options=[prune,bf16]"], 0.75),
    "prune, 4, 8, 16 bits, 25 %": (["options=[prune,int4-g64,int8-g64,bf16]"], 0.25),
    "all options, 13 %": ([], 0.13),
    "all options, 25 %": ([], 0.25),
}
START, HALF, RECIPE = "start", "half of each", "the recipe's"
PARTS: dict[str, tuple[SearchMethod, int, int]] = {
    "gradients": ("rco", 80, 0),
    "races": ("rco", 0, 80),
    HALF: ("rco", 40, 40),
    "3/4 gradients": ("rco", 60, 20),
    RECIPE: ("rco", 40, 40),
    "evolution": ("evolution", 80, 0),
}
"""Method, steps of the search and of the races; in the recipe's, steps may go on in place of races."""


def measure(name: str, seed: int, problem: str, results: Results) -> None:
    """All parts on one problem of one model and seed."""
    settings, ratio = PROBLEMS[problem]
    inputs = f"{inputs_of(recipe_of(name, seed, settings))} {problem}"
    key = (name, ratio, seed, problem)
    record = results.get(key, inputs) or {
        **dict(zip(("model", "ratio", "seed", "method"), key, strict=True)), "inputs": inputs, "kl": {},
    }  # fmt: skip
    missing = [part for part in PARTS if part not in record["kl"]]
    if not missing:
        return
    print(f"{name}, seed {seed}, {problem}", flush=True)
    at = pose(name, seed, settings, ratio)
    record["kl"] |= {SEED: at.heldout(at.fisher), START: at.heldout(at.start)}
    record["far_off"] = at.far_off
    for part in missing:
        if part == RECIPE and record["far_off"] <= FAR_OFF:  # no step goes on: the same search
            record["kl"][part] = record["kl"][HALF]
        else:
            record["kl"][part] = at.heldout(_found(at, part))
        print(f"  {part}: {record['kl'][part]:.5f}", flush=True)
        results.put(record)


def _found(at: Posed, part: str) -> Assignment:
    method, steps, races = PARTS[part]
    prepared = at.prepared
    with patch.object(search, "FAR_OFF", FAR_OFF if part == RECIPE else math.inf):
        found = find(
            prepared.model,
            at.budget,
            prepared.by_sequence,
            prepared.pools,
            (prepared.calibrated.train, prepared.calibrated.kept_out),
            at.recipe.search.model_copy(update={"method": method, "steps": steps, "refine": races}),
            {START: at.start},
            Lines(),
        )
    ends = {candidate.name: candidate.assignment for candidate in found.candidates}
    return ends[REFINED if REFINED in ends else method]


def render(records: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown."""
    columns = (SEED, START, *PARTS)
    lines = [
        "# What the parts of the search gain", "", "Made by `python -m eval.search_parts`, some models at a time.", "",
        "Held-out KL in nats per token of what a part ends with, by seed, at equal passes and from the same start: the",
        "candidate that is lowest on the kept-out text. Whether it may replace its start is not asked here. The last rows are",
        "the mean of the logarithm of a column's ratio to the start, as a ratio: of each problem, and of all.", "",
        "Far off: the start's KL on the kept-out text as a multiple of what the Fisher estimate predicts of it. Above "
        f"{FAR_OFF}",
        "the recipe's search goes on in place of races while that pays; else it is half of each.", "",
        *made_at(records, list(PROBLEMS)), "",
        "| model | problem | seed | far off | " + " | ".join(columns) + " |", "|---" * (4 + len(columns)) + "|",
    ]  # fmt: skip
    for record in records:
        cells = [f"{record['kl'][column]:.5f}" for column in columns]
        lines.append(
            f"| {record['model']} | {record['method']} | {record['seed']} | {record['far_off']:.2f} | "
            + " | ".join(cells)
            + " |"
        )
    for problem in (*PROBLEMS, "all"):
        of = [record["kl"] for record in records if problem in ("all", record["method"])]
        if of:
            ratios = [math.exp(mean(math.log(kl[column] / kl[START]) for kl in of)) for column in columns]
            lines.append(f"| all | {problem} | | | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = options(__doc__, "search_parts.md")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    arguments = parser.parse_args()
    results = Results(arguments.output.with_suffix(".json"))
    for name, seed, problem in itertools.product(arguments.models, arguments.seeds, arguments.problems):
        measure(name, seed, problem, results)
        whole = [record for record in results.all() if record["kl"].keys() >= PARTS.keys()]
        arguments.output.write_text(render(whole), encoding="utf-8")


if __name__ == "__main__":
    main()
