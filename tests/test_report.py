"""The report: what it says about itself must agree, and it survives the disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moe_rco.errors import PlanError
from moe_rco.report import FILE_NAME, Report
from tests.reports import report, report_data


def test_round_trip_is_sorted_and_the_same_text_each_time(tmp_path: Path) -> None:
    report().save(tmp_path)
    text = (tmp_path / FILE_NAME).read_text()
    assert Report.load(tmp_path).model_copy(update={"digest": ""}) == report()
    assert Report.load(tmp_path).to_json() == text
    keys = [line.split('"')[1] for line in text.splitlines() if line.startswith('  "')]
    assert keys == sorted(keys)


def test_a_consistent_report_passes() -> None:
    report().check()


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("bytes", "experts_after"), 998_999, "slack"),
        (("bytes", "slack"), 999, "slack"),
        (("bytes", "total"), 1, "total bytes"),
        (("bytes", "budget"), 2_000_000, "budget in bytes"),
        (("budget", "bytes"), 999_999, "budget in bytes"),
        (("winner",), "fisher seed", "the plan's cost"),
        (("winner",), "nobody", "the plan's cost"),
        (("counts", "prune"), 5, "counts per option"),
        (("layers", 1, "options", 0), "prune", "counts per option"),
    ],
)
def test_a_contradiction_is_refused(path: tuple[Any, ...], value: Any, complaint: str) -> None:
    data = copy.deepcopy(report_data())
    inner: Any = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(PlanError, match=complaint):
        Report.model_validate(data).check()


def test_more_bytes_than_the_budget_are_refused() -> None:
    data = report_data()
    data["bytes"] |= {"experts_after": 1_000_001, "slack": -1, "total": 1_500_001}
    data["candidates"][2]["cost"] = 1_000_001
    with pytest.raises(PlanError, match="the experts take 1000001 bytes, the budget is 1000000 bytes"):
        Report.model_validate(data).check()


def test_unknown_and_missing_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="surprise"):
        report(surprise=1)
    (tmp_path / FILE_NAME).write_text("{}")
    with pytest.raises(PlanError, match="not a report of this version"):
        Report.load(tmp_path)
    with pytest.raises(PlanError, match="cannot be read"):
        Report.load(tmp_path / "nowhere")
