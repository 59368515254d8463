"""What stands on the screen: figures of the report, the map readable with and without colour, quiet pipes."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from moe_rco import console
from moe_rco.curve import Curve
from moe_rco.heatmap import legend
from moe_rco.progress import Status
from moe_rco.report import Preflight
from tests.reports import LAYERS, report, report_data

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def screen(width: int = 100, color: bool = False) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        markup=False,
        highlight=False,
        emoji=False,
        force_terminal=color,
        color_system="truecolor" if color else None,
        legacy_windows=False,
    )


def shown(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


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
        "3 experts saw too few",
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


def test_map_has_one_cell_per_expert() -> None:
    target = screen()
    console.show_map(list(enumerate(LAYERS)), target)
    lines = shown(target).splitlines()
    assert lines[1].split() == ["0", ".", "4", "4", "F", "2", "8", ".", "3"]
    assert lines[2].split() == ["1", *"44444444"]
    assert lines[3].split() == ["2", *"FFFF...."]
    assert "4  int4-g64 (10)" in lines[4]
    assert "F  bf16 (5)" in "".join(lines[4:])


@pytest.mark.parametrize("width", [40, 80, 133, 140, 300])
def test_map_of_many_experts_wraps_inside_the_window(width: int) -> None:
    options = ["prune", "int4-g64", "int8-g64", "bf16"] * 33
    target = screen(width)
    console.show_map([(7, options), (47, options)], target)
    lines = shown(target).splitlines()
    assert max(map(len, lines)) <= width
    rows = [line for line in lines[1:] if set(line[7:].replace(" ", "")) <= set(".48F") and line.strip()]
    assert "".join(row[7:] for row in rows).replace(" ", "") == ".48F" * 33 * 2
    assert len(rows) == 2 or width < 140
    assert sum(row.strip().startswith(("7 ", "47 ")) for row in rows) == 2


def test_colour_only_adds_to_the_characters() -> None:
    plain, coloured = screen(), screen(color=True)
    for target in (plain, coloured):
        console.show_map(list(enumerate(LAYERS)), target)
    assert "\x1b[" in shown(coloured)
    assert ESCAPES.sub("", shown(coloured)) == shown(plain)


def test_no_two_options_share_a_symbol_or_a_shade() -> None:
    names = ["bf16", "int4", "int4-g64", "int4-g128", "int2-g64", "prune", "int8-g64", "f32"]
    keys = legend([names, ["prune"] * 8])
    assert len({key.symbol for key in keys}) == len(names)
    assert keys[0].name == "prune"
    assert [key.symbol for key in keys if key.name in ("prune", "int2-g64", "int4")] == [".", "2", "4"]
    shades = [key.shade for key in keys if key.shade is not None]
    assert shades == sorted(shades)
    assert len(set(shades)) == len(names) - 1
    assert next(key.count for key in keys if key.name == "prune") == 9


def preflight(**changes: object) -> Preflight:
    data: dict[str, object] = {
        "model": "demo",
        "family": "qwen3_moe",
        "layers": 6,
        "experts_per_layer": 32,
        "top_k": 4,
        "options": [
            {"name": "prune", "bytes_per_expert": 0},
            {"name": "int4-g64", "bytes_per_expert": 13_000},
        ],
        "experts_before": 9_437_184,
        "smallest": 300_000,
        "largest": 9_437_184,
        "budgets": [{"text": "ratio 0.25", "bytes": 2_359_296}],
        "sequences": 640,
        "tokens": 163_840,
        "holdout_sequences": 128,
        "search_method": "rco",
        "search_steps": 60,
        "search_races": 0,
        "search_samples": 4,
        "output": "out/demo",
        "disk_needed": 2**24,
        "disk_free": 2**36,
        "memory": 2**30,
    }
    return Preflight.model_validate({**data, **changes}, strict=False)


def test_dry_run_shows_sizes_and_that_nothing_was_written() -> None:
    target = screen()
    console.show_preflight(preflight(warnings=("mind [the] gap",)), target)
    text = shown(target)
    for part in (
        "6 MoE layers x 32 experts, 4 per token",
        "int4-g64: 12.70 KiB per expert",
        "2.25 MiB (2,359,296 bytes), 25.0% of now (ratio 0.25)",
        "300,000 bytes",
        "640 sequences (128 held out), 163,840 tokens",
        "1.00 GiB",
        "16.00 MiB needed, 64.00 GiB free",
        "note: mind [the] gap",
        "Nothing was written.",
    ):
        assert part in text


def test_the_dry_run_has_every_stage_and_the_run_says_the_longest() -> None:
    told = preflight(
        stages={"calibrate and quantise": 100.0, "search": 20.0}, streamed=True, device_memory=2**31
    )
    target = screen()
    console.show_preflight(told, target)
    for part in ("about 2 min 00 s", "calibrate and quantise: 1 min 40 s", "search: 20.0 s"):
        assert part in shown(target)
    target = screen()
    console.show_forecast(told, target)
    assert " ".join(shown(target).split()) == (
        "Takes about 1.00 GiB of memory and 2.00 GiB on the device (weights streamed from disk), 16.00 MiB of disk, and "
        "2 min 00 s, most for: calibrate and quantise."
    )


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


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_without_a_terminal_is_a_few_plain_lines() -> None:
    target, clock = screen(), Clock()
    progress = console.RichProgress(target, clock)
    with progress.stage("quantise", 80) as advance:
        for _ in range(80):
            clock.now += 0.5
            advance(1)
    assert shown(target).splitlines() == [
        "quantise ...",
        "quantise: 25 %, 30.0 s left",
        "quantise: 50 %, 20.0 s left",
        "quantise: 75 %, 10.0 s left",
        "quantise: done in 40.0 s",
    ]


@pytest.mark.parametrize("color", [False, True])
def test_progress_stages_nest_may_be_empty_and_survive_errors(color: bool) -> None:
    target = screen(color=color)
    progress = console.RichProgress(target)
    with progress.stage("outer", 2) as advance:
        advance(1)
        with progress.stage("inner [a]", 0):
            pass
        advance(1)
    with pytest.raises(RuntimeError), progress.stage("failing", 3):
        raise RuntimeError
    with progress.stage("after", 1) as advance:
        advance(1)
    text = ESCAPES.sub("", shown(target))
    for part in ("outer", "inner [a]", "failing", "after"):
        assert part in text
    assert "failing: done" not in text


def test_the_curve_has_a_line_for_every_budget() -> None:
    target = screen()
    console.show_curve(Curve.of(("25pct", "[x]"), (report(), report(kl=0.5))), "out/[many]", target)
    text = shown(target)
    assert re.search(r"25pct +999,000 +25.0% +1,499,000 +2.0625 +0.06250 +0.00070", text)
    assert re.search(r"\[x\] +999,000 +25.0% +1,499,000 +2.0625 +0.50000", text)
    assert "Loss of the original: 2.0000" in text
    assert "out/[many]" in text


def test_status_shows_what_is_kept_and_what_was_there() -> None:
    target = screen()
    found = Status.model_validate(
        {
            "output": "out/[demo]",
            "state": "interrupted",
            "process": {"pid": 4711, "host": "box", "started": "2026-01-02T03:04:05+00:00"},
            "stages": [
                {"name": "race passes", "done": 1200, "total": 3840},
                {"name": "shards written", "done": 0, "total": 0},
            ],
            "results": [
                {
                    "model": "demo",
                    "budget": "ratio 0.25",
                    "budget_bytes": 1_000_000,
                    "expert_bytes": 999_000,
                    "total_bytes": 1_499_000,
                    "kl": 0.0625,
                    "kl_stderr": 0.001,
                }
            ],
        }
    )
    console.show_status(found, target)
    text = shown(target)
    assert text.startswith("out/[demo]: interrupted\nIt was process 4711 on box")
    assert re.search(r"race passes +1,200 +3,840\n", text)
    assert re.search(r"shards written +0 +-\n", text)
    assert "goes on from here" in text
    assert "An earlier run's output" in text
    assert re.search(r"budget +976.56 KiB \(1,000,000 bytes\) \(ratio 0.25\)", text)
    assert "0.06250 ± 0.00100" in text

    target = screen()
    console.show_status(found.model_copy(update={"state": "finished", "process": None, "stages": ()}), target)
    assert "goes on" not in shown(target)
    assert "An earlier" not in shown(target)


STOCK = {
    "experts_per_layer": 4,
    "kl": 0.0625,
    "mixed": {"name": "fisher seed", "kl": 0.03125, "cost": 999_999},
    "transformers_reads": True,
}


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


@pytest.mark.parametrize("layout", ["mixed", "stock"])
def test_the_dry_run_shows_the_layout(layout: str) -> None:
    target = screen()
    console.show_preflight(preflight(layout=layout), target)
    assert re.search(rf"layout +{layout}: e", shown(target))
