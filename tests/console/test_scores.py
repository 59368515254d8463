"""The table of scores: what stands in it, and that it fits 80 columns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moe_rco.console.scores import show_scores
from moe_rco.report import TaskScore
from moe_rco.scoring import Outcome
from tests.console.screens import screen, shown
from tests.reports import score


def table(*rows: TaskScore, width: int = 80, baseline: str | None = "demo") -> str:
    target = screen(width)
    show_scores(Outcome("out/[demo]", baseline, rows, Path("out/eval"), Path("out/report.json")), target)
    return shown(target)


def base(**changes: Any) -> dict[str, Any]:
    return {**score("x").model_dump()["baseline"], **changes}


def test_a_row_has_both_scores_their_difference_and_whether_it_is_more_than_chance() -> None:
    text = table(score("arc_easy"))
    assert re.search(r"arc_easy +0\.700 ±0\.012 +0\.650 ±0\.013 +-0\.0500 ±0\.0123 +0\.032 +worse", text)
    for part in (
        "out/[demo] (hf, float32)",
        "original: demo",
        "McNemar, exact",
        "out/eval",
        "out/report.json",
    ):
        assert part in text


def test_better_and_worse_follow_the_metric() -> None:
    lower = score("wikitext", "word_perplexity", higher_is_better=False)
    unknown = score("odd", "f2", higher_is_better=None)
    chance = score("same", "acc", baseline=base(p=0.05))
    none = score("f1", "f1", baseline=base(p=None, test=None, difference_stderr=None))
    tiny = score("tiny", "acc", baseline=base(p=0.0001))
    lines = {
        name: next(
            line for line in table(lower, unknown, chance, none, tiny).splitlines() if f"  {name} " in line
        )
        for name in ("wikitext", "odd", "same", "f1", "tiny")
    }
    assert lines["wikitext"].rstrip().endswith("0.032 better")
    assert lines["odd"].rstrip().endswith("0.032 differs")
    assert lines["same"].rstrip().endswith("0.050")
    assert re.search(r"-0\.0500 +- *$", lines["f1"])
    assert lines["tiny"].rstrip().endswith("<.001 worse")


def test_metrics_head_their_tasks_and_members_of_a_group_are_left_out() -> None:
    text = table(
        score("mmlu"),
        score("mmlu_anatomy", group="mmlu"),
        score("arc_easy"),
        score("arc_easy", "acc_norm"),
        score("gsm8k", "exact_match", filter="strict-match"),
        score("wikitext", "perplexity", higher_is_better=False),
        width=100,
    )
    names = [line.split("  0")[0].rstrip() for line in text.splitlines()[3:12]]
    assert names == [
        *("acc ↑", "  mmlu", "  arc_easy", "acc_norm ↑", "  arc_easy"),
        *("exact_match (strict-match) ↑", "  gsm8k", "perplexity ↓", "  wikitext"),
    ]


def test_it_fits_eighty_columns() -> None:
    long = "mmlu_flan_cot_zeroshot_high_school_european_history"
    rows = [
        score(long, score=0.123, baseline=base(p=0.0001)),
        score(
            "lambada",
            "perplexity",
            score=12345.6789,
            stderr=1234.5678,
            baseline=base(score=11111.1, stderr=999.9),
        ),
    ]
    text = table(*rows)
    assert max(map(len, text.splitlines())) <= 80
    assert "12345.7 ±1234.6" in text
    assert long in re.sub(r"\s*\n\s*", "", re.sub(r"  0\.7.*", "", text))


def test_without_an_original_there_are_scores_and_counts() -> None:
    text = table(score("arc_easy", baseline=None), baseline=None)
    assert re.search(r"arc_easy +0\.650 ±0\.013 +1,234", text)
    assert "original" not in text


def test_a_limit_is_told() -> None:
    assert "at most 5 items per task" in table(score("arc_easy", limit=5))
