"""Scores beside the run they belong to: what names a cached result, and how scores come into the report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from moe_rco.recipe import DEMO_MODEL
from moe_rco.report import FILE_NAME, Report
from moe_rco.scoring import is_demo
from moe_rco.scoring.evaluation import _key
from moe_rco.scoring.settings import make_settings
from moe_rco.scoring.worker import without_secrets
from tests.reports import report, score


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": ["mine", "demo"]},
        {"limit": 3},
        {"num_fewshot": 3},
        {"batch_size": 3},
        {"backend": "vllm"},
        {"model_args": ["dtype=float64"]},
        {"allow_code": True},
    ],
)
def test_a_cached_result_is_of_these_settings(changes: dict[str, Any], own_tasks: Path) -> None:
    given: dict[str, Any] = {"backend": "hf", "tasks": ["mine"], "include_paths": [str(own_tasks)]}
    settings, others = make_settings(**given), make_settings(**{**given, **changes})
    assert _key("a", settings) == _key("a", make_settings(**given))
    assert _key("a", settings) != _key("a", others)


def test_a_cached_result_is_of_this_model_and_these_task_files(own_tasks: Path) -> None:
    settings = make_settings("hf", ["mine"], include_paths=[str(own_tasks)])
    key = _key("a", settings)
    assert key != _key("b", settings)
    path = own_tasks / "mine.yaml"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert key != _key("a", settings)
    (own_tasks / "more.jsonl").write_text("{}\n")
    assert len({key, _key("b", settings), _key("a", settings)}) == 3


def test_scores_accumulate_in_the_report_and_later_ones_replace_earlier(tmp_path: Path) -> None:
    first = report().with_scores([score("b"), score("a"), score("a", "acc_norm")])
    second = first.with_scores([score("a", score=0.5), score("a", limit=3), score("a", backend="vllm")])
    assert [
        (score.task, score.metric, score.backend, score.limit, score.score) for score in second.scores
    ] == [
        ("a", "acc", "hf", None, 0.5),
        ("a", "acc", "hf", 3, 0.65),
        ("a", "acc_norm", "hf", None, 0.65),
        ("b", "acc", "hf", None, 0.65),
        ("a", "acc", "vllm", None, 0.65),
    ]
    second.save(tmp_path)
    assert Report.load(tmp_path).model_copy(update={"digest": ""}) == second
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_report_of_before_has_no_scores() -> None:
    data = report().model_dump()
    del data["scores"]
    assert Report.model_validate(data).scores == ()


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report().save(tmp_path)
    before = (tmp_path / FILE_NAME).read_bytes()

    def fails(source: Path, target: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr("moe_rco.report.os.replace", fails)
    with pytest.raises(OSError, match="no"):
        report().with_scores([score("a")]).save(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_the_demo_is_known_by_place_and_by_report(tmp_path: Path) -> None:
    assert is_demo(str(DEMO_MODEL))
    assert not is_demo(str(tmp_path))
    report(model="/models/other").save(tmp_path)
    assert not is_demo(str(tmp_path))
    report(model="demo").save(tmp_path)
    assert is_demo(str(tmp_path))


def test_secrets_are_not_written_down() -> None:
    given = {
        "pretrained": "m",
        "token": "hf_x",
        "api_key": "y",
        "hf_token": "z",
        "dtype": "float32",
        "tokenizer": "t",
    }
    blotted = {"token": "***", "api_key": "***", "hf_token": "***"}
    assert without_secrets(given) == given | blotted
