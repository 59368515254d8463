"""How far a run is said to be, from files made by hand; and that its totals are those it really has."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from moe_rco import progress
from moe_rco.ckpt.shards import ShardManifest
from moe_rco.ckpt.store import Store
from moe_rco.ckpt.workdir import WorkDirectory
from moe_rco.curve import Curve
from moe_rco.errors import OutputError, PlanError
from moe_rco.pipeline import prune
from moe_rco.progress import Effort, Run, status
from moe_rco.recipe import load
from moe_rco.types import Option
from tests.calibrated import Totals
from tests.reports import report

RUN = Run(
    version="0.1.0",
    model="demo",
    output="out",
    recipe="r",
    search="s",
    costs="c",
    seed=0,
    layers=3,
    options=("int4-g64", "int8-g64"),
    budgets={"": Effort(search_steps=40, refine_passes=960, step_passes=24)},
)


@pytest.fixture
def work(tmp_path: Path) -> WorkDirectory:
    """Of a run that was interrupted before it had done anything."""
    work = WorkDirectory.of(tmp_path / "out")
    work.path.mkdir()
    work.lock.write_text(json.dumps({"pid": 7, "host": "elsewhere", "started": "2026-01-01T00:00:00+00:00"}))
    RUN.save(work)
    return work


def stages(work: WorkDirectory) -> dict[str, tuple[int, int]]:
    found = status(work.output)
    assert found == status(work.path)
    return {stage.name: (stage.done, stage.total) for stage in found.stages}


def test_the_stages_one_after_the_other(work: WorkDirectory) -> None:
    expected = {
        "options quantised": (0, 6),
        "effects measured": (0, 1),
        "search steps": (0, 40),
        "refining passes": (0, 960),
        "shards written": (0, 0),
    }
    assert stages(work) == expected

    store = Store(work.store, "f")
    for option in ("int4-g64", "int8-g64", "int2-g64"):  # the last one for an earlier recipe
        store.write(1, Option.parse(option), {"x": torch.zeros(1)})
    expected["options quantised"] = (2, 6)
    assert stages(work) == expected

    work.measured("f", "c", 0).save({"effects": torch.zeros(1)})
    expected["effects measured"] = (1, 1)
    assert stages(work) == expected

    search = work.part().search("f", "s")
    search.save({"step": 30})
    expected["search steps"] = (30, 40)
    assert stages(work) == expected

    search.save({"step": 46})  # six in place of races
    expected |= {"search steps": (40, 40), "refining passes": (144, 960)}
    assert stages(work) == expected

    search.save({"races.best": torch.zeros(1), "races.passes": 96, "found.history": torch.zeros(46, 8)})
    expected["refining passes"] = (240, 960)
    assert stages(work) == expected

    manifest = ShardManifest(work.part().shards, "f r more")
    manifest.begin(5)
    manifest.add("model-00001-of-00005.safetensors", "0")
    expected |= {"refining passes": (960, 960), "shards written": (1, 5)}
    assert stages(work) == expected


def test_what_belongs_to_another_recipe_does_not_count(work: WorkDirectory) -> None:
    Store(work.store, "f")
    work.measured("f", "other", 0).save({"effects": torch.zeros(1)})
    work.part().search("f", "other").save({"step": 30})
    ShardManifest(work.part().shards, "f other more").begin(5)
    assert {done for done, _ in stages(work).values()} == {0}


def test_the_states(work: WorkDirectory) -> None:
    found = status(work.output)
    assert found.state == "interrupted"
    assert found.process is not None
    assert (found.process.pid, found.process.host) == (7, "elsewhere")
    assert found.run == RUN
    with work.locked():
        found = status(work.output)
        assert found.state == "running"
        assert found.process is not None
        assert found.process.pid == os.getpid()
        work.clear()
    assert status(work.output).state == "not started"
    work.output.mkdir()
    report().save(work.output)
    for place in (work.output, work.path):
        found = status(place)
        assert found.state == "finished"
        assert found.result is not None
        assert (found.result.expert_bytes, found.result.kl) == (999_000, 0.0625)


def test_from_within(work: WorkDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (work.output, work.path):
        place.mkdir(exist_ok=True)
        monkeypatch.chdir(place)
        assert status(".").state == "interrupted"


def test_a_run_that_replaces_a_finished_output(work: WorkDirectory) -> None:
    work.output.mkdir()
    report().save(work.output)
    found = status(work.output)
    assert found.state == "interrupted"
    assert found.result is not None


def test_killed_when_all_was_done(work: WorkDirectory) -> None:
    work.output.mkdir()
    report().save(work.output)
    work.will_publish()
    assert status(work.output).state == "finished"


@pytest.mark.parametrize("text", ["", "[]", '{"version": "9"}'])
def test_a_run_noted_by_another_version(work: WorkDirectory, text: str) -> None:
    work.run.write_text(text)
    found = status(work.output)
    assert (found.state, found.run, found.stages) == ("interrupted", None, ())


@pytest.mark.parametrize("name", ["out", "out.work"])
def test_what_is_neither_an_output_nor_a_work_directory(tmp_path: Path, name: str) -> None:
    assert status(tmp_path / name).state == "not started"
    (tmp_path / name).mkdir()
    assert status(tmp_path / name).state == "not started"
    (tmp_path / name / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="neither"):
        status(tmp_path / name)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="neither"):
        status(tmp_path / "out")
    with pytest.raises(OutputError, match="cannot be read"):
        status(tmp_path / "out" / "x")


def test_a_damaged_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(PlanError, match=r"report\.json"):
        status(tmp_path)


@pytest.mark.parametrize(
    ("method", "ratio"), [("rco", 0.25), ("rco", 1), ("evolution", 0.25), ("fisher", 0.25)]
)
def test_the_totals_are_those_of_the_run(
    method: str, ratio: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(__file__).resolve().parents[1] / "eval" / "models" / "mixtral"
    text = tmp_path / "text.txt"
    text.write_text("Some words to read, and a few more of them. " * 400)
    settings = (
        f"model={model}", f"calibration.data={text}", "calibration.sequences=8", "calibration.sequence_length=32",
        "options=[prune, int4-g64, bf16]", "search.steps=3", "search.refine=2", "search.samples=2",
        "search.batch=2", "quantizer.method=rtn", f"search.method={method}", f"budget.ratio={ratio}",
        f"output={tmp_path / 'out'}",
    )  # fmt: skip
    noted: list[Run] = []
    save = Run.save
    monkeypatch.setattr(progress.Run, "save", lambda run, work: noted.append(run) or save(run, work))
    totals = Totals()
    prune(load("demo", settings), progress=totals)
    (run,) = noted
    (effort,) = run.budgets.values()
    assert effort.search_steps == totals.seen.get("search", 0)
    assert effort.refine_passes == totals.seen.get("refine", 0)
    assert run.layers == 4
    assert run.options == ("int4-g64",)


def test_several_budgets_are_added_up(work: WorkDirectory) -> None:
    efforts = {
        "50pct": Effort(search_steps=40, refine_passes=960, step_passes=24),
        "25pct": Effort(search_steps=40, refine_passes=0, step_passes=24),
    }
    RUN.model_copy(update={"budgets": efforts}).save(work)
    Store(work.store, "f")
    first, second = work.part("50pct"), work.part("25pct")
    for part in (first, second):
        part.directory.mkdir()
        part.checkpoint.mkdir(parents=True)
    ShardManifest(first.shards, "f r more").begin(3)
    second.search("f", "s").save({"step": 30})
    assert stages(work)["search steps"] == (70, 80)
    assert stages(work)["refining passes"] == (960, 960)
    assert stages(work)["shards written"] == (0, 3)
    assert stages(work)["budgets finished"] == (0, 2)
    report().save(first.checkpoint)
    report().save(second.checkpoint)  # of another recipe: there is no manifest
    assert stages(work)["budgets finished"] == (1, 2)


def test_a_finished_curve(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        report().save(tmp_path / name)
    Curve.of(("a", "b"), (report(), report())).save(tmp_path)
    found = status(tmp_path)
    assert (found.state, found.result, len(found.results)) == ("finished", None, 2)
