"""Pages: their figures are the report's, whatever is in its texts stays text, and they need nothing from elsewhere."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moe_rco.chart import intervals
from moe_rco.curve import Curve
from moe_rco.page import compared, page, save
from moe_rco.page.figures import accuracy, eval_commands, score_intervals
from moe_rco.report import Report
from tests.reports import FITTED, report, report_data, score

STEPS = [
    {
        "step": number,
        "kl": 0.2 / number,
        "budget_error": 1e-13,
        "temperature": 2.0 / number,
        "entropy": 1.0 / number,
    }
    for number in range(1, 9)
]


class Elements(HTMLParser):
    """Every start tag with its attributes, every text, and which tags were not closed."""

    VOID = ("meta", "link", "rect", "line", "circle", "polyline", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def embedded(text: str) -> object:
    return json.loads(
        text.partition('type="application/json"')[2].partition(">")[2].partition("</script>")[0]
    )


@pytest.fixture
def full() -> Report:
    """With everything that a report may have."""
    races = [{"step": number, "kl": 0.05} for number in range(1, 4)]
    history = {"steps": 11, "history": [*STEPS, *races]}
    return report(search=history, warnings=["a warning"]).with_scores(
        [score("arc_easy"), score("gsm8k", stderr=None)]
    )


def test_the_report_is_within_it(full: Report) -> None:
    assert embedded(page(full)) == json.loads(full.to_json())


def test_the_headline_and_the_tables_have_its_figures(full: Report) -> None:
    text = " ".join(" ".join(Elements(page(full, "version: 1")).texts).split())
    for figure in (
        "3.81 MiB → 975.59 KiB", "25.0 % of before; budget ratio 0.25, 1,000 bytes left", "1,499,000 bytes on disk",
        "0.06250", "± 0.00070", "2.0000 → 2.0625", "perplexity 7.389 → 7.866",
        "mean score of 2 tasks 0.7000 → 0.6500 difference -0.0500 ± 0.0087; 2 of 2 comparisons are more than chance",
        "acc, higher is better", "moe-rco eval 'out/[demo]' --backend hf --tasks arc_easy,gsm8k moe-rco serve",
        "arc_easy hf acc 1,234 0.7000 ± 0.0121 0.6500 ± 0.0125 -0.0500 ± 0.0123 0.0321",
        "rco step 40, chosen 0.06250 999,000", "uniform int4-g64 0.25000 990,000",
        "11 steps, races among them; seed 0", "0 to 9 tokens an expert", "Layer 0: 2, 5. Layer 2: 7.",
        "a warning", "version: 1", "1 min 01 s", "a" * 64,
    ):  # fmt: skip
        assert figure in text, figure


def test_scores_of_a_metric_have_a_chart_and_what_gave_them_a_command() -> None:
    made = report().with_scores(
        [
            score("mmlu"),
            score("mmlu_law", group="mmlu"),
            score("wikitext", "word_perplexity", higher_is_better=False, score=8.0),
            score("gsm8k", "exact_match", num_fewshot=5, limit=20, files="eval/hf/gsm8k-limit20-5shot"),
            score("a_task_with_a_name_longer_than_there_is_room_for", baseline=None),
        ]
    )
    charts = score_intervals(made)
    assert {title: [name for name, _ in rows] for title, rows in charts.items()} == {
        "acc, higher is better": ["a_task_with_a_name_longer_than_there_is_room_for", "mmlu"],
        "exact_match, higher is better": ["gsm8k"],
        "word_perplexity, lower is better": ["wikitext"],
    }
    drawn = intervals(charts["acc, higher is better"])
    assert re.search(r">a_task_with_a_name_\w+…<", drawn)
    assert "<title>a_task_with_a_name_longer_than_there_is_room_for</title>" in drawn
    found = accuracy(made)
    assert found is not None
    assert (found.tasks, found.compared, found.different) == (2, 3, 3)
    assert found.stderr == pytest.approx(0.0123 / 2**0.5)
    assert accuracy(report().with_scores([score("x", baseline=None)])) is None
    assert eval_commands(made) == [
        "moe-rco eval 'out/[demo]' --backend hf --tasks a_task_with_a_name_longer_than_there_is_room_for,mmlu,wikitext",
        "moe-rco eval 'out/[demo]' --backend hf --tasks gsm8k --limit 20 --num-fewshot 5",
    ]


def test_every_expert_has_a_cell_that_tells_of_it(full: Report) -> None:
    titles = re.findall(r"<title>(layer [^<]*)</title>", page(full))
    expected = [
        (layer.layer, expert, option, layer.tokens[expert])
        for layer in full.layers
        for expert, option in enumerate(layer.options)
    ]
    found = [
        re.match(r"layer (\d+), expert (\d+): (\S+); ([\d,]+) tokens, ([\d.]+) of", title) for title in titles
    ]
    assert [(int(m[1]), int(m[2]), m[3], int(m[4].replace(",", ""))) for m in found if m] == expected
    assert unescape(titles[7]).endswith("7 tokens, 2.00 of its layer's mean")


def test_panels_of_the_search(full: Report) -> None:
    names = [attributes.get("aria-label") for tag, attributes in Elements(page(full)).tags if tag == "svg"]
    assert [name for name in names if (name and "loss" in name) or name == "temperature"] == [
        "loss of a step's samples (nats per token)",
        "temperature",
        "loss of the best in its races so far (nats per token)",
    ]
    without = page(report())
    assert "The search" not in without


def test_it_needs_nothing_from_elsewhere_and_runs_nothing(full: Report) -> None:
    for text in (page(full, "recipe"), compared({"a": full, "b": report()})):
        found = Elements(text)
        assert not found.open
        for tag, attributes in found.tags:
            assert tag not in ("iframe", "object", "embed", "img", "form", "base")
            assert not any(name.startswith("on") for name in attributes)
            assert tag != "script" or attributes["type"] == "application/json"
            for name in ("src", "href", "xlink:href"):
                assert attributes.get(name, "data:,") == "data:,"
        assert not re.search(r"https?://|@import|url\(", text)


def test_it_shows_what_of_a_gpu_is_taken_by_what() -> None:
    made = report(budget=FITTED | {"bytes": 1_000_000})
    text = " ".join(" ".join(Elements(page(made)).texts).split())
    for part in (made.budget.text, "20.00 GiB usable", made.budget.rooms, "serve with --max-model-len 8192"):
        assert part in text


def test_text_stays_text() -> None:
    bad = '</script><script>alert(1)</script><b>&amp;"'
    data = report_data()
    data["candidates"].append({"name": bad, "kl": 1.0, "cost": 5})
    data["domains"][0]["name"] = bad
    made = Report.model_validate({**data, "model": bad, "output": bad, "warnings": [bad]})
    for text in (page(made, bad), compared({bad: made})):
        found = Elements(text)
        assert not found.open
        assert [tag for tag, _ in found.tags].count("script") == 1
        assert any(bad in text for text in found.texts)
    assert embedded(page(made, bad)) == json.loads(made.to_json())


def test_it_is_the_same_every_time_and_whole(full: Report, tmp_path: Path) -> None:
    save(tmp_path, full, "recipe")
    assert (tmp_path / "report.html").read_text() == page(full, "recipe") == page(full, "recipe")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_several_beside_each_other(full: Report) -> None:
    other = report(kl=0.5, kl_stderr=0.01)
    text = compared({"first": full, "second": other})
    shown = " ".join(" ".join(Elements(text).texts).split())
    assert "first demo 975.59 KiB 25.0 % 1.43 MiB 0.06250 0.00070 2.0000 2.0625" in shown
    assert "second demo 975.59 KiB 25.0 % 1.43 MiB 0.50000 0.01000 2.0000 2.0625" in shown
    assert "arc_easy acc 0.6500 ± 0.0125" in shown
    assert text.count('class="map"') == 2
    assert embedded(text) == {"first": json.loads(full.to_json()), "second": json.loads(other.to_json())}


def test_losses_of_different_models_are_not_drawn_together() -> None:
    assert compared({"a": report(), "b": report()}).count('class="axis"') > 0
    one, other = (compared({"a": report(), "b": report(model_digest=digest * 64)}) for digest in "ac")
    assert "Loss, held-out text" in one
    assert "Loss, held-out text" not in other
    assert "polyline" not in one


def test_one_run_with_its_curve() -> None:
    reports = {"25pct": report(), "12pct": report(kl=0.5)}
    text = compared(reports, Curve.of(tuple(reports), tuple(reports.values())))
    assert "demo at 2 budgets" in text
    assert "KL to the original, held-out text" in text


def test_old_and_sparse_reports_have_a_page() -> None:
    data = report_data()
    for layer in data["layers"]:
        layer["tokens"] = []
    data["search"] = {"steps": 0, "history": []}
    data["stages"] = []
    text = page(Report.model_validate(data))
    assert "None yet" in text
    assert not Elements(text).open


def test_what_is_not_known_or_not_finite_is_said(full: Report) -> None:
    data = json.loads(full.to_json())
    for part in data["domains"]:
        part["kl_stderr"] = None
    data |= {"kl": float("inf"), "kl_stderr": None}
    data["candidates"].append({"name": "broken", "kl": float("inf"), "cost": 1})
    broken = Report.model_validate(data)
    text = page(broken)
    assert "± unknown nats" in text
    assert not Elements(compared({"a": broken, "b": full})).open
    assert not re.search(r'="(nan|inf)', text)
