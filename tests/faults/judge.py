"""Runs the command line on bad input, and tells whether it was handled: refused in one line, or done, within bounds."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests  # noqa: F401

# The commands load these when they are needed; here once for all cases.
from moe_rco import cli, inspection, integrity, pipeline, progress, serving  # noqa: F401
from tests.faults.watch import watch

SECONDS, PATIENCE = 60, 300
"""Of a processor, and on the clock, which other work on the machine makes go by faster."""
ROOM = 2 << 30
"""Bytes that a command may take beside what is loaded already."""
OUTPUTS = ("out", "out.work", "done/eval")
"""What a command may make or change in its directory."""


@dataclass(frozen=True)
class Case:
    """One thing that is wrong. `make` changes a fresh copy of the directory `base` and returns the command's arguments.

    `refused` tells that the command must not end well; otherwise it may, as what is changed may do no harm. `starts` is the
    module that it may run in a process of its own, `writes` what it may change beside its outputs where it ends well.
    """

    kind: str
    name: str
    base: Path
    make: Callable[[Path, random.Random], list[str]]
    refused: bool = False
    check: Callable[[Path], str] = lambda place: ""
    starts: str = ""
    writes: tuple[str, ...] = ()


def judged(case: Case, seed: int, place: Path) -> str:
    """Run a case in a directory of its own, removed afterwards; what is wrong with how it was handled, or nothing."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(case.base, place, symlinks=True)
    arguments = case.make(place, random.Random(seed))
    before, log = _state(place), place.with_name(place.name + ".log")
    watched, temporary = place.with_name(place.name + ".watch"), place.with_name(place.name + ".tmp")
    watched.write_bytes(b"")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    code, seconds = _run(lambda: _command(arguments, place, temporary, log, watched, case.starts))
    said = log.read_text(encoding="utf-8", errors="replace")
    wrong = _wrong(case, code, seconds, said, before, _state(place))
    seen = watched.read_text(encoding="utf-8", errors="replace").splitlines()
    wrong = wrong or (f"did {seen[0]}" if seen else "")
    wrong = wrong or next(
        (f"left {path.name} among temporary files" for path in temporary.rglob("*") if path.is_file()), ""
    )
    wrong = wrong or (case.check(place) if code == 0 else "")
    return f"{' '.join(arguments)}: {wrong}" if wrong else ""


def _wrong(
    case: Case, code: int, seconds: float, said: str, before: dict[str, object], after: dict[str, object]
) -> str:
    last = said.strip().splitlines()[-1:] or [""]
    if code == -signal.SIGXCPU or seconds > PATIENCE:
        return f"no end after {seconds:.0f} s"
    if code not in (0, 2):
        return f"ended with {code}: {last[0][:200]}"
    if "error: out of memory" in said:
        return f"took more than {ROOM} bytes"
    if "Traceback" in said or "internal error" in said:
        return f"shows a fault: {last[0][:200]}"
    if code == 0 and case.refused:
        return "was not refused"
    # The command line's own complaints about its arguments have a capital letter.
    errors = [line for line in said.splitlines() if line.lower().startswith("error: ")]
    if code == 2 and (len(errors) != 1 or len(errors[0]) < 20 or errors[0] != last[0]):
        return f"was refused with {len(errors)} messages: {last[0][:200]}"
    ours = (*(f"{name}/" for name in OUTPUTS), *(case.writes if code == 0 else ()))
    changed = {
        name
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name) and name not in OUTPUTS and not name.startswith(ours)
    }
    if changed:
        return f"changed {min(changed)}"
    if code == 2 and "out" in after and "out" not in before:
        return "left an output"
    return ""


def _run(command: Callable[[], int]) -> tuple[int, float]:
    """The exit code of a command and the seconds it took, in a process forked from this one, which has everything loaded."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = command()
        finally:
            os._exit(status)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - start
        if done:
            return os.waitstatus_to_exitcode(status), seconds
        if seconds > PATIENCE:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL, seconds
        time.sleep(0.002)


def _command(
    arguments: list[str], place: Path, temporary: Path, log: Path, watched: Path, starts: str
) -> int:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    os.chdir(place)
    sys.dont_write_bytecode = True
    tempfile.tempdir = os.environ["TMPDIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(temporary)
    sys.excepthook = cli._report_fault  # as the installed command has it: no traceback unless asked for
    limit = psutil.Process().memory_info().vms + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # The hard limit kills without saying why.
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 60))
    watch((place, temporary), place, watched, starts)
    try:
        cli.app(arguments, prog_name="moe-rco")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 (it is what is looked for)
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _state(place: Path) -> dict[str, object]:
    """Every path below a directory, with what would change if it did."""
    found: dict[str, object] = {}
    for directory, names, files in os.walk(place):
        for name in (*names, *files):
            path = Path(directory) / name
            facts = path.lstat()
            found[str(path.relative_to(place))] = (
                facts.st_mode,
                0 if path.is_dir() else facts.st_size,
                0 if path.is_dir() else facts.st_mtime_ns,
            )
    return found
