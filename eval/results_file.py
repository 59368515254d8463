"""Results of a long measurement, written after every one so that a rerun goes on where it was."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

Key = tuple[str, float, int, str]
"""Model, ratio, seed, method."""


class Results:
    """Records by key in a JSON file, with the commit that made them. One made from other inputs (model, text, settings)
    is made again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[Key, dict[str, Any]] = {}
        if path.exists():
            for record in json.loads(path.read_text(encoding="utf-8")):
                self._records[_key(record)] = record

    def get(self, key: Key, inputs: str) -> dict[str, Any] | None:
        record = self._records.get(key)
        return record if record is not None and record["inputs"] == inputs else None

    def all(self) -> list[dict[str, Any]]:
        """Every record there is, by key."""
        return [self._records[key] for key in sorted(self._records)]

    def put(self, record: dict[str, Any]) -> None:
        self._records[_key(record)] = record | {"commit": commit()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.all(), indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self._path)


@cache
def commit() -> str:
    """The commit that this runs from, with a plus where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def made_at(records: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[str]:
    """Which methods' records were made at which commit: a line for every set of commits."""
    made: dict[str, list[str]] = {}
    for method in methods:
        commits = {record.get("commit", "unknown") for record in records if record["method"] == method}
        if commits:
            made.setdefault(", ".join(sorted(commits)), []).append(method)
    return [f"Commit {commits}: {', '.join(names)}." for commits, names in made.items()]


def _key(record: dict[str, Any]) -> Key:
    return record["model"], record["ratio"], record["seed"], record["method"]
