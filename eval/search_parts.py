"""What the parts of the search gain, at equal passes: gradients alone, races alone, some of each, and evolution.

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

from eval.posed import Posed, options, pose
from eval.prepared import Lines, inputs_of, recipe_of
from eval.results_file import Results, made_at
from moe_rco.calib.search import REFINED, SEED, find
from moe_rco.recipe_sections import SearchMethod
from moe_rco.types import Assignment

PROBLEMS = {
    "prune or bf16, 50 %": (["options=[prune,bf16]"], 0.5),
    "prune, 4, 8, 16 bits, 25 %": (["options=[prune,int4-g64,int8-g64,bf16]"], 0.25),
    "all options, 13 %": ([], 0.13),
    "all options, 25 %": ([], 0.25),
}
PARTS: dict[str, tuple[SearchMethod, int, int]] = {
    "gradients": ("rco", 80, 0),
    "races": ("rco", 0, 80),
    "half of each": ("rco", 40, 40),
    "3/4 gradients": ("rco", 60, 20),
    "evolution": ("evolution", 80, 0),
}
"""Method, steps of the search and of the races."""
START = "start"


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
    for part in missing:
        record["kl"][part] = at.heldout(_found(at, part))
        print(f"  {part}: {record['kl'][part]:.5f}", flush=True)
        results.put(record)


def _found(at: Posed, part: str) -> Assignment:
    method, steps, races = PARTS[part]
    prepared = at.prepared
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
    return next(c.assignment for c in found.candidates if c.name == (REFINED if races else method))


def render(records: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown."""
    columns = (SEED, START, *PARTS)
    lines = [
        "# What the parts of the search gain", "", "Made by `python -m eval.search_parts`, some models at a time.", "",
        "Held-out KL in nats per token of what a part ends with, by seed, at equal passes and from the same start: the",
        "candidate that is lowest on the kept-out text. Whether it may replace its start is not asked here. The last rows are",
        "the mean of the logarithm of a column's ratio to the start, as a ratio: of each problem, and of all.", "",
        *made_at(records, list(PROBLEMS)), "",
        "| model | problem | seed | " + " | ".join(columns) + " |", "|---" * (3 + len(columns)) + "|",
    ]  # fmt: skip
    for record in records:
        cells = [f"{record['kl'][column]:.5f}" for column in columns]
        lines.append(
            f"| {record['model']} | {record['method']} | {record['seed']} | " + " | ".join(cells) + " |"
        )
    for problem in (*PROBLEMS, "all"):
        of = [record["kl"] for record in records if problem in ("all", record["method"])]
        if of:
            ratios = [math.exp(mean(math.log(kl[column] / kl[START]) for kl in of)) for column in columns]
            lines.append(f"| all | {problem} | | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
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
