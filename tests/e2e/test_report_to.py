"""A run that is logged: TensorBoard and W&B have the report's history, each step once, and it ends as any other run does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moe_rco
from moe_rco import cli, progress, tracking
from moe_rco.ckpt.rewrite import rewrite
from moe_rco.ckpt.workdir import WorkDirectory
from moe_rco.optim import StepRecord
from moe_rco.recipe import Recipe
from moe_rco.report import Report, SearchStep
from tests import wandb_log
from tests.documents import ROOT, blocks
from tests.killing import written
from tests.running import SHARD_BYTES, Started, starting
from tests.tiny_job import save_job

pytestmark = pytest.mark.slow
STEPS, ENOUGH = 8, 3


class Heard(moe_rco.Callback):
    """All that a callback is told."""

    def __init__(self) -> None:
        self.begun, self.steps, self.ended = (
            list[tuple[str, ...]](),
            list[tuple[str, StepRecord]](),
            list[bool](),
        )
        self.reports = list[Report]()

    def on_begin(self, recipe: Recipe, budgets: Sequence[str], work: Path) -> None:
        self.begun.append(tuple(budgets))

    def on_step(self, budget: str, stage: str, record: StepRecord) -> None:
        self.steps.append((stage, record))

    def on_report(self, budget: str, report: Report) -> None:
        self.reports.append(report)

    def on_end(self, failed: bool) -> None:
        self.ended.append(failed)


def offline(place: Path) -> None:
    os.environ.update({"WANDB_MODE": "offline", "WANDB_DIR": str(place), "WANDB_SILENT": "true"})


def searched(work: WorkDirectory) -> int:
    if not (work.path / "measured.safetensors").exists():
        return 0
    return next(stage.done for stage in progress.status(work.path).stages if stage.name == "search steps")


def interrupted(run: Started) -> None:
    """Ctrl-C in the middle of the search."""
    work, deadline = WorkDirectory.of(run.place / "out"), time.monotonic() + 100
    while searched(work) < ENOUGH and run.process.is_alive():
        assert time.monotonic() < deadline, run.log
        time.sleep(0.001)
    run.send(signal.SIGINT)
    assert run.ends() == 130, run.log


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_job(tmp_path_factory.mktemp("logged"), steps=STEPS, refine=8)


@pytest.fixture(scope="module")
def logged(job: Path) -> Path:
    """Where a run that was interrupted has gone on and finished."""
    place = job.parent / "place"
    words = ("--recipe", str(job), "--report-to", "tensorboard", "--report-to", "wandb")
    with starting("moe_rco.tracking", "torch.utils.tensorboard", "wandb") as start:
        interrupted(start(place, *words, before=partial(offline, place)))
        again = start(place, *words, before=partial(offline, place))
        assert again.ends() == 0, again.log
    return place


@pytest.fixture(scope="module")
def history(logged: Path) -> tuple[SearchStep, ...]:
    history = Report.load(logged / "out").search.history
    assert [step.step for step in history] == list(range(1, len(history) + 1))
    assert len(history) > STEPS  # races, too
    return history


def test_tensorboard_has_each_step_of_the_report_once(logged: Path, history: tuple[SearchStep, ...]) -> None:
    found, report = EventAccumulator(str(logged / "out.tensorboard")), Report.load(logged / "out")
    found.Reload()
    events = [*found.Scalars("search/loss"), *found.Scalars("races/loss")]
    assert [(e.step, e.value) for e in events] == [(s.step, pytest.approx(s.kl, 1e-6)) for s in history]
    for tag, name in (
        ("temperature", "temperature"),
        ("entropy", "entropy"),
        ("budget_error", "budget_error"),
    ):
        values = [(e.step, e.value) for e in found.Scalars(f"search/{tag}")]
        assert values == [(s.step, pytest.approx(getattr(s, name), 1e-6)) for s in history[:STEPS]]
    (kl,) = found.Scalars("result/kl")
    assert (kl.step, kl.value) == (len(history) + 1, pytest.approx(report.kl, 1e-6))


def test_wandb_has_each_step_of_the_report_once(logged: Path, history: tuple[SearchStep, ...]) -> None:
    found, report = wandb_log.read(logged), Report.load(logged / "out")
    assert len(list((logged / "wandb").glob("offline-run-*"))) == 2
    assert len(found.ids) == 1
    losses = [(step, row.get("search/loss", row.get("races/loss"))) for step, row in found.rows]
    assert losses == [(step.step, step.kl) for step in history]
    assert [row.get("search/entropy") for _, row in found.rows] == [step.entropy for step in history]
    assert found.summary["result/kl"] == report.kl
    assert found.summary["result/expert_bytes"] == report.bytes.experts_after
    assert found.config["budget"]["ratio"] == 0.17


def test_who_follows_changes_nothing(
    job: Path,
    logged: Path,
    history: tuple[SearchStep, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The page's run in Python, with callbacks of one's own, against the one above."""
    (job.parent / "again").mkdir()
    monkeypatch.chdir(job.parent / "again")
    defaults: Any = rewrite.__kwdefaults__
    monkeypatch.setitem(defaults, "shard_bytes", SHARD_BYTES)
    monkeypatch.setattr("moe_rco.pipeline.stage_times", lambda *_: {})  # its measurement takes seconds
    heard, prune, load = Heard(), moe_rco.prune, moe_rco.load_recipe
    monkeypatch.setattr(moe_rco, "load_recipe", lambda *_: load(job))
    monkeypatch.setattr(
        moe_rco, "prune", lambda recipe, callbacks: prune(recipe, callbacks=[heard, *callbacks])
    )
    (block,) = blocks((ROOT / "docs" / "publishing.md").read_text(encoding="utf-8"), "python")
    exec(compile(block, "publishing.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert written(Path("out")) == written(logged / "out")
    assert [(record.step, record.loss) for _, record in heard.steps] == [(s.step, s.kl) for s in history]
    assert [stage for stage, _ in heard.steps] == ["search"] * STEPS + ["races"] * (len(history) - STEPS)
    assert (heard.begun, heard.ended) == ([("",)], [False])
    assert [report.own_digest for report in heard.reports] == [Report.load(Path("out")).digest]
    assert printed == [f"{stage} {record.step} {record.loss}" for stage, record in heard.steps]
    assert sorted(os.listdir()) == ["out", "out.tensorboard"]


def test_a_missing_library_is_told_before_the_work(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(names: Sequence[str]) -> None:
        raise tracking._missing(names[0])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "trackers", missing)
    result = CliRunner().invoke(cli.app, ["prune", "--recipe", str(job), "--report-to", "wandb"])
    assert result.exit_code == 2
    assert result.stderr == (
        "error: --report-to wandb: wandb is not installed here; pip install 'moe_rco[wandb]'\n"
    )
    assert not list(tmp_path.iterdir())
