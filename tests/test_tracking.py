"""Callbacks, and what they hand to TensorBoard and W&B, with a run that is told by hand."""

from __future__ import annotations

import builtins
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.errors import UsageError

from moe_rco import cli, recipe
from moe_rco.errors import UserError
from moe_rco.optim import StepRecord
from moe_rco.recipe import Recipe
from moe_rco.tracking import TRACKERS, Callback, TensorBoard, WandB, following, trackers
from tests import wandb_log
from tests.conftest import MINIMAL
from tests.reports import report

REPORT = report()


def record(step: int, **changes: Any) -> StepRecord:
    values = {
        "loss": 1 / step,
        "budget_error": 1e-13,
        "tau": 0.5,
        "entropy": 0.25,
        "value": None,
        "best": math.inf,
    }
    return StepRecord(step=step, evaluations=4 * step, **{**values, **changes})


def race(step: int) -> StepRecord:
    return record(step, tau=0.0, best=1 / step)


@pytest.fixture
def asked(tmp_path: Path) -> Recipe:
    return recipe.parse(MINIMAL, overrides=[f"output={tmp_path / 'out'}"])


def scalars(place: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(place))
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def told(
    callback: Callback, asked: Recipe, work: Path, records: Sequence[StepRecord], budget: str = ""
) -> None:
    callback.on_begin(asked, [budget], work)
    for one in records:
        callback.on_step(budget, "search" if one.tau else "races", one)


def test_tensorboard_has_what_a_step_has(asked: Recipe, tmp_path: Path) -> None:
    board = TensorBoard()
    told(board, asked, tmp_path, [record(1), record(2, value=0.75, best=0.75), race(3)])
    board.on_report("", REPORT)
    board.on_end(False)
    assert scalars(tmp_path / "out.tensorboard") == {
        "search/loss": [(1, 1.0), (2, 0.5)],
        "search/budget_error": [(1, pytest.approx(1e-13)), (2, pytest.approx(1e-13))],
        "search/temperature": [(1, 0.5), (2, 0.5)],
        "search/entropy": [(1, 0.25), (2, 0.25)],
        "search/evaluations": [(1, 4.0), (2, 8.0)],
        "search/kept_out": [(2, 0.75)],
        "search/best": [(2, 0.75)],
        "races/loss": [(3, pytest.approx(1 / 3))],
        "races/best": [(3, pytest.approx(1 / 3))],
        "races/evaluations": [(3, 12.0)],
        **{
            f"result/{name}": [(REPORT.search.steps + 1, pytest.approx(value))]
            for name, value in {
                "kl": REPORT.kl, "loss_before": 2.0, "loss_after": 2.0625, "expert_bytes": 999_000,
                "budget_bytes": 1_000_000, "total_bytes": 1_499_000,
            }.items()
        },
    }  # fmt: skip


def test_tensorboard_has_no_step_twice_of_a_run_that_was_killed(asked: Recipe, tmp_path: Path) -> None:
    """The first is never told of its end; what had been kept of it was step 3."""
    told(TensorBoard(), asked, tmp_path, [record(step) for step in range(1, 6)])
    second = TensorBoard()
    told(second, asked, tmp_path, [record(step, loss=7.0) for step in range(4, 8)])
    second.on_end(False)
    found = scalars(tmp_path / "out.tensorboard")["search/loss"]
    assert [step for step, _ in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [value for _, value in found[3:]] == [7.0] * 4


def test_each_of_several_budgets_has_a_directory(asked: Recipe, tmp_path: Path) -> None:
    board = TensorBoard()
    board.on_begin(asked, ["50pct", "30pct"], tmp_path)
    for budget, loss in (("50pct", 0.5), ("30pct", 1.5)):
        board.on_step(budget, "search", record(1, loss=loss))
    board.on_end(False)
    for budget, loss in (("50pct", 0.5), ("30pct", 1.5)):
        assert scalars(tmp_path / "out.tensorboard" / budget)["search/loss"] == [(1, loss)]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield tmp_path
    wandb.teardown()  # it reads the environment once


def test_wandb_goes_on_in_the_same_run(asked: Recipe, offline: Path) -> None:
    first = WandB()
    told(first, asked, offline, [record(1), record(2)])
    first.on_end(True)
    second = WandB()
    told(second, asked, offline, [record(2), record(3), race(4)])
    second.on_report("", REPORT)
    second.on_end(False)
    found = wandb_log.read(offline)
    assert [step for step, _ in found.rows] == [1, 2, 3, 4]
    assert found.rows[0][1] == {
        "search/loss": 1.0, "search/budget_error": 1e-13, "search/temperature": 0.5, "search/entropy": 0.25,
        "search/evaluations": 4,
    }  # fmt: skip
    assert found.rows[3][1] == {"races/loss": 0.25, "races/best": 0.25, "races/evaluations": 16}
    assert found.summary["result/kl"] == REPORT.kl
    assert len(found.ids) == 1
    assert "output" not in found.config


def test_wandb_begins_anew_for_another_search(asked: Recipe, offline: Path) -> None:
    other = recipe.parse(MINIMAL, overrides=[f"output={offline / 'out'}", "search.steps=5"])
    for one, failed in ((asked, True), (other, False)):
        callback = WandB()
        told(callback, one, offline, [record(1)])
        callback.on_end(failed)
    found = wandb_log.read(offline)
    assert len(found.ids) == 2
    assert [step for step, _ in found.rows] == [1, 1]


def test_who_is_not_known_to_wandb_is_told_so_at_once(
    asked: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"^--report-to wandb: No API key configured\. Use `wandb login`"):
        WandB().on_begin(asked, [""], tmp_path)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_library_that_is_missing_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(module: str, *rest: Any, **more: Any) -> Any:
        if module.split(".")[0] == name or module == "torch.utils.tensorboard":
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real(module, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"^--report-to {name}: .*; pip install 'moe_rco\[{name}\]'$"):
        trackers([name])


def test_the_command_line_knows_them_all() -> None:
    (option,) = (one for one in cli.app.commands["prune"].params if one.name == "report_to")
    assert isinstance(option.type, click.Choice)
    assert tuple(option.type.choices) == TRACKERS
    assert [type(one).__name__ for one in trackers(TRACKERS)] == ["TensorBoard", "WandB"]
    with pytest.raises(UserError, match="'mlflow'; there are tensorboard, wandb"):
        trackers(["mlflow"])


def test_a_callback_hears_of_the_end_whatever_happened() -> None:
    heard = list[bool]()

    class Ends(Callback):
        def on_end(self, failed: bool) -> None:
            heard.append(failed)

    with following([Ends()]):
        pass
    with pytest.raises(SystemExit), following([Ends(), Ends()]):
        sys.exit(130)
    assert heard == [False, True, True]
