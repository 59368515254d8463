"""Two runs at once: in one place, or beside each other."""

from __future__ import annotations

import json
import os
import random
import signal

from tests.runfaults.bench import Bench, a_moment


def one_output(bench: Bench, draw: random.Random) -> None:
    """The second is refused, and the first does not notice."""
    job, place = bench.job(), bench.place()
    first = bench.start(place, *job.arguments)
    a_moment(first, job, draw)
    first.send(signal.SIGSTOP)
    try:
        if (place / "out").exists():
            return
        second = bench.start(place, *job.arguments, log=place.parent / f"{place.name}.second")
        bench.refused(second, "another run works in", f"process {first.process.pid} on")
    finally:
        first.send(signal.SIGCONT)
    bench.ended(first, 0)
    bench.right(place, job)


def one_model(bench: Bench, draw: random.Random) -> None:
    """Two outputs from one model, with one directory of temporary files: both are right."""
    job, places = bench.job(), (bench.place(), bench.place())
    runs = [bench.start(place, *job.arguments) for place in places]
    for run, place in zip(runs, places, strict=True):
        bench.ended(run, 0)
        bench.right(place, job)


def stale_lock(bench: Bench, draw: random.Random) -> None:
    """Left by a machine that is gone."""
    job, place = bench.job(), bench.place()
    run = bench.start(place, *job.arguments)
    a_moment(run, job, draw)
    run.kill()
    lock = place / "out.work" / "lock"
    if lock.exists():
        lock.write_text(
            json.dumps({"pid": os.getpid(), "host": "gone", "started": "2020-01-01T00:00:00+00:00"})
        )
    if not (place / "out").exists():
        bench.completes(place, job)
