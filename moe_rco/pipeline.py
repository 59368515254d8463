"""The main job: choose, rewrite, reload and measure."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from moe_rco import preflight as checks
from moe_rco.baselines import (
    SIMPLE,
    OutputErrors,
    linear_losses,
    output_errors,
    simple_assignments,
    starting_points,
)
from moe_rco.calib.bank import OptionBank
from moe_rco.calib.calibrate import Calibrated, calibrate
from moe_rco.calib.data import TokenPool, heldout_pool, load_tokenizer
from moe_rco.calib.fisher import fisher_effects
from moe_rco.calib.objective import AssignedModel
from moe_rco.calib.runner import Runner
from moe_rco.calib.search import SEED, Chosen, find, knapsack
from moe_rco.calib.streaming import Streaming
from moe_rco.calib.team import Team, joined
from moe_rco.ckpt.destination import check_place, publish, recover
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.rewrite import rewrite
from moe_rco.ckpt.state import SavedState
from moe_rco.ckpt.store import Store
from moe_rco.ckpt.workdir import WorkDirectory
from moe_rco.plan import Plan, costs_digest
from moe_rco.progress import Run
from moe_rco.recipe import Recipe
from moe_rco.report import Preflight, Report
from moe_rco.reporting import build_report
from moe_rco.types import Assignment, Budget, Progress, Silent
from moe_rco.verify import RELOAD_SEQUENCES, verify

PROXY_STRIDE = 4
"""Output errors are sums of squares with no noise of draws in them: a part of the calibration text will do."""
LINEARITY_SEQUENCES = 16
"""Sequences on which the KL of every expert alone is measured for `search.method: linearity`."""


@dataclass(frozen=True)
class Prepared:
    """A calibrated model with every option quantised: what a search for any budget starts from.

    `effects` [N, K] is the Fisher estimate of what each option of each group adds to the KL, `errors` what it does
    to the output of its block.
    """

    checkpoint: Checkpoint
    model: AssignedModel
    store: Store
    pools: tuple[TokenPool, TokenPool]
    calibrated: Calibrated
    effects: np.ndarray
    errors: OutputErrors


def preflight(recipe: Recipe, *, overwrite: bool = False) -> Preflight:
    """What `prune` would do, with sizes and memory. Raises UserError for everything that can be known to be wrong."""
    return checks.check(recipe, overwrite=overwrite)


def prune(recipe: Recipe, *, progress: Progress | None = None, overwrite: bool = False) -> Report:
    """Do the whole job of a recipe: the output directory appears complete, measured and with its report, or not at all.

    What is done is kept in `<output>.work` until the end, so that a run interrupted at any moment goes on where it was.
    Started by torchrun, several processes share the work in one file system; the first of them writes, and all return
    the report. Raises UserError for what the user can repair.
    """
    output = Path(recipe.output)
    check_place(output)
    work = WorkDirectory.of(output)
    with joined() as team, work.locked() if team.leads else nullcontext():
        if team.leads:
            recover(output)
        team.wait()
        return _prune(recipe, work, output, _Clock(progress or Silent()), overwrite, team)


def _prune(
    recipe: Recipe, work: WorkDirectory, output: Path, clock: _Clock, overwrite: bool, team: Team
) -> Report:
    ready = team.in_turn(lambda: checks.make_ready(recipe, overwrite=overwrite))
    ready = replace(ready, streaming=_agreed(ready.streaming, team))
    sized, checkpoint = ready.sized, ready.checkpoint
    if team.leads:
        Run.of(recipe, sized.table, sized.budget).save(work)
        checkpoint.check_finite(sized.adapter, clock)
    prepared = prepare(ready, work.path, clock, team)
    search = replace(work.search(prepared.store.fingerprint, recipe.digest()), read_only=not team.leads)
    chosen = choose(prepared, sized.budget, recipe, clock, search)
    if not team.leads:
        team.wait()
        return Report.load(output)
    assignment = chosen.best.assignment
    plan = Plan.from_assignment(
        assignment,
        sized.budget,
        model_digest=checkpoint.digest(clock),
        recipe_digest=recipe.digest(),
        losses={"kept_out_kl": chosen.best.kl},
    )
    written = rewrite(
        checkpoint,
        assignment,
        plan,
        prepared.store,
        work.checkpoint,
        recipe.to_yaml(),
        manifest=work.shards,
        progress=clock,
    )
    heldout = heldout_pool(recipe.calibration, load_tokenizer(checkpoint.directory), prepared.pools[1])
    sample = prepared.pools[1].ids[:RELOAD_SEQUENCES]
    reload, scores = verify(prepared.model, assignment, work.checkpoint, heldout, sample, clock)
    report = build_report(
        sized, plan.model, prepared.store, chosen, written, reload, scores, clock.stages, output
    )
    report.check()
    report.save(work.checkpoint)
    work.will_publish()
    publish(work.checkpoint, output, overwrite=overwrite, keep=checkpoint.directory)
    work.clear()
    team.wait()
    return report


def _agreed(streaming: Streaming | None, team: Team) -> Streaming | None:
    """What the first process has found that fits: all must take the same share of everything at a time."""
    none = (0, 0, 0, 0)
    found = np.array(none if streaming is None else astuple(streaming), dtype=np.float64)
    (first,) = team.map(lambda values: values, [found])
    return None if not first.any() else Streaming(*map(int, first[:3]), spill=bool(first[3]))


def prepare(ready: checks.Ready, work: Path, progress: Progress, team: Team | None = None) -> Prepared:
    """Quantise every option into the store in `work`, and measure what each would do. Raises UserError."""
    recipe, sized, checkpoint, pools = ready.recipe, ready.sized, ready.checkpoint, ready.pools
    device = checks.resolve_device(recipe)
    dtype = checks.resolve_dtype(recipe, device)
    streaming = ready.streaming
    runner = Runner(checkpoint, sized.adapter, device, dtype, streaming)
    tokens = [hashlib.sha256(pool.ids.numpy().tobytes()).hexdigest() for pool in pools]
    inputs = [checkpoint.digest(progress), *tokens, recipe.quantizer.model_dump(mode="json"), str(dtype)]
    directory = WorkDirectory(work)
    team, fingerprint = team or Team(), hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    store = team.in_turn(lambda: Store(directory.store, fingerprint))
    bank = OptionBank(checkpoint, sized.table, device, dtype, streaming)
    original = AssignedModel(runner, sized.adapter, checkpoint.config, bank, None, team)
    calibrated = calibrate(original, store, pools, recipe.quantizer.method, progress)
    model = AssignedModel(runner, sized.adapter, checkpoint.config, bank, store, team)
    # The options decide the table's columns; the rest of what the effects depend on is in the store's fingerprint.
    saved = directory.measured(store.fingerprint, costs_digest(sized.table), recipe.search.seed)
    saved = replace(saved, read_only=not team.leads)
    state = saved.load()
    if state is None:
        effects = fisher_effects(model, pools[0], recipe.search.seed, progress)
        errors = output_errors(model, pools[0].every(PROXY_STRIDE), progress)
        state = {
            name: torch.from_numpy(value) for name, value in {"effects": effects, **vars(errors)}.items()
        }
        saved.save(state)
    measured = {name: value.numpy() for name, value in state.items()}
    effects = measured.pop("effects")
    return Prepared(checkpoint, model, store, pools, calibrated, effects, OutputErrors(**measured))


def choose(
    prepared: Prepared, budget: Budget, recipe: Recipe, progress: Progress, resume: SavedState | None = None
) -> Chosen:
    """Search for the best assignment within a budget; simple methods' assignments take part as candidates.

    For layout stock what layout mixed would start its search from is judged too, for comparison.
    """
    table, measured = prepared.model.table, (prepared.calibrated.usage, prepared.errors)
    mixed: dict[str, Assignment] = {}
    if table.layout == "stock":
        free = replace(table, layout="mixed")
        mixed = {SEED: knapsack(prepared.effects, free, budget), **starting_points(free, budget, *measured)}
    return find(
        prepared.model,
        budget,
        prepared.effects,
        prepared.pools,
        (prepared.calibrated.train, prepared.calibrated.kept_out),
        recipe.search,
        _candidates(prepared, budget, recipe.search.method, progress),
        progress,
        resume,
        mixed,
    )


def _candidates(prepared: Prepared, budget: Budget, method: str, progress: Progress) -> dict[str, Assignment]:
    """What a method starts from, or has to offer. The Fisher seed is ours: other methods start from the simple ones."""
    table = prepared.model.table
    if method == "linearity":
        stride = max(1, len(prepared.pools[0]) // LINEARITY_SEQUENCES)
        reference = prepared.calibrated.train.of(slice(None, None, stride), prepared.model.runner.device)
        losses = linear_losses(prepared.model, prepared.pools[0].every(stride), reference, progress)
        return {method: knapsack(losses, table, budget)}
    seed = {SEED: knapsack(prepared.effects, table, budget)}
    if method == "fisher":
        return seed
    measured = (prepared.calibrated.usage, prepared.errors)
    if method in SIMPLE:
        return simple_assignments(method, table, budget, *measured)
    points = starting_points(table, budget, *measured)
    return seed | points if method == "rco" else points


@dataclass
class _Clock:
    """Passes progress on, and notes how long each stage took."""

    progress: Progress
    stages: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        start = time.monotonic()
        with self.progress.stage(title, total) as advance:
            yield advance
        self.stages.append((title, time.monotonic() - start))
