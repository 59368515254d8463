"""Files that vanish, or become others, while a run reads and writes beside them."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.runfaults import child
from tests.runfaults.bench import Bench, Job, MissedError, a_moment, reached
from tests.running import Started

GO_ON = "again"


def model_file(bench: Bench, draw: random.Random) -> None:
    """A file of the model is removed, cut short or written over, and later is as it was."""
    job, place = bench.job(), bench.place()
    own = bench.copy_of_model(place)
    files = sorted(path for path in (place / "model").iterdir())
    path, how = draw.choice(files), draw.choice(("removed", "cut", "changed"))
    content = path.read_bytes()
    run = bench.start(place, *job.arguments, *own)
    if how == "changed":
        # Before it is read first nobody could know.
        reached(run, "read the weights: done")
    a_moment(run, job, draw)
    if how == "removed":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        at = draw.randrange(len(content) // 2, len(content) - 8)
        path.write_bytes(content[:at] + b"0\x111,0.75" + content[at + 8 :])
    try:
        _ended(bench, run, job, place, path.name, f"{how} {path.name}")
    finally:
        path.write_bytes(content)
    bench.completes(place, job, *own)


def own_file(bench: Bench, draw: random.Random) -> None:
    """A file that the run has written for itself is removed, or cut short."""
    job, place = bench.job(), bench.place()
    run = bench.start(place, *job.arguments)
    a_moment(run, job, draw)
    found = [path for path in (place / "out.work").rglob("*") if path.is_file() and path.name != "lock"]
    if not found:
        raise MissedError
    path = draw.choice(found)
    try:
        # Mapped into memory by transformers while it is read back, a file cut short ends the process.
        if draw.random() < 0.5 and path.parent.name != "checkpoint":
            path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size + 1)])
        else:
            path.unlink()
    except FileNotFoundError as error:
        raise MissedError from error
    _ended(bench, run, job, place, "out.work", path.name)
    for _ in range(2):  # what is damaged is named, to be removed
        again = bench.start(place, *job.arguments)
        if bench.ended(again, 0, 2) == 0:
            break
        line = [line for line in again.log.splitlines() if line.startswith("error: ")][-1]
        assert "delete" in line or "remove" in line or "again" in line, line
        for named in sorted((place / "out.work").rglob("*"), key=lambda named: -len(str(named))):
            if str(named) in line or str(named.relative_to(place)) in line:
                shutil.rmtree(named) if named.is_dir() else named.unlink()
                break
    else:
        bench.completes(place, job)
    bench.right(place, job)


def directory(bench: Bench, draw: random.Random) -> None:
    """The store, the work directory, or the directory of both is removed."""
    job, place = bench.job(), bench.place()
    home = place / "deep"
    inside = replace(job, arguments=(*job.arguments, "--output", "deep/out"))
    run = bench.start(place, *inside.arguments)
    a_moment(run, job, draw)
    victim = draw.choice(
        (home, home / "out.work", home / "out.work" / "store", home / "out.work" / "checkpoint")
    )
    aside = place / "gone"
    try:
        victim.rename(aside)
    except FileNotFoundError as error:
        raise MissedError from error
    shutil.rmtree(aside)
    _ended(bench, run, job, home, "deep", str(victim))
    bench.ended(bench.start(place, *inside.arguments), 0)
    bench.right(home, job)


def clock(bench: Bench, draw: random.Random) -> None:
    """Jumps of the wall clock, and files and a lock of other times, of the past and the future."""
    job, place = bench.job(), bench.place()
    jumps = partial(child.clock_jumps, draw.randrange(1 << 30))
    run = bench.start(place, *job.arguments, before=jumps)
    a_moment(run, job, draw)
    run.kill()
    if (place / "out").exists():
        raise MissedError
    for path in (place / "out.work").rglob("*"):
        moment = draw.choice((0, 1, 4e9, 2e10))
        os.utime(path, (moment, moment))
    lock = place / "out.work" / "lock"
    if lock.exists():
        lock.write_bytes(draw.choice(LOCKS))
    again = bench.start(place, *job.arguments, before=jumps)
    bench.ended(again, 0)
    bench.right(place, job)
    assert " -" not in again.log, again.log
    stages = json.loads((place / "out" / "report.json").read_text())["stages"]
    assert all(0 <= stage["seconds"] < 100 for stage in stages), stages


LOCKS = (
    b"",
    b"\x00\xff\x00",
    b'{"pid": 1, "host": "elsewhere", "started": "2092-01-01T00:00:00+00:00"}\n',
    b'{"pid": -7, "host": null, "started": 1e400}\n',
    b"[1, 2, 3]\n",
    b'{"pid": 99999999, "host": "elsewhere", "started": "1901-12-13T20:45:52+00:00"}',
)


def _ended(bench: Bench, run: Started, job: Job, place: Path, name: str, what: str) -> None:
    """Either refused with one line that names something, or done and right; then the output is removed again."""
    try:
        bench.refused(run, name)
    except MissedError:
        try:
            bench.right(place, job)
        except AssertionError as error:
            raise AssertionError(f"{what}: exit 0, but {error}") from error
        shutil.rmtree(place / "out")
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error
    assert not (place / "out").exists(), f"{what}: a finished-looking output"
