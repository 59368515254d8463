"""The short measurement: it foretells every stage of a run, whatever the recipe, and leaves nothing behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from moe_rco import recipe as recipes
from moe_rco.checks import make_ready
from moe_rco.ckpt.header import read_header
from moe_rco.errors import ModelError
from moe_rco.forecast import stage_times
from moe_rco.pipeline import prune
from moe_rco.trial import Cost
from moe_rco.types import Silent
from tests.tiny_job import save_job


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return save_job(tmp_path, steps=4, refine=2)


def elsewhere(job: Path) -> list[str]:
    return [f"output={job.parent / 'out'}"]


def test_a_cost_is_of_calls_and_tokens_in_every_layer_and_of_tokens_outside() -> None:
    assert Cost(call=2.0, token=0.5, outside=0.25).of(layers=3, tokens=8, calls=4) == 3 * (8 + 4) + 2


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["execution.mode=streaming"],
        ["quantizer.method=rtn", "search.refine=0"],
        ["options=[prune,bf16]", "budget.ratio=0.5", "search.method=evolution"],
        ["layout=stock", "options=[prune,int4-g64]", "search.method=frequency"],
    ],
)
def test_every_stage_of_a_run_was_foretold(
    job: Path, tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    report = prune(recipes.load(str(job), [f"output={tmp_path / 'out'}", *settings]))
    assert not list((tmp_path / "temporary").iterdir())
    predicted = {stage.name: stage.predicted for stage in report.stages}
    assert predicted.pop("measure how fast it goes") is None
    assert {"calibrate and quantise", "judge the candidates", "write the model"} <= set(predicted)
    for name, seconds in predicted.items():
        assert seconds is not None, name
        assert seconds >= 0, name


def test_what_is_foretold_grows_with_the_work(job: Path) -> None:
    """Far beyond what a busy machine adds: a hundred times the steps, on the same text."""
    few, many = (
        stage_times(
            make_ready(recipes.load(str(job), [f"search.steps={steps}", "search.refine=0", *elsewhere(job)])),
            Silent(),
        )
        for steps in (2, 200)
    )
    assert many["search"] > 10 * few["search"]
    assert "refine" in few
    assert few["refine"] == 0


def test_a_weight_that_is_not_finite_is_told_by_name(job: Path) -> None:
    model = job.parent / "model"
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    found = next(
        tensors[name] for path in model.glob("*.safetensors") if name in (tensors := read_header(path))
    )
    with found.file.open("r+b") as file:
        file.seek(found.offset)
        file.write(b"\xff" * 8)
    with pytest.raises(ModelError, match=r"experts.0.up_proj"):
        stage_times(make_ready(recipes.load(str(job), elsewhere(job))), Silent())
