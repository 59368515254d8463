"""What is done in the process that is to be disturbed, before it begins: limits, another user, clocks, full disks."""

from __future__ import annotations

import datetime
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NOBODY = 65534
FILLER = "filler"


def with_room() -> None:
    """The check before the run sees a disk with room: it is full later."""
    shutil.disk_usage = lambda path: SimpleNamespace(total=1 << 40, used=0, free=1 << 40)


def full_at(pattern: str, disk: Path) -> None:
    """The disk is full once a file is opened whose path has `pattern` in it."""
    with_room()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and pattern in str(arguments[0]) and not (disk / FILLER).exists():
            fill(disk)

    sys.addaudithook(hook)


def fill(disk: Path) -> None:
    """Write until there is no room."""
    with (disk / FILLER).open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def files_end_at(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def memory_ends(extra: int) -> None:
    """`extra` bytes above what the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def as_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    os.environ["HOME"] = "/nonexistent"


def clock_jumps(seed: int) -> None:
    """Every look at the wall clock shows a time within decades of the last."""
    draw, real = random.Random(seed), time.time

    def jumping() -> float:
        return max(0.0, real() + draw.uniform(-40, 40) * 365 * 86400)

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return datetime.datetime.fromtimestamp(jumping(), tz)

    time.time, time.time_ns = jumping, lambda: int(jumping() * 1e9)
    datetime.datetime = Jumping
    from moe_rco.ckpt import workdir

    workdir.datetime = Jumping
