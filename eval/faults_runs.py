"""Disturbs runs of a tiny job - kills, full disks, vanished files, too little memory - and judges each.

    python -m eval.faults_runs --seed 0 --count 110

Every fault is one of a real `moe-rco prune` in a process of its own; afterwards the same command must end in the same
bytes as if nothing had happened. Faults that need root (mounts, other users) are left out for others, with the reason.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from eval.faults_table import Row, table
from tests.runfaults.bench import Bench, MissedError
from tests.runfaults.disks import UnavailableError
from tests.runfaults.kinds import KINDS
from tests.running import starting

TRIES = 12
"""A fault that comes too late to disturb a run is no fault: another moment is drawn, this often."""


def rows(seed: int, count: int, say: Callable[[str], None] = lambda line: None, only: str = "") -> list[Row]:
    """About `count` faults, some of every kind whose name has `only` in it; the same for the same seed but for moments."""
    with tempfile.TemporaryDirectory() as home, starting("tests.runfaults.kinds") as start:
        bench = Bench(Path(home), start)
        kinds = [name for name in KINDS if only in name]
        shares = sum(KINDS[name][1] for name in kinds)
        found = [_row(bench, name, seed, max(1, -(-count * KINDS[name][1] // shares)), say) for name in kinds]
        for note, times in bench.notes.items():
            say(f"{note}: {times}")
        return found


def _row(bench: Bench, name: str, seed: int, count: int, say: Callable[[str], None]) -> Row:
    fault, failed, tried = KINDS[name][0], list[str](), 0
    for number in range(count):
        draw = random.Random(f"{seed} {name} {number}")
        began = time.monotonic()
        for _ in range(TRIES):
            try:
                fault(bench, draw)
            except MissedError:
                continue
            except UnavailableError as error:
                say(f"{name}: left out: {error}")
                return Row(name, tried, failed)
            except AssertionError as error:
                failed.append(f"{name} {number}: {error}")
                say(failed[-1])
            tried += 1
            break
        else:
            failed.append(f"{name} {number}: {TRIES} times too late")
            tried += 1
            say(failed[-1])
        say(f"{name} {number}: {time.monotonic() - began:.1f} s")
    return Row(name, tried, failed)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that what was mounted goes
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=110)
    parser.add_argument("--only", default="", help="kinds with this in their names")
    options = parser.parse_args()
    found = rows(
        options.seed, options.count, lambda line: print(line, file=sys.stderr, flush=True), options.only
    )
    print(table(found))
    sys.exit(any(row.failed for row in found))


if __name__ == "__main__":
    main()
