"""What a run ends with shows the report's figures."""

from __future__ import annotations

import re

from moe_rco import console
from tests.console.screens import screen, shown
from tests.reports import FITTED, report, report_data

STOCK = {
    "experts_per_layer": 4,
    "kl": 0.0625,
    "mixed": {"name": "fisher seed", "kl": 0.03125, "cost": 999_999},
    "transformers_reads": True,
}


def test_summary_shows_the_reports_figures() -> None:
    target = screen()
    console.show_summary(report(), target)
    text = shown(target)
    for part in (
        "4,000,000",
        "budget (ratio 0.25)",
        "1,000,000",
        "999,000",
        "0.100% of budget",
        "1,499,000",
        "Calibration: 0 to 9 tokens an expert, 5 in the middle; 1 saw none.",
        "3 experts saw fewer than 4 tokens for each input of a matrix (layer 0: 2, 5; layer 2: 7): to quantise",
        "agrees with",
        "1.2e-06",
        "1 min 13 s",
        "from_pretrained('out/[demo]')",
        "Written to out/[demo]",
    ):
        assert part in text
    assert re.search(r"prose +1,234 +2\.0000 +2\.0625 +0\.06250 +0\.00100", text)
    assert re.search(r"all +2,468 +0\.06250 +0\.00070", text)
    assert re.search(r"rco step 40 +0\.06250 +999,000 +chosen", text)
    assert text.count("chosen") == 1
    assert text.index("rco step 40") < text.index("fisher seed") < text.index("uniform int4-g64")


def test_a_failed_reload_is_said_loudly() -> None:
    target = screen()
    data = report_data()["reload"] | {"passed": False, "max_logit_difference": 0.5}
    console.show_summary(report(reload=data), target)
    assert "DIFFERS from" in shown(target)


def test_the_summary_compares_what_was_predicted() -> None:
    stages = [{"name": "search", "seconds": 61.0, "predicted": 59.0}, {"name": "rest", "seconds": 2.0}]
    memory = {"host": 2**30, "predicted_host": 2**29, "device": 2**31, "predicted_device": 2**32}
    target = screen()
    console.show_summary(report(stages=stages, memory=memory), target)
    for part in (
        "Time: 1 min 03 s (predicted 59.0 s)",
        "Memory: 1.00 GiB (predicted 512.00 MiB), 2.00 GiB on the device",
    ):
        assert part in shown(target)


def test_the_stock_layout_says_what_it_costs_and_who_reads_it() -> None:
    target = screen(200)
    console.show_summary(report(stock=STOCK), target)
    text = shown(target)
    for part in (
        "4 experts in every layer, numbered anew",
        "KL 0.06250; layout mixed has 0.03125 within the same budget before any search (fisher seed;",
        "Read without moe_rco by vLLM and transformers.",
        "from_pretrained('out/[demo]')",
    ):
        assert part in text
    assert "import moe_rco" not in text
    target = screen(200)
    console.show_summary(report(stock=STOCK | {"transformers_reads": False}), target)
    text = shown(target)
    assert "Read without moe_rco by vLLM.\n" in text
    assert "LLM('out/[demo]')" in text
    assert "from_pretrained" not in text


def test_a_line_for_every_result() -> None:
    target = screen()
    console.show_comparison({"25pct": report(), "[x]": report(kl=0.5)}, "Written to out/[many].", target)
    text = shown(target)
    assert re.search(r"25pct +999,000 +25.0% +1,499,000 +2.0000 +2.0625 +0.06250 +0.00070", text)
    assert re.search(r"\[x\] +999,000 +25.0% +1,499,000 +2.0000 +2.0625 +0.50000", text)
    assert "out/[many]" in text


def test_what_was_made_to_fit_says_how_to_serve_it() -> None:
    budget = FITTED | {"bytes": 1_000_000}
    target = screen()
    console.show_summary(report(budget=budget), target)
    serve = "moe-rco serve 'out/[demo]' --max-model-len 8192 --max-num-seqs 4"
    assert serve in " ".join(shown(target).split())
    target = screen()
    console.show_summary(report(), target)
    assert "moe-rco serve" not in shown(target)
