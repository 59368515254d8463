"""Killed, interrupted, asked to end: at any moment."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from tests.killing import tree
from tests.runfaults.bench import Bench, Job, MissedError, a_moment, said_for
from tests.running import KILLED, Started

ASIDE = ".out.moe-rco-old"
LINE = "interrupted; run the same command again to go on"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def killed(bench: Bench, draw: random.Random) -> None:
    run, job, place, old = _begun(bench, draw)
    time.sleep(draw.uniform(0, job.seconds))
    if run.kill() != KILLED or not _as_before(place, old):
        raise MissedError
    if run.log:  # otherwise it may have been killed before it had begun
        said_for(run)
    bench.completes(place, job, *_OVER[bool(old)])


def interrupted(bench: Bench, draw: random.Random) -> None:
    _stopped(bench, draw, signal.SIGINT)


def asked_to_end(bench: Bench, draw: random.Random) -> None:
    _stopped(bench, draw, signal.SIGTERM)


def interrupted_twice(bench: Bench, draw: random.Random) -> None:
    """The second time while it cleans up after the first, or just before."""
    _stopped(bench, draw, signal.SIGINT, draw.uniform(0, 0.02))


_OVER = ((), ("--overwrite",))


def _begun(bench: Bench, draw: random.Random) -> tuple[Started, Job, Path, dict[str, bytes | None]]:
    """A run that has just begun, sometimes where another's output is to be replaced: its bytes; sometimes streamed."""
    job, place = bench.job(*(bench.spilling() if draw.random() < 0.3 else ())), bench.place()
    old = bench.old_output(place) if draw.random() < 0.3 else {}
    return bench.start(place, *job.arguments, *_OVER[bool(old)]), job, place, old


def _as_before(place: Path, old: dict[str, bytes | None]) -> bool:
    """Whether no output has come, and an old one is still there; False where the new one is in its place."""
    assert set(os.listdir(place)) <= {"out", "out.work", ASIDE}
    aside = place / ASIDE
    found = aside if aside.exists() else place / "out"
    if found.exists() and (not old or tree(found) != old):
        return False
    assert not old or found.exists(), "the old output is lost"
    return True


def _stopped(bench: Bench, draw: random.Random, number: signal.Signals, again: float | None = None) -> None:
    run, job, place, old = _begun(bench, draw)
    stage = a_moment(run, job, draw)
    run.send(number)
    if again is not None:
        time.sleep(again)
        run.send(number)
    if bench.ended(run, 0, CODES[number]) == 0 or not _as_before(place, old):
        raise MissedError
    said = run.log.splitlines()
    assert said[-1:] == [LINE], f"in {stage}: {said[-3:]}"
    assert said.count(LINE) == 1, f"in {stage}: {said[-3:]}"
    assert not any(line.startswith("error: ") for line in said), said
    bench.completes(place, job, *_OVER[bool(old)])
