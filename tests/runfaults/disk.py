"""No room, and no permission to write."""

from __future__ import annotations

import os
import random
import shutil
import time
from functools import partial
from pathlib import Path

from tests.killing import tree
from tests.runfaults import child
from tests.runfaults.bench import THREE, Bench, Job, MissedError, a_moment
from tests.runfaults.disks import disk, make_room, read_only

FULL = r"full|too large"
GO_ON = "run the same command again"
# Files of every kind; the disk is full when one of them is opened.
PLACES = (
    *("out.work/lock", "run.json.tmp", "index.json.tmp", "int4-g64.safetensors.tmp", "int8-g64.safetensors.tmp"),
    *("measured.safetensors.tmp", "search.safetensors.tmp", "shards.json.tmp", "model-00003-of", "tokenizer.json"),
    *("checkpoint/config.json", "plan.json", "recipe.yaml", "model.safetensors.index.json", ".report.json.part"),
    "publishing",
)  # fmt: skip
OF_SEVERAL = ("found.safetensors.tmp", "curve.json.tmp", "curve.svg.tmp")
SPILLED = ("states-0.tmp", "outputs-0.tmp")


def too_small(bench: Bench, draw: random.Random) -> None:
    """A disk of any size below what is needed; some in blocks, some in files."""
    need = 2.5e6
    size = int(need * draw.uniform(0.02, 1) ** 2)
    _full(bench, draw, bench.job(), f"size={max(size, 8192)}", partial(child.with_room))


def too_few_files(bench: Bench, draw: random.Random) -> None:
    _full(bench, draw, bench.job(), f"size=64m,nr_inodes={draw.randrange(3, 45)}", partial(child.with_room))


def full_at_once(bench: Bench, draw: random.Random, pattern: str | None = None) -> None:
    """Full from one moment to the next, just before a file of any kind is written."""
    pattern = pattern or draw.choice((*PLACES, *OF_SEVERAL, *SPILLED))
    overrides = THREE if pattern in OF_SEVERAL else ()
    if pattern in SPILLED:
        overrides = bench.spilling()
    _full(bench, draw, bench.job(*overrides), "size=64m", pattern)


def full_log(bench: Bench, draw: random.Random) -> None:
    """What the run prints goes to the full disk as well."""
    job, place = bench.job(), bench.place()
    with disk(place, "size=64m"):
        run = bench.start(
            place,
            *job.arguments,
            before=partial(child.full_at, draw.choice(PLACES), place),
            log=place / "log",
        )
        bench.ended(run, 2)
        assert not (place / "out").exists()
        make_room(place)
        bench.completes(place, job)


def files_too_large(bench: Bench, draw: random.Random) -> None:
    """A limit on files (ulimit -f)."""
    job, place = bench.job(), bench.place()
    size = int(10 ** draw.uniform(3.3, 5.3))
    bench.refused(bench.start(place, *job.arguments, before=partial(child.files_end_at, size)), FULL, GO_ON)
    assert set(os.listdir(place)) <= {"out.work"}
    bench.completes(place, job)


def _full(bench: Bench, draw: random.Random, job: Job, options: str, how: str | partial[None]) -> None:
    place = bench.place()
    with disk(place, options):
        before = partial(child.full_at, how, place) if isinstance(how, str) else how
        over = ()
        old = bench.old_output(place) if options == "size=64m" and draw.random() < 0.3 else {}
        if old:
            over = ("--overwrite",)
        run = bench.start(place, *job.arguments, *over, before=before)
        bench.refused(run, FULL, str(place), r"\d (B|KiB|MiB)", GO_ON)
        assert set(os.listdir(place)) <= {"out.work", child.FILLER, *(["out"] if old else [])}, os.listdir(
            place
        )
        assert not old or tree(place / "out") == old, "the old output is another one"
        make_room(place)
        bench.completes(place, job, *over)


def read_only_before(bench: Bench, draw: random.Random) -> None:
    job, place = bench.job(), bench.place()
    with disk(place, "size=64m"):
        begun = draw.random() < 0.5
        if begun:
            _begin(bench, job, place, draw)
        with read_only(place):
            bench.refused(bench.start(place, *job.arguments), "[Rr]ead-only", str(place))
        bench.completes(place, job)


def read_only_during(bench: Bench, draw: random.Random) -> None:
    job, place = bench.job(), bench.place()
    with disk(place, "size=64m"):
        run = bench.start(place, *job.arguments)
        a_moment(run, job, draw)
        with read_only(place):
            bench.refused(run, "[Rr]ead-only", str(place), f"{GO_ON}|name another")
        bench.completes(place, job)


def not_permitted(bench: Bench, draw: random.Random) -> None:
    """Another user's directory, or another user's work directory in one that all may write to."""
    job, place = bench.job(), bench.place()
    theirs = draw.random() < 0.5
    if theirs:
        _begin(bench, job, place, draw)
        place.chmod(0o777)
    run = bench.start(place, *job.arguments, before=child.as_nobody)
    bench.refused(run, "[Pp]ermission", "out.work" if theirs else str(place), "name another")
    bench.completes(place, job)


def _begin(bench: Bench, job: Job, place: Path, draw: random.Random) -> None:
    run = bench.start(place, *job.arguments)
    a_moment(run, job, draw)
    time.sleep(0.05)
    run.kill()
    if (place / "out").exists() or not (place / "out.work").exists():
        shutil.rmtree(place / "out", ignore_errors=True)
        raise MissedError
