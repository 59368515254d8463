"""What the system refuses a run - disk, files, memory - as an error of one line that says where it was and what to do.

The only place that knows the system's error codes and torch's words; everything else lets such errors pass.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moe_rco.errors import FileError, MemoryShortageError, UserError, is_fault
from moe_rco.units import format_size

_AGAIN = "run the same command again to go on"
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota on the disk is full",
    errno.EFBIG: "the file gets too large for the file system or the limit on files (ulimit -f)",
}
_GONE = f"it was there before: put it back if it is not the run's own, then {_AGAIN}"
_DENIED = "get the permission, or name another output"
_ADVICE = {
    errno.EROFS: f"make the disk writable again and {_AGAIN}, or name another output",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.ENOENT: _GONE,
    errno.ENOTDIR: _GONE,
    errno.EIO: f"the disk may be failing: check it, then {_AGAIN}",
    errno.ESTALE: f"the file system was mounted anew: {_AGAIN}",
    errno.EMFILE: f"allow more open files (ulimit -n), then {_AGAIN}",
    errno.ENFILE: f"allow the machine more open files, then {_AGAIN}",
}
_SHORTAGE = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|bad_alloc|alloc_failed|"
    r"can't start new thread|failed to map segment|cannot map zero-fill|unable to mmap|"
    r"global thread pool has not been initialized",
    re.IGNORECASE,
)
_LARGER = f"give it more, then {_AGAIN}, or "
_BY_STAGE = {
    "calibrate and quantise": "calibration.sequence_length",
    "measure output errors": "calibration.sequence_length",
    "search": "search.batch or search.samples",
    "refine": "search.batch or search.samples",
}


@dataclass(frozen=True)
class Needs:
    """What a run had counted on, in bytes, as far as it knew; `disk` is what it had still to write on the disk of `place`."""

    place: Path | None = None
    disk: int | None = None
    memory: int | None = None
    streamed: bool = False
    stage: str = ""


def unsaid() -> str:
    """What to say of a run that ended in the middle and could not say why."""
    return f"killed, or given up by a library, most often because memory ended; {_remedy(Needs())}"


def explained(fault: BaseException, needs: Needs | None = None) -> UserError | None:
    """The error to show for what the system refused; an error of ours with what to do added. None if it was not the system."""
    needs = needs or Needs()
    chain = list(_causes(fault))
    if any(map(_is_shortage, chain)):
        return MemoryShortageError(_shortage(needs))
    refusal = next((cause for cause in chain if isinstance(cause, OSError) and cause.errno is not None), None)
    if refusal is not None and refusal.errno == errno.EPIPE:
        return None  # who read our output has left: not a matter of the run
    if isinstance(fault, UserError):
        return fault if refusal is None else type(fault)(_advised(_plain(fault), refusal, needs))
    if refusal is not None:
        return FileError(_advised(_told(refusal), refusal, needs))
    if isinstance(fault, OSError) or type(fault).__name__ == "SafetensorError":
        return FileError(f"a file cannot be read or written ({_plain(fault)}); {_AGAIN}")
    return None


@contextmanager
def explaining(needs: Callable[[], Needs]) -> Iterator[None]:
    """Raises UserError for what the system refuses within; whatever else is raised passes."""
    try:
        yield
    except BaseException as fault:
        error = explained(fault, needs()) if is_fault(fault) else None
        if error is None or error is fault:
            raise
        raise error from fault


def _causes(fault: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = fault
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_shortage(fault: BaseException) -> bool:
    if isinstance(fault, MemoryError) or (isinstance(fault, OSError) and fault.errno == errno.ENOMEM):
        return True
    return not isinstance(fault, UserError) and _SHORTAGE.search(str(fault)) is not None


def _shortage(needs: Needs) -> str:
    where = f" (in: {needs.stage})" if needs.stage else ""
    counted = f"; the run had counted on {format_size(needs.memory)}" if needs.memory else ""
    return f"out of memory{where}{counted}; {_remedy(needs)}"


def _remedy(needs: Needs) -> str:
    if needs.streamed:
        what = "lower execution.memory_limit, so that less is held at a time, or "
    else:
        what = (
            "set execution.memory_limit to what it may take, so that weights are read as they are needed, or "
        )
    smaller = _BY_STAGE.get(needs.stage, "calibration.sequence_length or search.batch")
    return f"{_LARGER}{what}lower {smaller}"


def _told(refusal: OSError) -> str:
    where = " to ".join(str(name) for name in (refusal.filename, refusal.filename2) if name is not None)
    return f"{where or 'a file'}: {refusal.strerror or refusal}"


def _plain(fault: BaseException) -> str:
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()] or [type(fault).__name__]
    return re.sub(r"\[Errno \d+\] ", "", lines[0])


def _advised(message: str, refusal: OSError, needs: Needs) -> str:
    if refusal.errno in _FULL:
        return f"{message}: {_FULL[refusal.errno]}{_missing(refusal, needs)}; make room, then {_AGAIN}"
    # Who raised it may have known better: what to do stands after a semicolon.
    advice = _ADVICE.get(refusal.errno or 0, _AGAIN)
    return message if ";" in message else f"{message}; {advice}"


def _missing(refusal: OSError, needs: Needs) -> str:
    still = "" if needs.disk is None else f", the run still needs about {format_size(needs.disk)}"
    # The run writes in two places; the error seldom tells in which.
    named = None if refusal.filename is None else Path(os.fsdecode(refusal.filename)).parent
    free = dict[Path, int]()
    for place in (named, needs.place, Path(tempfile.gettempdir())):
        with suppress(OSError):
            if place is not None:
                found = os.statvfs(place)
                free[place.absolute()] = found.f_bavail * found.f_frsize
    if refusal.errno not in (errno.ENOSPC, errno.EDQUOT) or not free:
        return f" ({needs.place.absolute()}{still})" if needs.place is not None else ""
    place = min(free, key=lambda place: free[place])
    return f" ({place}: {format_size(free[place])} free{still})"
