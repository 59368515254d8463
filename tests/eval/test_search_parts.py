"""The table of what the parts of the search gain: its ratios must follow from the records alone."""

from __future__ import annotations

from typing import Any

import pytest

from eval.search_parts import PARTS, PROBLEMS, START, render
from moe_rco.calib.search import SEED

FIRST, SECOND = list(PROBLEMS)[:2]


def _record(model: str, problem: str, kl: float) -> dict[str, Any]:
    each = {SEED: 3.0, START: 2.0} | dict.fromkeys(PARTS, kl)
    return {"model": model, "method": problem, "seed": 0, "far_off": 1.9, "kl": each}


def _rows(records: list[dict[str, Any]]) -> list[list[str]]:
    lines = [line for line in render(records).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_a_problem_s_ratio_is_the_geometric_mean_over_its_records() -> None:
    rows = _rows([_record("demo", FIRST, 1.0), _record("mixtral", FIRST, 4.0), _record("demo", SECOND, 0.5)])
    assert [row[:4] for row in rows] == [
        ["demo", FIRST, "0", "1.90"], ["mixtral", FIRST, "0", "1.90"], ["demo", SECOND, "0", "1.90"],
        ["all", FIRST, "", ""], ["all", SECOND, "", ""], ["all", "all", "", ""],
    ]  # fmt: skip
    start, part = 5, 6
    assert {row[start] for row in rows[3:]} == {"1.000"}
    assert float(rows[3][part]) == pytest.approx((0.5 * 2) ** 0.5, abs=1e-3)
    assert float(rows[4][part]) == pytest.approx(0.25, abs=1e-3)
    assert float(rows[5][part]) == pytest.approx((0.5 * 2 * 0.25) ** (1 / 3), abs=1e-3)
