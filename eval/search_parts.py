"""What the parts of the search gain, at equal passes: gradients alone, races alone, half of each, and evolution.

    python -m eval.search_parts
    python -m eval.search_parts --models mixtral --seeds 0 --output out/parts.md

Every part starts from the same assignment and takes as many passes as 80 steps of the demo recipe. Results are kept in
a JSON file beside the table; a rerun does only what is missing.
"""

from __future__ import annotations

import itertools
import math
import shlex
import sys
from collections.abc import Sequence
from statistics import mean
from typing import Any

from eval.posed import options, pose
from eval.prepared import Lines, inputs_of, recipe_of
from eval.results_file import Results
from moe_rco.calib.search import REFINED, SEED, find
from moe_rco.recipe_sections import SearchMethod

PROBLEMS = {
    "prune or bf16, 50 %": (["options=[prune,bf16]"], 0.5),
    "prune, 4, 8, 16 bits, 25 %": (["options=[prune,int4-g64,int8-g64,bf16]"], 0.25),
    "all options, 13 %": ([], 0.13),
    "all options, 25 %": ([], 0.25),
}
PARTS: dict[str, tuple[SearchMethod, int, int]] = {
    "gradients": ("rco", 80, 0),
    "races": ("rco", 0, 80),
    "gradients, then races": ("rco", 40, 40),
    "evolution": ("evolution", 80, 0),
}
"""Method, steps of the search and of the races."""
START = "start"


def measure(name: str, seed: int, problem: str, results: Results) -> None:
    """All parts on one problem of one model and seed."""
    settings, ratio = PROBLEMS[problem]
    inputs = f"{inputs_of(recipe_of(name, seed, settings))} {problem}"
    if results.get(key := (name, ratio, seed, problem), inputs) is not None:
        return
    print(f"{name}, seed {seed}, {problem}", flush=True)
    at = pose(name, seed, settings, ratio)
    prepared, references = at.prepared, (at.prepared.calibrated.train, at.prepared.calibrated.kept_out)
    ends = {SEED: at.fisher, START: at.start}
    for part, (method, steps, races) in PARTS.items():
        search = at.recipe.search.model_copy(update={"method": method, "steps": steps, "refine": races})
        found = find(
            prepared.model,
            at.budget,
            prepared.by_sequence,
            prepared.pools,
            references,
            search,
            {START: at.start},
            Lines(),
        )
        made = {candidate.name: candidate.assignment for candidate in found.candidates}
        ends[part] = made[REFINED if races else method]
    kl = {part: at.heldout(assignment) for part, assignment in ends.items()}
    print("  " + ", ".join(f"{part} {value:.5f}" for part, value in kl.items()), flush=True)
    results.put(
        dict(zip(("model", "ratio", "seed", "method"), key, strict=True)) | {"inputs": inputs, "kl": kl}
    )


def render(records: Sequence[dict[str, Any]], command: str) -> str:
    """The table in Markdown."""
    columns = (SEED, START, *PARTS)
    lines = [
        "# What the parts of the search gain", "", f"Made by `{command}`.", "",
        "Held-out KL in nats per token of what a part ends with, by seed, at equal passes and from the same start: the",
        "candidate that is lowest on the kept-out text. Whether it may replace its start is not asked here. The last row is",
        "the mean over all others of the logarithm of a column's ratio to the start, as a ratio.", "",
        "| model | problem | seed | " + " | ".join(columns) + " |", "|---" * (3 + len(columns)) + "|",
    ]  # fmt: skip
    for record in records:
        cells = [f"{record['kl'][column]:.5f}" for column in columns]
        lines.append(
            f"| {record['model']} | {record['method']} | {record['seed']} | " + " | ".join(cells) + " |"
        )
    ratios = [
        math.exp(mean(math.log(record["kl"][column] / record["kl"][START]) for record in records))
        for column in columns
    ]
    lines.append("| all | | | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = options(__doc__, "search_parts.md").parse_args()
    results = Results(arguments.output.with_suffix(".json"))
    records = []
    for name, seed, problem in itertools.product(arguments.models, arguments.seeds, PROBLEMS):
        measure(name, seed, problem, results)
        settings, ratio = PROBLEMS[problem]
        inputs = f"{inputs_of(recipe_of(name, seed, settings))} {problem}"
        record = results.get((name, ratio, seed, problem), inputs)
        if record is not None:
            records.append(record)
        command = shlex.join(["python", "-m", "eval.search_parts", *sys.argv[1:]])
        arguments.output.write_text(render(records, command), encoding="utf-8")


if __name__ == "__main__":
    main()
