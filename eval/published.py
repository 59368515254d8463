"""Our search against published code on its own task: pruning experts, the others kept as they are.

    git clone https://github.com/IST-DASLab/RCO && git -C RCO checkout 9a1e09c07d46
    git clone https://github.com/CerebrasResearch/reap && git -C reap checkout 1970473c51ca
    OMP_NUM_THREADS=1 python -m eval.published --rco RCO --reap reap --reap-python reap/.venv/bin/python
    OMP_NUM_THREADS=1 python -m eval.published --redo ours

Everyone gets the same model files, the same token ids (our training sequences) and the same number of experts to
prune. The rivals run out of process from their clones (`eval.published_rco` and `eval.published_reap` say how), one
after another; what they leave is judged by us on held-out text, as deployed: pruned experts are masked before top-k.
REAP needs a Python with transformers 4.55, torch, accelerate, datasets, scikit-learn and python-dotenv. A rival without
a clone is not run; what is known of it is shown. Results are kept as `eval.quality` keeps them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.prepared import MODELS, Lines, Subject, inputs_of, recipe_of
from eval.published_table import render
from eval.quality import Judge
from eval.results_file import Results
from moe_rco.calib.bank import LayerBank, StackedLayer
from moe_rco.calib.data import heldout_pool, load_tokenizer
from moe_rco.calib.objective import AssignedModel
from moe_rco.ckpt.locate import fetch_model
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.job import Ready, open_inputs, size
from moe_rco.pipeline import Prepared, choose, prepare
from moe_rco.recipe import DEMO_CALIBRATION, DEMO_HELDOUT, Recipe
from moe_rco.types import Assignment, CostTable

OURS = "ours"
OPTIONS = ("options=[prune,bf16]",)
COMMITS = {"rco": "9a1e09c07d46", "reap": "1970473c51ca"}
_RCO = ("--n-steps", "300", "--lr", "0.1", "--n-gumbel-samples", "4", "--antithetic", "--batch-size", "4")
"""As in its scripts/run_search_prune.sh."""


@dataclass(frozen=True)
class Rival:
    """A way to run a rival's clone; it sees the first `sequences` of our training sequences, all by default."""

    clone: str
    options: tuple[str, ...] = ()
    sequences: int | None = None


RIVALS = {
    "RCO": Rival("rco", _RCO),
    "RCO, float32": Rival("rco", (*_RCO, "--float32")),
    "RCO, 64 sequences": Rival("rco", _RCO, 64),
    "RCO, equal layers": Rival("rco", (*_RCO, "--per-layer-budget")),
    "REAP": Rival("reap"),
}
METHODS = (OURS, *RIVALS)
RCO_SEED = 42


def inputs(method: str, recipe: Recipe) -> str:
    """What a result depends on; a rival's does not on how we search."""
    if method == OURS:
        return inputs_of(recipe)
    directory, rival = recipe.model_directory or Path(recipe.model), RIVALS[method]
    parts = [Checkpoint(directory).digest(), recipe.calibration.model_dump_json(), recipe.search.seed]
    digest = hashlib.sha256(f"{parts} {rival} {COMMITS[rival.clone]}".encode())
    for text in (DEMO_CALIBRATION, DEMO_HELDOUT):
        digest.update(text.read_bytes())
    return digest.hexdigest()[:16]


def assignment_of(table: CostTable, pruned: Sequence[Sequence[int]]) -> Assignment:
    """A mask [layers][experts], 1 for pruned, as an assignment of a table of the options prune and bf16."""
    prune = table.prune_index
    if prune is None:
        raise ValueError("the table has no option prune")
    choice = np.empty(len(table.groups), dtype=np.int64)
    for layer, mask in zip(table.layers, pruned, strict=True):
        choice[table.rows(layer)] = np.where(mask, prune, 1 - prune)
    return Assignment(table, choice)


class WithoutFloor(AssignedModel):
    """The deployed model, also where a layer keeps fewer experts than a token uses: the missing ones add nothing."""

    def layer_bank(self, layer: int) -> LayerBank:
        bank = super().layer_bank(layer)
        if bank.prune_index is None or not isinstance(bank, StackedLayer):
            return bank
        gate_up, down = bank.stacks[bank.original]
        nothing = torch.zeros_like(gate_up), torch.zeros_like(down)
        return replace(bank, stacks={**bank.stacks, bank.prune_index: nothing})


def judge_of(name: str, ready: Ready, prepared: Prepared) -> Judge:
    """Our judge, which also takes the masks that cannot be deployed."""
    bank, tokenizer = prepared.model.bank, load_tokenizer(ready.checkpoint.directory)
    config = ready.checkpoint.config
    model = WithoutFloor(prepared.model.runner, ready.sized.adapter, config, bank, prepared.store)
    heldout = heldout_pool(ready.recipe.calibration, tokenizer, prepared.pools[1])
    return Judge(Subject(name, ready.sized, replace(prepared, model=model), heldout))


@dataclass(frozen=True)
class Found:
    """What a method chose, from how many calibration tokens and in how many seconds."""

    assignment: Assignment
    tokens: int
    preparation: float
    seconds: float
    variant: str = ""


def run_ours(prepared: Prepared, preparation: float, recipe: Recipe) -> Found:
    """Our search for the recipe's budget; preparing has taken `preparation` seconds."""
    start = time.monotonic()
    best = choose(prepared, recipe.budget[0].resolve(prepared.model.table), recipe, Lines()).best
    seconds, tokens = time.monotonic() - start, sum(pool.ids.numel() for pool in prepared.pools)
    return Found(best.assignment, tokens, preparation, seconds, best.name)


