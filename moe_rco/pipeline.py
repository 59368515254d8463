"""The main job: choose, rewrite, reload and measure."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from moe_rco import checks, page
from moe_rco.baselines import (
    PROXY_STRIDE,
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
from moe_rco.calib.search import SEED, Chosen, Watch, find, knapsack, start_logits
from moe_rco.calib.streaming import Streaming
from moe_rco.calib.team import Team, joined
from moe_rco.ckpt.destination import check_place, existing_parent, publish, recover
from moe_rco.ckpt.manifest import make_manifest
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.rewrite import rewrite
from moe_rco.ckpt.shards import read_manifest
from moe_rco.ckpt.state import SavedState
from moe_rco.ckpt.steady import Sealed, staying
from moe_rco.ckpt.store import Store
from moe_rco.ckpt.workdir import Lock, Part, WorkDirectory
from moe_rco.clock import Clock
from moe_rco.curve import Curve
from moe_rco.errors import OutputError, RecipeError
from moe_rco.explain import Needs, explaining
from moe_rco.forecast import stage_times
from moe_rco.job import Ready, Sized
from moe_rco.plan import Plan, costs_digest
from moe_rco.progress import Run, finished, part_names
from moe_rco.recipe import Recipe
from moe_rco.reload import RELOAD_SEQUENCES, reload
from moe_rco.report import FILE_NAME as REPORT
from moe_rco.report import Preflight, Report
from moe_rco.reporting import build_report
from moe_rco.tracking import Callback, following
from moe_rco.types import Assignment, Budget, Progress, Silent

_log = logging.getLogger(__name__)
LINEARITY_SEQUENCES = 16
"""Sequences on which the KL of every expert alone is measured for `search.method: linearity`."""


@dataclass(frozen=True)
class Prepared:
    """A calibrated model with every option quantised: what a search for any budget starts from.

    `by_sequence` float32 [R, N, K] is the Fisher estimate of what each option of each group adds to the KL of each sequence of
    the first pool, `errors` what it does to the output of its block.
    """

    checkpoint: Checkpoint
    model: AssignedModel
    store: Store
    pools: tuple[TokenPool, TokenPool]
    calibrated: Calibrated
    by_sequence: np.ndarray
    errors: OutputErrors

    @cached_property
    def effects(self) -> np.ndarray:
        """The Fisher estimate for all sequences together, float64 [N, K]."""
        return self.by_sequence.mean(0, dtype=np.float64)


def preflight(recipe: Recipe, *, progress: Progress | None = None, overwrite: bool = False) -> Preflight:
    """What `prune` would do, with sizes, memory and times. Raises UserError for everything that can be known to be wrong."""
    return checks.check(recipe, progress or Silent(), overwrite=overwrite)


def prune(
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """`prune_all` for a recipe with one budget. Raises UserError for what the user can repair."""
    if len(recipe.budget) > 1:
        raise RecipeError(f"budget: {len(recipe.budget)} are listed; prune_all makes a model for each")
    return prune_all(recipe, progress=progress, overwrite=overwrite, callbacks=callbacks)[0]


def prune_all(
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
    told: Callable[[Preflight], None] = lambda preflight: None,
    callbacks: Sequence[Callback] = (),
) -> tuple[Report, ...]:
    """Do the whole job of a recipe: the output directory appears complete, measured and with its report, or not at all.

    A report for every budget, the largest first. Of several budgets each has a directory of its own in the output, beside
    the curve of quality against bytes (`Curve`).
    What is done is kept in `<output>.work` until the end, so that a run interrupted at any moment goes on where it was.
    Started by torchrun, several processes share the work in one file system; the first of them writes, and all return
    the report. Before the long work begins, `told` gets to know what it will take; `callbacks` are told of the search, in the
    first process only, and change nothing. Raises UserError for what the user can repair.
    """
    output = Path(recipe.output)
    work = WorkDirectory.of(output)
    clock = Clock(progress or Silent())
    with explaining(lambda: _needs(work, clock)):
        check_place(output)
        with following(callbacks) as follower:
            return _shared(recipe, work, output, clock, overwrite, told, follower)


def _shared(
    recipe: Recipe,
    work: WorkDirectory,
    output: Path,
    clock: Clock,
    overwrite: bool,
    told: Callable[[Preflight], None],
    follower: Callback,
) -> tuple[Report, ...]:
    with joined() as team, work.locked() if team.leads else nullcontext() as lock:
        if team.leads:
            recover(output)
        team.wait()
        follower = follower if team.leads else Callback()
        return _prune(recipe, work, output, clock, overwrite, team, told, follower, lock)


def _needs(work: WorkDirectory, clock: Clock) -> Needs:
    """What the run had counted on when something was refused to it."""
    stage, place = (clock.under or [""])[-1], existing_parent(work.path)
    expected = clock.expected
    if expected is None:
        return Needs(place, stage=stage)
    disk = max(0, expected.disk_needed - work.held_bytes())
    return Needs(place, disk, expected.device_memory or expected.memory, expected.streamed, stage)


def _prune(
    recipe: Recipe,
    work: WorkDirectory,
    output: Path,
    clock: Clock,
    overwrite: bool,
    team: Team,
    told: Callable[[Preflight], None],
    follower: Callback,
    lock: Lock | None,
) -> tuple[Report, ...]:
    ready = team.in_turn(lambda: checks.make_ready(recipe, overwrite=overwrite))
    ready = replace(ready, streaming=_agreed(ready.streaming, team))
    sized, checkpoint = ready.sized, ready.checkpoint
    parts = part_names(sized.budgets)
    with staying(checkpoint, work.clear if team.leads else lambda: None):
        reports, sealed = _made(ready, work, output, parts, clock, team, told, follower)
    if not team.leads:
        team.wait()
        return tuple(Report.load(output / name) for name in parts)
    for each in sealed:
        _check(each)
    if lock is not None:
        lock.check()
    if len(reports) > 1:
        curve = Curve.of(parts, reports)
        curve.save(work.checkpoint)
        page.save_compared(work.checkpoint / page.FILE_NAME, dict(zip(parts, reports, strict=True)), curve)
    _log.info("putting %s in place", output)
    work.will_publish()
    publish(work.checkpoint, output, overwrite=overwrite, keep=checkpoint.directory)
    work.clear()
    team.wait()
    return tuple(reports)


def _check(sealed: Sealed) -> None:
    """Raises OutputError, and sees to it that the next run looks at every shard."""
    try:
        sealed.check()
    except OutputError:
        (sealed.directory / REPORT).unlink(missing_ok=True)
        raise


def _made(
    ready: Ready,
    work: WorkDirectory,
    output: Path,
    parts: Sequence[str],
    clock: Clock,
    team: Team,
    told: Callable[[Preflight], None],
    follower: Callback,
) -> tuple[list[Report], list[Sealed]]:
    """A model for every budget, in the work directory; where this process leads, the reports and what was written."""
    recipe, sized, checkpoint = ready.recipe, ready.sized, ready.checkpoint
    if team.leads:
        Run.of(recipe, sized.table, sized.budgets).save(work)
        work.keep_parts(parts)
        checkpoint.check_finite(sized.table.groups, clock)
        # Of several processes each has its part to do, and how they get in each other's way is not measured.
        times = stage_times(ready, clock, work.path) if team.size == 1 else {}
        expected = checks.describe(sized, ready, times)
        clock.times, clock.expected = times, expected
        told(expected)
        follower.on_begin(recipe, parts, work.path)
    prepared = prepare(ready, work.path, clock, team)
    heldout = heldout_pool(recipe.calibration, load_tokenizer(checkpoint.directory), prepared.pools[1])
    reports, sealed, neighbour = list[Report](), list[Sealed](), None
    for name, budget in zip(parts, sized.budgets, strict=True):
        job = _Job(sized, prepared, heldout, budget, work.part(name), output / name, clock.at(name), follower)
        report, neighbour = job.done(neighbour)
        if report is not None:
            follower.on_report(name, report)
            reports.append(report)
            sealed.append(Sealed.of(job.part.checkpoint))
        clock.taken.clear()  # what all budgets share is told of the first
    return reports, sealed


@dataclass(frozen=True)
class Neighbour:
    """What was found for the next larger budget: its best assignment, and the logits its search ended with, if it did."""

    budget: str
    choice: np.ndarray
    logits: torch.Tensor | None


@dataclass(frozen=True)
class _Job:
    """One budget: from the search to the report. `part` is where it is kept, `output` where its model will be."""

    sized: Sized
    prepared: Prepared
    heldout: TokenPool
    budget: Budget
    part: Part
    output: Path
    clock: Clock
    follower: Callback

    def done(self, neighbour: Neighbour | None) -> tuple[Report | None, Neighbour | None]:
        """The report, if this process leads, and what the next budget starts from, if there is one.

        Both are from an earlier run if that had finished this budget.
        """
        recipe, store = self.sized.recipe, self.prepared.store
        self.part.directory.mkdir(exist_ok=True)
        inputs = (store.fingerprint, recipe.search_digest())
        report = finished(self.part, store.fingerprint, recipe.digest())
        found = self.part.found(*inputs)
        last, state = self.budget == self.sized.budgets[-1], found.load()
        if report is None or (state is None and not last):
            leads = self.prepared.model.team.leads
            search = replace(self.part.search(*inputs), read_only=not leads)
            watch = partial(self.follower.on_step, self.clock.name)
            chosen = choose(self.prepared, self.budget, recipe, self.clock, search, neighbour, watch)
            state = {"choice": torch.from_numpy(chosen.best.assignment.choice)}
            if chosen.logits is not None:
                state["logits"] = chosen.logits
            if leads and not last:
                found.save(state)
            report = self._written(chosen) if leads else None
        if state is None:
            return report, None
        return report, Neighbour(self.budget.text, state["choice"].numpy(), state.get("logits"))

    def _written(self, chosen: Chosen) -> Report:
        """Write, read back, measure."""
        prepared, recipe, assignment = self.prepared, self.sized.recipe, chosen.best.assignment
        plan = Plan.from_assignment(
            assignment,
            self.budget,
            model_digest=prepared.checkpoint.digest(self.clock),
            recipe_digest=recipe.digest(),
            losses={"kept_out_kl": chosen.best.kl},
        )
        written = rewrite(
            prepared.checkpoint,
            assignment,
            plan,
            prepared.store,
            self.part.checkpoint,
            recipe.to_yaml(),
            manifest=self.part.shards,
            progress=self.clock,
        )
        sealed = Sealed.of(self.part.checkpoint)
        manifest = self._manifest(plan, written.total_bytes)
        sample = prepared.pools[1].ids[:RELOAD_SEQUENCES]
        try:
            reloaded, scores = reload(
                prepared.model, assignment, self.part.checkpoint, self.heldout, sample, self.clock
            )
        finally:
            sealed.check()  # what it stumbled over may be a file that is no longer what was written
        report = build_report(
            self.sized, self.budget, plan.model, manifest, prepared.store, prepared.calibrated.usage, chosen, written,
            reloaded, scores, self.clock, self.output,
        )  # fmt: skip
        report.check()
        page.save(self.part.checkpoint, report, recipe.to_yaml())
        report.save(self.part.checkpoint)  # last: it tells that all is there
        return report

    def _manifest(self, plan: Plan, weight_bytes: int) -> str:
        """Read back and note every byte that was written; the manifest's digest."""
        shards = read_manifest(self.part.shards) or {"shards": {}}
        with self.clock.stage("hash what was written", weight_bytes) as advance:
            manifest = make_manifest(
                self.part.checkpoint,
                shards["shards"],
                model=plan.model,
                recipe=plan.recipe,
                store=self.prepared.store.fingerprint,
                advance=advance,
            )
        return manifest.save(self.part.checkpoint)


