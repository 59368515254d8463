"""Small file systems in memory that can be filled, enlarged and made read-only. Only root may mount them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.runfaults.child import FILLER


class UnavailableError(Exception):
    """What a fault needs is not there: why."""


@contextlib.contextmanager
def disk(place: Path, options: str) -> Iterator[Path]:
    """A tmpfs at `place`; gone at the end, whoever still uses it. Raises UnavailableError."""
    place.mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"mode=755,{options}", "tmpfs", str(place))
    try:
        yield place
    finally:
        while os.path.ismount(place):
            subprocess.run(["umount", "-l", place], check=True)


def make_room(place: Path) -> None:
    (place / FILLER).unlink(missing_ok=True)
    _mount("-o", "remount,rw,size=256m,nr_inodes=100000", str(place))


@contextlib.contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Also while files are open in it: it is hidden by a view of it in which nothing can be written."""
    _mount("--bind", str(place), str(place))
    try:
        _mount("-o", "remount,bind,ro", str(place))
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def _mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UnavailableError("there is no mount command") from error
    if done.returncode:
        raise UnavailableError(f"nothing can be mounted here: {done.stderr.strip()}")
