"""What an interrupted run has kept, with a flipped bit, a lost or a foreign file in it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.faults.judge import Case
from tests.faults.values import damage, replace
from tests.killing import written


def cases(base: Path, expected: dict[str, Any], count: int, rng: random.Random) -> list[Case]:
    """Of a directory with a job and its interrupted run, which undisturbed ends in `expected` (`killing.written`)."""

    def check(place: Path) -> str:
        return "" if written(place / "out") == expected else "goes on to another result"

    return [
        Case(
            "quantised store, saved search",
            "changed",
            base,
            rng.choice((_bit, _bit, _damaged, _replaced)),
            check=check,
        )
        for _ in range(count)
    ]


_PRUNE = ["prune", "--recipe", "recipe.yaml"]


def _file(place: Path, rng: random.Random) -> Path:
    files = sorted(path for path in (place / "out.work").rglob("*") if path.is_file() and path.stat().st_size)
    return rng.choice(files)


def _bit(place: Path, rng: random.Random) -> list[str]:
    path = _file(place, rng)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return _PRUNE


def _damaged(place: Path, rng: random.Random) -> list[str]:
    damage(_file(place, rng), rng)
    return _PRUNE


def _replaced(place: Path, rng: random.Random) -> list[str]:
    replace(_file(place, rng), rng)
    return _PRUNE
