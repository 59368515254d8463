"""Puts deliberate faults of one line into a copy of the package, one at a time, and tells which the test suite catches.

    python -m eval.mutations
    python -m eval.mutations --survivors                 # those that no test caught, and those not tried yet
    python -m eval.mutations --only 3 17 --output out/mutations.md

The tests named for a fault are run on the faultless copy first. Nothing is changed in the checkout. What came of each fault is
kept in a JSON file beside the table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from eval.mutations_list import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "moe_rco",
    "tests",
    "eval",
    "recipes",
    "docs",
    "pyproject.toml",
    "README.md",
    "constraints.txt",
    "Makefile",
)
PATIENCE = 600


@dataclass(frozen=True)
class Outcome:
    """`test` is the first that failed; empty where the fault survived."""

    test: str
    seconds: float


def key(mutation: Mutation) -> str:
    return f"{mutation.file}: {mutation.line} -> {mutation.fault}"


def changed(mutation: Mutation, root: Path = ROOT) -> str:
    """The file's text with the fault. Raises ValueError unless the line occurs exactly once."""
    text = (root / "moe_rco" / mutation.file).read_text(encoding="utf-8")
    if text.count(mutation.line) != 1:
        raise ValueError(f"{mutation.file} has {text.count(mutation.line)} times: {mutation.line}")
    return text.replace(mutation.line, mutation.fault)


def copy(place: Path) -> Path:
    """The package and its tests."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place / name)
    return place


def first_failure(place: Path, tests: Sequence[str]) -> str:
    """The test of some files below tests/ that fails first in a copy; empty where all pass."""
    environment = {
        **os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": str(place / "numba"),
    }  # fmt: skip
    files = [str(place / "tests" / name) for name in tests]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(place),
        *files,
    ]
    try:
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return f"no end after {PATIENCE} s"
    if done.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or failed is None:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-500:]}")
    return failed[1]


def tried(mutation: Mutation, place: Path) -> Outcome:
    """What the tests make of one fault in a copy, which is whole again afterwards."""
    path = place / "moe_rco" / mutation.file
    before, start = path.read_text(encoding="utf-8"), time.monotonic()
    path.write_text(changed(mutation, place), encoding="utf-8")
    try:
        return Outcome(first_failure(place, mutation.tests), round(time.monotonic() - start, 1))
    finally:
        path.write_text(before, encoding="utf-8")


def render(outcomes: Mapping[str, Outcome]) -> str:
    """The table in Markdown, of those that have been tried."""
    rows = [(n, m, outcomes[key(m)]) for n, m in enumerate(MUTATIONS, 1) if key(m) in outcomes]
    caught = sum(bool(outcome.test) for *_, outcome in rows)
    lines = [
        "# Deliberate faults", "", f"Made by `python -m eval.mutations`: {caught} of {len(rows)} caught.", "",
        "| | file | instead of | stands | a user would get | caught by |", "|--:|:--|:--|:--|:--|:--|",
    ]  # fmt: skip
    for number, m, outcome in rows:
        cells = (f"`{' '.join(text.split()).replace('|', chr(92) + '|')}`" for text in (m.line, m.fault))
        caught_by = outcome.test.rpartition("::")[2] or "**survived**"
        lines.append(f"| {number} | {m.file} | {' | '.join(cells)} | {m.harm} | {caught_by} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", type=int, metavar="N", help="numbers of the list, from 1")
    which.add_argument(
        "--survivors", action="store_true", help="what survived when it was last tried, or was not tried yet"
    )
    parser.add_argument("--output", type=Path, default=Path("eval/results/mutations.md"))
    arguments = parser.parse_args()
    path = arguments.output.with_suffix(".json")
    outcomes: dict[str, Outcome] = {}
    if (arguments.only or arguments.survivors) and path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        outcomes = {key(m): Outcome(**kept[key(m)]) for m in MUTATIONS if key(m) in kept}
    chosen = [
        (number, mutation)
        for number, mutation in enumerate(MUTATIONS, 1)
        if (not arguments.only or number in arguments.only)
        and not (arguments.survivors and key(mutation) in outcomes and outcomes[key(mutation)].test)
    ]
    with TemporaryDirectory(prefix="moe-rco-") as directory:
        place = copy(Path(directory))
        for tests in sorted({mutation.tests for _, mutation in chosen}):
            if failed := first_failure(place, tests):
                sys.exit(f"without any fault: {failed}")
        for number, mutation in chosen:
            outcome = outcomes[key(mutation)] = tried(mutation, place)
            print(
                f"{number} {mutation.file}: {outcome.test or 'SURVIVED'} ({outcome.seconds:.0f} s)",
                flush=True,
            )
            path.write_text(
                json.dumps({name: asdict(outcome) for name, outcome in outcomes.items()}, indent=1) + "\n",
                encoding="utf-8",
            )
            arguments.output.write_text(render(outcomes), encoding="utf-8")
    sys.exit(not all(outcomes[key(mutation)].test for _, mutation in chosen))


if __name__ == "__main__":
    main()
