"""How far a run is: what it notes when it starts, and what its files tell, whether or not it is running."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, computed_field

from moe_rco._version import __version__
from moe_rco.ckpt.destination import CURVE
from moe_rco.ckpt.shards import read_manifest
from moe_rco.ckpt.store import listed
from moe_rco.ckpt.workdir import SUFFIX, Part, WorkDirectory
from moe_rco.ckpt.writer import replace_text
from moe_rco.curve import Curve
from moe_rco.errors import OutputError
from moe_rco.optim.solve import SEARCHES, evolution_steps, step_passes
from moe_rco.plan import costs_digest
from moe_rco.recipe import Recipe
from moe_rco.recipe_sections import Search
from moe_rco.report import FILE_NAME as REPORT
from moe_rco.report import Report
from moe_rco.types import Budget, CostTable

State = Literal["not started", "running", "interrupted", "finished"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def part_names(budgets: Sequence[Budget]) -> tuple[str, ...]:
    """What the budgets' parts of a work directory and of the output are called: a single one has no name."""
    return ("",) if len(budgets) == 1 else tuple(budget.name for budget in budgets)


class Effort(_Part):
    """What the search for one budget takes at most; a step that refines stands for `step_passes`."""

    search_steps: int
    refine_passes: int
    step_passes: int

    @classmethod
    def of(cls, search: Search, table: CostTable, budget: Budget) -> Self:
        smallest, largest = table.range
        # Where the budget leaves no choice there is no search.
        if search.method not in SEARCHES or not smallest < budget.bytes < largest:
            return cls(search_steps=0, refine_passes=0, step_passes=0)
        steps = search.search_steps
        if search.method == "evolution":
            steps = evolution_steps(steps, search.samples)
        passes = step_passes(search.samples, search.batch)
        return cls(search_steps=steps, refine_passes=search.races * passes, step_passes=passes)


