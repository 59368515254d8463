"""Bad input as `python -m eval.faults` tries it, less of it; and that its judge sees what is wrong."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.judge import Case, judged
from tests.tiny_job import save_job


@pytest.mark.slow
def test_every_case_is_handled(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "eval.faults",
        "--cases",
        "60",
        "--seed",
        "1",
        "--output",
        str(tmp_path / "table.md"),
    ]
    kinds = ["--kinds", "recipe", "checkpoint", "output", "text", "store"]
    done = subprocess.run([*command, *kinds], capture_output=True, text=True, check=False, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "| all | 60 | 60 | 0 |" in (tmp_path / "table.md").read_text()


def leave(place: Path, rng: random.Random) -> list[str]:
    return ["init", "model", "-o", "stray.yaml"]


def fine(place: Path, rng: random.Random) -> list[str]:
    return ["validate", "recipe.yaml"]


def nothing(place: Path, rng: random.Random) -> list[str]:
    return ["validate"]


@pytest.mark.parametrize(
    ("make", "refused", "expected"),
    [
        (leave, False, "changed stray.yaml"),
        (fine, True, "was not refused"),
        (fine, False, ""),
        (nothing, True, ""),
    ],
)
def test_the_judge(
    make: Callable[[Path, random.Random], list[str]], refused: bool, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    save_job(tmp_path / "base", steps=0, refine=0)
    found = judged(Case("kind", "name", tmp_path / "base", make, refused), 0, tmp_path / "case")
    assert found.partition(": ")[2] == expected
