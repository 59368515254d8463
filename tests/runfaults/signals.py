"""Killed, interrupted, asked to end: at any moment."""

from __future__ import annotations

import os
import random
import signal
import time

from tests.runfaults.bench import Bench, MissedError, a_moment
from tests.running import KILLED

LINE = "interrupted; run the same command again to go on"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def killed(bench: Bench, draw: random.Random) -> None:
    job, place = bench.job(), bench.place()
    run = bench.start(place, *job.arguments)
    time.sleep(draw.uniform(0, job.seconds))
    if run.kill() != KILLED:
        raise MissedError
    assert set(os.listdir(place)) <= {"out.work"}
    bench.completes(place, job)


def interrupted(bench: Bench, draw: random.Random) -> None:
    _stopped(bench, draw, signal.SIGINT)


def asked_to_end(bench: Bench, draw: random.Random) -> None:
    _stopped(bench, draw, signal.SIGTERM)


def interrupted_twice(bench: Bench, draw: random.Random) -> None:
    """The second time while it cleans up after the first, or just before."""
    _stopped(bench, draw, signal.SIGINT, draw.uniform(0, 0.02))


def _stopped(bench: Bench, draw: random.Random, number: signal.Signals, again: float | None = None) -> None:
    job, place = bench.job(), bench.place()
    run = bench.start(place, *job.arguments)
    stage = a_moment(run, job, draw)
    run.send(number)
    if again is not None:
        time.sleep(again)
        run.send(number)
    if bench.ended(run, 0, CODES[number]) == 0 or (place / "out").exists():
        raise MissedError
    said = run.log.splitlines()
    assert said[-1:] == [LINE], f"in {stage}: {said[-3:]}"
    assert said.count(LINE) == 1, f"in {stage}: {said[-3:]}"
    assert not any(line.startswith("error: ") for line in said), said
    assert set(os.listdir(place)) <= {"out.work"}
    bench.completes(place, job)