def run_rival(rival: Rival, clone: Path, python: Path, ready: Ready, pruned: float) -> Found:
    """What the rival's driver leaves. Raises CalledProcessError after printing what the driver printed."""
    options = ["--pruned", str(pruned), *rival.options]
    if rival.clone == "rco":
        options += ["--seed", str(RCO_SEED + ready.recipe.search.seed)]
    driver = Path(__file__).with_name(f"published_{rival.clone}.py").resolve()
    ids = ready.pools[0].ids[: rival.sequences]
    with tempfile.TemporaryDirectory() as work:
        tokens, result = Path(work) / "tokens.npy", Path(work) / "result.json"
        np.save(tokens, ids.numpy())
        where = [clone, ready.checkpoint.directory.resolve(), tokens, result]
        # -P: the names of our files must not hide those of its own.
        command = [str(python), "-P", str(driver), *map(str, where), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout, done.stderr, sep="\n")
            done.check_returncode()
        left = json.loads(result.read_text(encoding="utf-8"))
    assignment = assignment_of(ready.sized.table, left["pruned"])
    return Found(assignment, ids.numel(), left["preparation"], left["seconds"])


def record_of(found: Found, judge: Judge) -> dict[str, Any]:
    """A result as it is kept; `kept` is the number of experts each layer keeps, `floor` how many a token uses."""
    assignment, scores = found.assignment, judge(found.assignment)
    record: dict[str, Any] = {"kl": scores.all.kl, "kl_stderr": scores.all.kl_stderr}
    record["domains"] = {score.name: score.kl for score in scores.domains}
    record["kept"] = [len(assignment.kept(layer)) for layer in assignment.table.layers]
    record["floor"] = assignment.table.floor
    record |= {"tokens": found.tokens, "preparation": found.preparation, "seconds": found.seconds}
    return record | {"variant": found.variant}


def measure_model(
    name: str, seed: int, arguments: argparse.Namespace, clones: dict[str, Path], results: Results
) -> None:
    """Every method at every share of pruned experts that is missing or to be redone, for one model and seed."""
    recipe = recipe_of(name, seed, [*OPTIONS, *arguments.settings])
    runnable = [m for m in METHODS if m in arguments.methods and (m == OURS or RIVALS[m].clone in clones)]
    todo = [
        (pruned, method)
        for pruned, method in itertools.product(arguments.pruned, runnable)
        if method in arguments.redo
        or results.get((name, pruned, seed, method), inputs(method, recipe)) is None
    ]
    if not todo:
        print(f"{name}, seed {seed}: nothing to do", flush=True)
        return
    print(f"{name}, seed {seed}: {len(todo)} results to make", flush=True)
    # Always prepared afresh: its time is part of ours.
    with tempfile.TemporaryDirectory() as work:
        ready = open_inputs(size(recipe), fetch_model(recipe))
        start = time.monotonic()
        prepared = prepare(ready, Path(work), Lines())
        preparation = time.monotonic() - start
        judge = judge_of(name, ready, prepared)
        for pruned, method in todo:
            at = recipe_of(name, seed, [*OPTIONS, *arguments.settings, f"budget={{ratio: {1 - pruned}}}"])
            if method == OURS:
                found = run_ours(prepared, preparation, at)
            else:
                rival = RIVALS[method]
                python = arguments.reap_python if rival.clone == "reap" else Path(sys.executable)
                found = run_rival(rival, clones[rival.clone], python, ready, pruned)
            budget = at.budget[0].resolve(ready.sized.table)
            if found.assignment.cost > budget.bytes:
                raise RuntimeError(f"{method} keeps {found.assignment.cost} bytes of {budget.bytes}")
            record = {"model": name, "ratio": pruned, "seed": seed, "method": method}
            record |= {"inputs": inputs(method, recipe), **record_of(found, judge)}
            results.put(record)
            took = f"{found.preparation:.0f} + {found.seconds:.0f} s"
            print(f"  {pruned:.0%} {method}: KL {record['kl']:.5f}, {took}", flush=True)


def checked(clone: Path, commit: str) -> Path:
    """The clone's directory. Exits where another commit is checked out."""
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if not found.startswith(commit):
        raise SystemExit(f"{clone} is at {found.strip()[:12]}; check out {commit}")
    return clone.resolve()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rco", type=Path, help="clone of IST-DASLab/RCO")
    parser.add_argument("--reap", type=Path, help="clone of CerebrasResearch/reap")
    parser.add_argument("--reap-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pruned", nargs="+", type=float, default=[0.25, 0.5], help="shares of the experts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="what is run")
    parser.add_argument("--redo", nargs="+", choices=METHODS, default=[])
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path("eval/results/published.md"))
    parser.add_argument(
        "--known", action="store_true", help="make the table of the results there are, no more"
    )
    arguments = parser.parse_args()
    clones = {
        name: checked(clone, COMMITS[name])
        for name, clone in {"rco": arguments.rco, "reap": arguments.reap}.items()
        if clone
    }
    results = Results(arguments.output.with_suffix(".json"))
    for name, seed in [] if arguments.known else itertools.product(arguments.models, arguments.seeds):
        measure_model(name, seed, arguments, clones, results)
    records = []
    for name, seed in itertools.product(arguments.models, arguments.seeds):
        recipe = recipe_of(name, seed, [*OPTIONS, *arguments.settings])
        for pruned, method in itertools.product(arguments.pruned, METHODS):
            records.append(results.get((name, pruned, seed, method), inputs(method, recipe)))
    # Not the whole command line: where the clones lie is nobody's business.
    command = shlex.join(["python", "-m", "eval.published", *(f"--set={s}" for s in arguments.settings)])
    table = render([record for record in records if record], OURS, command)
    arguments.output.write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
