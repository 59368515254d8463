"""The table of ours against published code: its verdicts, and the mark of what cannot be deployed."""

from __future__ import annotations

from typing import Any

from eval.published_table import render


def _record(
    method: str, seed: int, kl: float, seconds: float, fewest: int = 2, commit: str = "a"
) -> dict[str, Any]:
    return {
        "model": "demo",
        "ratio": 0.5,
        "method": method,
        "seed": seed,
        "kl": kl,
        "kept": [4, fewest],
        "floor": 2,
        "tokens": 1000,
        "preparation": 1.0,
        "seconds": seconds - 1.0,
        "commit": commit,
    }


def _verdict(records: list[dict[str, Any]], method: str) -> list[str]:
    lines = render(records, "ours", "python -m eval.published").splitlines()
    return (
        next(line for line in lines if line.startswith(f"| demo | 50% | {method}")).strip("| ").split(" | ")
    )


def test_the_verdict_is_over_the_seeds_both_were_run_with() -> None:
    ours = [_record("ours", 0, 1.0, 10), _record("ours", 1, 9.0, 90)]
    row = _verdict([*ours, _record("RCO", 0, 2.0, 20), _record("RCO", 2, 7.0, 70)], "RCO")
    assert row[3:] == ["0.50", "0.50", "1", "lower in less time"]


def test_only_times_of_one_commit_are_compared() -> None:
    records = [_record("ours", seed, 1.0, 10) for seed in range(2)]
    records += [_record("RCO", 0, 2.0, 40), _record("RCO", 1, 2.0, 5, commit="b")]
    records += [_record("REAP", 0, 2.0, 5, commit="b")]
    assert _verdict(records, "RCO")[3:] == ["0.50", "0.25", "2", "lower in less time"]
    assert _verdict(records, "REAP")[3:] == ["0.50", "–", "1", "lower"]


def test_a_loss_is_told_in_quality_and_in_time() -> None:
    row = _verdict([_record("ours", 0, 3.0, 30), _record("RCO", 0, 2.0, 20)], "RCO")
    assert row[3:] == ["1.50", "1.50", "1", "NOT lower in MORE time"]


def test_fewer_experts_than_a_token_uses_are_marked() -> None:
    records = [_record("ours", 0, 1.0, 10), _record("RCO", 0, 2.0, 20, fewest=1)]
    assert _verdict(records, "RCO")[2] == "RCO *"
    assert "| 1 * |" in render(records, "ours", "command")
