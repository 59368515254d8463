"""The catalogue of errors: the page is that of the classes, and every kind is met on the command line that a user types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from moe_rco import cli, pipeline
from moe_rco.ckpt.workdir import WorkDirectory
from moe_rco.errors import (
    BudgetError,
    DataError,
    FileError,
    HubError,
    LockError,
    MemoryShortageError,
    ModelError,
    MoeRcoError,
    OutputError,
    PlanError,
    RecipeError,
    ScoringError,
    StoreError,
    TeamError,
    UserError,
    catalogue,
)
from tests.tiny_job import save_job

Typed = list[str]
Raised = Callable[[Typed], tuple[BaseException, int, str]]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = save_job(tmp_path, steps=0, refine=0)
    monkeypatch.chdir(tmp_path)
    return path


def prune(*settings: str) -> Typed:
    return [
        "prune",
        "--recipe",
        "recipe.yaml",
        *(part for setting in settings for part in ("--set", setting)),
    ]


def damaged_report(place: Path) -> Typed:
    (place / "done").mkdir()
    (place / "done" / "report.json").write_text("{}")
    return ["status", "done"]


def foreign_store(place: Path) -> Typed:
    store = WorkDirectory.of(place / "out").store
    store.mkdir(parents=True)
    (store / "index.json").write_text(json.dumps({"version": 0, "files": {}, "stats": {}}))
    return prune()


def wrong_logits(place: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """A disk or a memory that changes what is written cannot be had here: the tolerance is made impossible instead."""
    import torch

    monkeypatch.setitem(pipeline.reload.__globals__["RELOAD_TOLERANCE"], torch.float32, -1.0)
    return prune()


SIMPLE: dict[type[MoeRcoError], Callable[[Path], Typed]] = {
    UserError: lambda place: prune("execution.memory_limit=100MiB"),
    RecipeError: lambda place: prune("serach.steps=3"),
    ModelError: lambda place: prune("model=nowhere"),
    BudgetError: lambda place: prune("budget.bytes=12"),
    DataError: lambda place: prune("calibration.data=missing.jsonl"),
    OutputError: lambda place: prune("output=model"),
    HubError: lambda place: ["push", "model", "no/such/name"],
    ScoringError: lambda place: ["eval", "model", "--output", "scores", "--tasks", "no_such_task"],
    StoreError: foreign_store,
    PlanError: damaged_report,
}


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> Raised:
    """Runs a command, and gives the error it ended with, its exit code and what stood on the screen."""
    told, one_line = list[BaseException](), cli._one_line
    monkeypatch.setattr(cli, "_one_line", lambda error: told.append(error) or one_line(error))

    def run(typed: Typed) -> tuple[BaseException, int, str]:
        result = CliRunner().invoke(cli.app, typed)
        error = told[-1] if told else result.exception
        assert error is not None, result.output
        return error, result.exit_code, result.stderr

    return run


def test_every_kind_has_a_cause_and_a_remedy_of_its_own() -> None:
    for kind in catalogue():
        assert kind.__doc__, kind
        assert "remedy" in vars(kind), kind
    assert len({kind.remedy for kind in catalogue()}) == len(catalogue())


def test_every_kind_is_met_below() -> None:
    # A lost process needs two: tests/e2e/test_team.py. What the system refuses: tests/e2e/test_faults_runs.py.
    elsewhere = {TeamError, FileError, MemoryShortageError}
    assert {*SIMPLE, MoeRcoError, LockError, *elsewhere} == set(catalogue())


@pytest.mark.parametrize("kind", SIMPLE, ids=lambda kind: kind.__name__)
def test_a_user_s_mistake(kind: type[MoeRcoError], job: Path, raised: Raised) -> None:
    error, code, screen = raised(SIMPLE[kind](job.parent))
    assert type(error) is kind
    assert code == kind.exit_code == 2
    assert screen.splitlines()[-1] == f"error: {' '.join(str(error).split())}"


def test_another_process_at_work(job: Path, raised: Raised) -> None:
    with WorkDirectory.of(job.parent / "out").locked():
        error, code, screen = raised(prune())
    assert type(error) is LockError
    assert (code, screen.count("error: ")) == (2, 1)


def test_what_is_nobody_s_mistake(job: Path, monkeypatch: pytest.MonkeyPatch, raised: Raised) -> None:
    error, code, _ = raised(wrong_logits(job.parent, monkeypatch))
    assert type(error) is MoeRcoError
    assert code == error.exit_code == 1
    assert not (job.parent / "out").exists()