def _agreed(streaming: Streaming | None, team: Team) -> Streaming | None:
    """What the first process has found that fits: all must take the same share of everything at a time."""
    none = (0, 0, 0, 0)
    found = np.array(none if streaming is None else astuple(streaming), dtype=np.float64)
    (first,) = team.map(lambda values: values, [found])
    return None if not first.any() else Streaming(*map(int, first[:3]), spill=bool(first[3]))


def prepare(ready: Ready, work: Path, progress: Progress, team: Team | None = None) -> Prepared:
    """Quantise every option into the store in `work`, and measure what each would do. Raises UserError."""
    recipe, sized, checkpoint, pools = ready.recipe, ready.sized, ready.checkpoint, ready.pools
    device = sized.device
    dtype = sized.dtype
    streaming = ready.streaming
    runner = Runner(checkpoint, sized.adapter, device, dtype, streaming)
    tokens = [pool.digest() for pool in pools]
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
    _log.info("effects of the options: %s", "measured here" if state is None else "there from an earlier run")
    if state is None:
        by_sequence = fisher_effects(model, pools[0], recipe.search.seed, progress)
        errors = output_errors(model, pools[0].every(PROXY_STRIDE), progress)
        state = {
            name: torch.from_numpy(value)
            for name, value in {"by_sequence": by_sequence, **vars(errors)}.items()
        }
        saved.save(state)
    measured = {name: value.numpy() for name, value in state.items()}
    by_sequence = measured.pop("by_sequence")
    return Prepared(checkpoint, model, store, pools, calibrated, by_sequence, OutputErrors(**measured))