class Run(_Part):
    """`run.json`: what a run is about. `recipe`, `search` and `costs` are digests, `options` those that are quantised.

    `layers` are MoE layers. `search_steps` and `refine_passes` (sequences run) are what the search takes at most for each of
    `budgets`, the names of their parts.
    """

    version: str
    model: str
    output: str
    recipe: str
    search: str
    costs: str
    seed: int
    layers: int
    options: tuple[str, ...]
    budgets: dict[str, Effort]

    @classmethod
    def of(cls, recipe: Recipe, table: CostTable, budgets: Sequence[Budget]) -> Self:
        return cls(
            version=__version__,
            model=recipe.model,
            output=recipe.output,
            recipe=recipe.digest(),
            search=recipe.search_digest(),
            costs=costs_digest(table),
            seed=recipe.search.seed,
            layers=len(table.layers),
            options=tuple(option.name for option in table.options if option.is_quantized),
            budgets={
                name: Effort.of(recipe.search, table, budget)
                for name, budget in zip(part_names(budgets), budgets, strict=True)
            },
        )

    def save(self, work: WorkDirectory) -> None:
        """Write it into a run's directory. Raises OutputError."""
        try:
            replace_text(work.run, json.dumps(self.model_dump(), indent=1) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {work.run}: {error}") from error

    @classmethod
    def load(cls, work: WorkDirectory) -> Self | None:
        """What the last run here noted; None if it came not so far, or was of another version."""
        try:
            return cls.model_validate_json(work.run.read_bytes())
        except (OSError, ValidationError):
            return None


class Stage(_Part):
    """`done` of `total` units are kept: a run that goes on does not do them again."""

    name: str
    done: int
    total: int


class Process(_Part):
    """The process that is running, or was until it was interrupted; `started` is ISO 8601 in UTC."""

    pid: int
    host: str
    started: str


class Result(_Part):
    """What a finished output is: bytes that its budget covers, and KL to the original in nats per token."""

    model: str
    budget: str
    budget_bytes: int
    expert_bytes: int
    total_bytes: int
    kl: float
    kl_stderr: float | None


class Status(_Part):
    """A run in `output`. `results` is what is there, which a run that is not finished is to replace: a model for every
    budget, the largest first. `result` is that of a single one.
    """

    output: str
    state: State
    process: Process | None = None
    run: Run | None = None
    stages: tuple[Stage, ...] = ()
    results: tuple[Result, ...] = ()

    @computed_field
    @property
    def result(self) -> Result | None:
        return self.results[0] if len(self.results) == 1 else None


def status(directory: str | Path) -> Status:
    """How far the run of an output directory, or of the `.work` directory beside it, is.

    Raises OutputError where the directory is neither, PlanError where its report is damaged.
    """
    # Also "." must have a name, to which the work directory's suffix can be added.
    path = Path(os.path.abspath(directory))
    work = WorkDirectory.of(path)
    if path.name.endswith(SUFFIX) and not any((path / name).exists() for name in (REPORT, CURVE)):
        work = WorkDirectory(path)
    output = work.output
    try:
        return _status(output, work)
    except OSError as error:
        raise OutputError(f"{directory} cannot be read: {error.strerror}") from error


def _status(output: Path, work: WorkDirectory) -> Status:
    results = _results(output)
    process = work.holder()
    running, process = process is not None, process or work.last_holder()
    if running or work.interrupted:
        run = Run.load(work)
        return Status(
            output=str(output),
            state="running" if running else "interrupted",
            process=None if process is None else Process(**vars(process)),
            run=run,
            stages=() if run is None else _stages(run, work),
            results=results,
        )
    if results:
        return Status(output=str(output), state="finished", results=results)
    for place in (output, work.path):
        unused = place.is_dir() and {path.name for path in place.iterdir()} <= {work.lock.name}
        if place.exists() and not unused:
            raise OutputError(
                f"{place} is neither what moe-rco prune wrote nor where it works; name a recipe's output"
            )
    return Status(output=str(output), state="not started")


def finished(part: Part, store: str, recipe: str) -> Report | None:
    """The report of a part's complete model, if it has one made from this store (its fingerprint) by this recipe (its digest).

    Raises PlanError where the report is damaged.
    """
    shards = _shards(part, store, recipe)
    return Report.load(part.checkpoint) if shards and (part.checkpoint / REPORT).exists() else None


def _shards(part: Part, store: str, recipe: str) -> dict[str, Any] | None:
    """The manifest of what was written for a part; None where there is none, or one of other inputs."""
    shards = read_manifest(part.shards)
    return shards if shards and shards["inputs"].startswith(f"{store} {recipe} ") else None


def _stages(run: Run, work: WorkDirectory) -> tuple[Stage, ...]:
    """What is kept, by the files that a run would go on from; what is done for each budget is added up."""
    store, options = listed(work.store)
    parts = [_part_done(work.part(name), store, run, effort) for name, effort in run.budgets.items()]
    efforts = run.budgets.values()
    steps, passes = sum(e.search_steps for e in efforts), sum(e.refine_passes for e in efforts)
    stages = [
        Stage(
            name="options quantised",
            done=sum(option in run.options for option in options),
            total=run.layers * len(run.options),
        ),
        Stage(
            name="effects measured",
            done=int(work.measured(store, run.costs, run.seed).load() is not None),
            total=1,
        ),
    ]
    if steps:
        stages.append(Stage(name="search steps", done=sum(part.steps for part in parts), total=steps))
    if passes:
        stages.append(Stage(name="refining passes", done=sum(part.passes for part in parts), total=passes))
    written = Stage(
        name="shards written",
        done=sum(part.shards for part in parts),
        total=sum(part.total for part in parts),
    )
    if len(parts) == 1:
        return (*stages, written)
    complete = sum(finished(work.part(name), store, run.recipe) is not None for name in run.budgets)
    return (*stages, written, Stage(name="budgets finished", done=complete, total=len(parts)))


@dataclass(frozen=True)
class _Done:
    """Of one budget: steps, passes and shards, and how many shards there are once that is known."""

    steps: int
    passes: int
    shards: int = 0
    total: int = 0


def _part_done(part: Part, store: str, run: Run, effort: Effort) -> _Done:
    shards = _shards(part, store, run.recipe)
    if shards is not None:
        return _Done(effort.search_steps, effort.refine_passes, len(shards["shards"]), shards["total"])
    state = part.search(store, run.search).load() or {}
    steps = len(state["found.history"]) if "found.history" in state else int(state.get("step", 0))
    passes = int(state.get("races.passes", 0)) + max(0, steps - effort.search_steps) * effort.step_passes
    if "races.best" in state:
        steps = effort.search_steps  # also where there were none
    return _Done(min(steps, effort.search_steps), min(passes, effort.refine_passes))


def _results(output: Path) -> tuple[Result, ...]:
    """Of every model in an output, the largest first."""
    if (output / REPORT).is_file():
        return (_result(Report.load(output)),)
    if not (output / CURVE).is_file():
        return ()
    return tuple(_result(Report.load(output / point.directory)) for point in Curve.load(output).points)


def _result(report: Report) -> Result:
    return Result(
        model=report.model,
        budget=report.budget.text,
        budget_bytes=report.bytes.budget,
        expert_bytes=report.bytes.experts_after,
        total_bytes=report.bytes.total,
        kl=report.kl,
        kl_stderr=report.kl_stderr,
    )
