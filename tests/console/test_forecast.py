"""What is said before a run."""

from __future__ import annotations

import re

import pytest

from moe_rco import console
from tests.console.screens import screen, shown
from tests.reports import FITTED, preflight


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


@pytest.mark.parametrize("layout", ["mixed", "stock"])
def test_the_dry_run_shows_the_layout(layout: str) -> None:
    target = screen()
    console.show_preflight(preflight(layout=layout), target)
    assert re.search(rf"layout +{layout}: e", shown(target))


def test_the_dry_run_shows_what_of_a_gpu_is_taken_by_what() -> None:
    target = screen()
    console.show_preflight(preflight(budgets=[FITTED]), target)
    text = " ".join(shown(target).split())
    for part in (
        "(fits a GPU of 24GB with 4 x 8,192 tokens)",
        "20.00 GiB usable, less 3.00 GiB other weights, 2.00 GiB KV cache, 100.00 MiB activations (estimated), 1.00 GiB CUDA",
        "served with --max-model-len 8192 --max-num-seqs 4",
    ):
        assert part in text


def test_the_dry_run_shows_what_the_text_is_made_of() -> None:
    target = screen()
    parts = [
        {"name": "talk", "sequences": 100, "counted": 0.25},
        {"name": "books", "sequences": 5, "counted": 1.0},
    ]
    console.show_preflight(preflight(text=parts), target)
    text = shown(target)
    assert re.search(r"talk: 100 sequences, 25,600 tokens, 25% of it the assistant's, which counts", text)
    assert re.search(r"books: 5 sequences, 1,280 tokens *\n", text)