def choose(
    prepared: Prepared,
    budget: Budget,
    recipe: Recipe,
    progress: Progress,
    resume: SavedState | None = None,
    neighbour: Neighbour | None = None,
    watch: Watch = lambda stage, record: None,
) -> Chosen:
    """Search for the best assignment within a budget; simple methods' assignments take part as candidates.

    For layout stock what layout mixed would start its search from is judged too, for comparison. `rco` begins where the
    search for the `neighbour` ended. `watch` is called with every step.
    """
    table, measured = prepared.model.table, (prepared.calibrated.usage, prepared.errors)
    method = recipe.search.method
    candidates = _candidates(prepared, budget, method, progress)
    if neighbour is not None and method == "rco":
        candidates |= from_neighbour(neighbour, prepared, budget)
    mixed: dict[str, Assignment] = {}
    if table.layout == "stock":
        free = replace(table, layout="mixed")
        mixed = {SEED: knapsack(prepared.effects, free, budget), **starting_points(free, budget, *measured)}
    return find(
        prepared.model,
        budget,
        prepared.by_sequence,
        prepared.pools,
        (prepared.calibrated.train, prepared.calibrated.kept_out),
        recipe.search,
        candidates,
        progress,
        resume,
        mixed,
        None if neighbour is None or method != "rco" else neighbour.logits,
        watch,
    )


def from_neighbour(neighbour: Neighbour, prepared: Prepared, budget: Budget) -> dict[str, Assignment]:
    """The neighbour's assignment, changed where the Fisher effects say that the other budget costs least."""
    table = prepared.model.table
    logits = start_logits(prepared.effects, Assignment(table, neighbour.choice))
    return {f"from {neighbour.budget}": knapsack(-logits.numpy(), table, budget)}


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
