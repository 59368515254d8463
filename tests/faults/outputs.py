"""Finished outputs that were changed by hand, by a bad copy or by a bad disk."""

from __future__ import annotations

import random
from pathlib import Path

from tests.faults.judge import Case
from tests.faults.values import damage, edit_json, replace

FILES = ("plan.json", "report.json", "manifest.json", "config.json")


def cases(base: Path, count: int, rng: random.Random) -> list[Case]:
    """Of a directory that holds an output, `done`."""
    made = []
    for number in range(count):
        if number % 2:
            made.append(Case("plan, report, manifest", "verify", base, _verify, refused=True))
        else:
            made.append(Case("plan, report, manifest", "read", base, _read))
    return made


def _change(place: Path, rng: random.Random) -> None:
    path = place / "done" / rng.choice(FILES)
    before = path.read_bytes()
    while path.is_file() and not path.is_symlink() and path.read_bytes() == before:
        rng.choice((edit_json, edit_json, damage, replace))(path, rng)
        if not path.exists():
            return


def _verify(place: Path, rng: random.Random) -> list[str]:
    """Any change must be found, also one bit in the weights."""
    if rng.random() < 0.3:
        path = rng.choice(sorted((place / "done").glob("*.safetensors")))
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    else:
        _change(place, rng)
    return ["verify", "done"]


def _read(place: Path, rng: random.Random) -> list[str]:
    _change(place, rng)
    return rng.choice(
        (
            ["inspect", "done"],
            ["status", "done"],
            ["serve", "done", "--dry-run"],
            ["status", "done", "--json"],
        )
    )
