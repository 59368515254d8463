"""How far a run is: what it notes when it starts, and what its files tell, whether or not it is running."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_rco._version import __version__
from moe_rco.calib.search import SEARCHES
from moe_rco.ckpt.shards import read_manifest
from moe_rco.ckpt.store import listed
from moe_rco.ckpt.workdir import SUFFIX, WorkDirectory
from moe_rco.ckpt.writer import replace_text
from moe_rco.errors import OutputError
from moe_rco.optim.solve import BACKWARD, evolution_steps
from moe_rco.plan import costs_digest
from moe_rco.recipe import Recipe
from moe_rco.report import FILE_NAME as REPORT
from moe_rco.report import Report
from moe_rco.types import Budget, CostTable

State = Literal["not started", "running", "interrupted", "finished"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Run(_Part):
    """`run.json`: what a run is about. `recipe` and `costs` are digests, `options` those that are quantised.

    `layers` are MoE layers. `search_steps` and `race_passes` (sequences run) are what the search takes at most.
    """

    version: str
    model: str
    output: str
    recipe: str
    costs: str
    seed: int
    layers: int
    options: tuple[str, ...]
    search_steps: int
    race_passes: int

    @classmethod
    def of(cls, recipe: Recipe, table: CostTable, budget: Budget) -> Self:
        search, (smallest, largest) = recipe.search, table.range
        steps = passes = 0
        # Where the budget leaves no choice there is no search.
        if search.method in SEARCHES and smallest < budget.bytes < largest:
            steps = search.search_steps
            if search.method == "evolution":
                steps = evolution_steps(steps, search.samples)
            passes = search.races * search.samples * (1 + BACKWARD) * search.batch
        return cls(
            version=__version__,
            model=recipe.model,
            output=recipe.output,
            recipe=recipe.digest(),
            costs=costs_digest(table),
            seed=search.seed,
            layers=len(table.layers),
            options=tuple(option.name for option in table.options if option.is_quantized),
            search_steps=steps,
            race_passes=passes,
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
    """What a finished output is: bytes of its routed experts, and KL to the original in nats per token."""

    model: str
    budget: str
    budget_bytes: int
    expert_bytes: int
    total_bytes: int
    kl: float
    kl_stderr: float


class Status(_Part):
    """A run in `output`. `result` is what is there, which a run that is not finished is to replace."""

    output: str
    state: State
    process: Process | None = None
    run: Run | None = None
    stages: tuple[Stage, ...] = ()
    result: Result | None = None


def status(directory: str | Path) -> Status:
    """How far the run of an output directory, or of the `.work` directory beside it, is.

    Raises OutputError where the directory is neither, PlanError where its report is damaged.
    """
    # Also "." must have a name, to which the work directory's suffix can be added.
    path = Path(os.path.abspath(directory))
    work = WorkDirectory.of(path)
    if path.name.endswith(SUFFIX) and not (path / REPORT).exists():
        work = WorkDirectory(path)
    output = work.output
    try:
        return _status(output, work)
    except OSError as error:
        raise OutputError(f"{directory} cannot be read: {error.strerror}") from error


def _status(output: Path, work: WorkDirectory) -> Status:
    result = _result(output)
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
            result=result,
        )
    if result is not None:
        return Status(output=str(output), state="finished", result=result)
    for place in (output, work.path):
        unused = place.is_dir() and {path.name for path in place.iterdir()} <= {work.lock.name}
        if place.exists() and not unused:
            raise OutputError(
                f"{place} is neither what moe-rco prune wrote nor where it works; name a recipe's output"
            )
    return Status(output=str(output), state="not started")


def _stages(run: Run, work: WorkDirectory) -> tuple[Stage, ...]:
    """What is kept, by the files that a run would go on from."""
    store, options = listed(work.store)
    search = work.search(store, run.recipe)
    state = search.load() or {}
    steps, passes = int(state.get("step", 0)), int(state.get("races.passes", 0))
    if "races.best" in state:
        steps = run.search_steps
    shards = read_manifest(work.shards)
    if shards is not None and not shards["inputs"].startswith(search.fingerprint):
        shards = None
    if shards is not None:
        steps, passes = run.search_steps, run.race_passes
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
    if run.search_steps:
        stages.append(Stage(name="search steps", done=min(steps, run.search_steps), total=run.search_steps))
    if run.race_passes:
        stages.append(Stage(name="race passes", done=min(passes, run.race_passes), total=run.race_passes))
    done, total = (0, 0) if shards is None else (len(shards["shards"]), shards["total"])
    return (*stages, Stage(name="shards written", done=done, total=total))


def _result(output: Path) -> Result | None:
    if not (output / REPORT).is_file():
        return None
    report = Report.load(output)
    return Result(
        model=report.model,
        budget=report.budget.text,
        budget_bytes=report.bytes.budget,
        expert_bytes=report.bytes.experts_after,
        total_bytes=report.bytes.total,
        kl=report.kl,
        kl_stderr=report.kl_stderr,
    )
