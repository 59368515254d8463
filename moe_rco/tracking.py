"""Who follows a run: callbacks, and two that hand it on to TensorBoard and Weights & Biases by these libraries' own means.

They are told what happens and change nothing. Neither library is imported unless it is asked for.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from moe_rco.ckpt.writer import replace_text
from moe_rco.errors import UserError
from moe_rco.optim import StepRecord
from moe_rco.recipe import Recipe
from moe_rco.report import Report

Tracker = Literal["tensorboard", "wandb"]
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)
_PROJECT = "moe_rco"


class Callback:
    """What a run tells; every method does nothing until it is overridden. An error that one raises ends the run.

    `budget` is the directory of one of several budgets in the output, empty where there is only one.
    """

    def on_begin(self, recipe: Recipe, budgets: Sequence[str], work: Path) -> None:
        """All that can be checked has been, and the long work begins. `work` keeps what an interrupted run goes on from."""

    def on_step(self, budget: str, stage: str, record: StepRecord) -> None:
        """A step of the stage `search`, or of `races`, which count on. A run that goes on tells those from where it goes on."""

    def on_report(self, budget: str, report: Report) -> None:
        """A budget's model has been written and measured."""

    def on_end(self, failed: bool) -> None:
        """The run is over, and if it `failed`, or was interrupted, an exception is on its way."""


@contextmanager
def following(callbacks: Sequence[Callback]) -> Iterator[Callback]:
    """All callbacks as one, for the time of a run."""
    several, failed = _Several(callbacks), True
    try:
        yield several
        failed = False
    finally:
        several.on_end(failed)


def trackers(names: Sequence[str]) -> list[Callback]:
    """Callbacks by the names of their libraries (`TRACKERS`). Raises UserError where one is not installed."""
    kinds: dict[str, type[Callback]] = {"tensorboard": TensorBoard, "wandb": WandB}
    unknown = [name for name in names if name not in kinds]
    if unknown:
        raise UserError(f"nothing to report to is called '{unknown[0]}'; there are {', '.join(TRACKERS)}")
    return [kinds[name]() for name in dict.fromkeys(names)]


class _Several(Callback):
    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._all = tuple(callbacks)

    def on_begin(self, recipe: Recipe, budgets: Sequence[str], work: Path) -> None:
        for one in self._all:
            one.on_begin(recipe, budgets, work)

    def on_step(self, budget: str, stage: str, record: StepRecord) -> None:
        for one in self._all:
            one.on_step(budget, stage, record)

    def on_report(self, budget: str, report: Report) -> None:
        for one in self._all:
            one.on_report(budget, report)

    def on_end(self, failed: bool) -> None:
        for one in self._all:
            one.on_end(failed)


class TensorBoard(Callback):
    """Scalars in `<output>.tensorboard`, which `tensorboard --logdir` shows; a directory in it for each of several budgets.

    A run that goes on has the steps discarded that it makes again, and one from the beginning all there were.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._kind, self._writers = SummaryWriter, dict[str, SummaryWriter]()

    def on_begin(self, recipe: Recipe, budgets: Sequence[str], work: Path) -> None:
        self._place = Path(f"{recipe.output}.tensorboard")
        self._place.mkdir(parents=True, exist_ok=True)

    def on_step(self, budget: str, stage: str, record: StepRecord) -> None:
        # Written before the search's state is kept: what a killed run leaves has no gaps.
        self._add(budget, stage, _of_step(record), record.step)

    def on_report(self, budget: str, report: Report) -> None:
        self._add(budget, "result", _of_report(report), report.search.steps + 1)

    def on_end(self, failed: bool) -> None:
        for writer in self._writers.values():
            writer.close()

    def _add(self, budget: str, group: str, values: dict[str, float], step: int) -> None:
        if budget not in self._writers:
            self._writers[budget] = self._kind(str(self._place / budget), purge_step=step)
        for name, value in values.items():
            self._writers[budget].add_scalar(f"{group}/{name}", value, step)
        self._writers[budget].flush()


class WandB(Callback):
    """A run of Weights & Biases for every budget, in one group; its settings are the library's own (`WANDB_PROJECT`, ...).

    Its id, and the last step that it has for certain, are kept with the run's work: an interrupted run goes on in the same one.
    Of a process that is killed W&B keeps what it has sent; steps that are then made again it leaves out by itself.
    """

    def __init__(self) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        self._wandb, self._runs = wandb, dict[str, Any]()

    def on_begin(self, recipe: Recipe, budgets: Sequence[str], work: Path) -> None:
        wandb, self._kept = self._wandb, work / "wandb.json"
        self._search, self._told = recipe.search_digest(), dict[str, tuple[str, int]]()
        known = _read(self._kept, self._search)
        name = Path(recipe.output).name
        for budget in budgets:
            run_id, step = known.get(budget) or (secrets.token_hex(4), 0)
            self._told[budget] = (run_id, step)
            try:
                self._runs[budget] = wandb.init(
                    project=wandb.setup().settings.project or _PROJECT,
                    id=run_id,
                    resume="allow",
                    name=f"{name}/{budget}" if budget else name,
                    group=name if budget else None,
                    config=recipe.model_dump(mode="json", exclude={"output"}),
                    reinit="create_new",
                    settings=wandb.Settings(console="off", disable_git=True),
                )
            except wandb.Error as error:
                raise UserError(f"--report-to wandb: {error}") from error
        self._keep()

    def on_step(self, budget: str, stage: str, record: StepRecord) -> None:
        run_id, last = self._told[budget]
        if record.step > last:
            values = {f"{stage}/{name}": value for name, value in _of_step(record).items()}
            self._runs[budget].log(values, step=record.step)
            self._told[budget] = (run_id, record.step)

    def on_report(self, budget: str, report: Report) -> None:
        values = {f"result/{name}": value for name, value in _of_report(report).items()}
        self._runs[budget].summary.update(values)

    def on_end(self, failed: bool) -> None:
        for run in self._runs.values():
            run.finish(exit_code=int(failed))
        if failed and self._runs:
            self._keep()

    def _keep(self) -> None:
        replace_text(self._kept, json.dumps({"search": self._search, "runs": self._told}))


def _read(path: Path, search: str) -> dict[str, tuple[str, int]]:
    """By budget, the id and the last step of a run that is to go on; of none if it was of another search."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            budget: (str(kept[0]), int(kept[1]))
            for budget, kept in found["runs"].items()
            if found["search"] == search
        }
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return {}


def _missing(name: str) -> UserError:
    return UserError(f"--report-to {name}: {name} is not installed here; pip install 'moe_rco[{name}]'")


def _of_step(record: StepRecord) -> dict[str, float]:
    """What there is of a record: races have no logits, and most steps no look at the kept-out text."""
    values = {"loss": record.loss, "best": record.best, "evaluations": record.evaluations}
    if record.value is not None:
        values["kept_out"] = record.value
    if record.tau:
        values |= {"budget_error": record.budget_error, "temperature": record.tau, "entropy": record.entropy}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _of_report(report: Report) -> dict[str, float]:
    """The headline: losses and KL divergence in nats per token on held-out text, and sizes in bytes."""
    before, after = report.losses
    sizes = report.bytes
    return {
        "kl": report.kl, "loss_before": before, "loss_after": after, "expert_bytes": sizes.experts_after,
        "budget_bytes": sizes.budget, "total_bytes": sizes.total,
    }  # fmt: skip
