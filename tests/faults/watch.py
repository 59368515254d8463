"""Notes what no input may make a process do: touch files elsewhere, start programs, run code, unpickle, use the network."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_STARTED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")
_NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo")
_CHANGED = {
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "os.setxattr": ((0, None),),
}
"""Which arguments of an audit event are the path that is changed and the directory it is relative to."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watch(allowed: Sequence[Path], inputs: Path, log: Path, starts: str = "") -> None:
    """From now on note in `log`, a line each, what this process does to files that are not below `allowed`, and what code of
    `inputs` it runs. Another Python may be started for the module `starts`. It cannot be undone: for a process that is to
    end.
    """
    note = _noting(log)
    places = [os.path.realpath(path) for path in allowed]
    code = str(inputs) + os.sep

    def check(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and flags & _WRITING:
                note_outside(event, path, None)
        elif event in _CHANGED:
            for path, directory in _CHANGED[event]:
                note_outside(event, arguments[path], None if directory is None else arguments[directory])
        elif event in _STARTED or event in _NETWORK:
            ours = event == "subprocess.Popen" and starts and arguments[1] == [sys.executable, "-m", starts]
            if not ours and arguments[:1] != ("uname",):  # platform.platform() does
                note(f"{event} {arguments[:2]}")
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(code):
            note(f"ran {arguments[0].co_filename}")
        elif event == "pickle.find_class" and not _is_of_numba():
            note(f"unpickled {arguments}")

    def note_outside(event: str, path: Any, directory: int | None) -> None:
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)
        if directory is not None and directory >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), name)
        parent, last = os.path.split(os.path.abspath(name))
        # What is opened is where a link leads; what is removed or renamed is the link.
        real = os.path.realpath(name) if event == "open" else os.path.join(os.path.realpath(parent), last)
        inside = real == os.devnull or any(
            real == place or real.startswith(place + os.sep) for place in places
        )
        if not inside and not _is_of_numba():
            note(f"{event} {real}")

    sys.addaudithook(check)


def _noting(log: Path) -> Callable[[str], None]:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(line: str) -> None:
        os.write(file, (line.replace("\n", " ")[:500] + "\n").encode("utf-8", "replace"))

    return note


def _is_of_numba() -> bool:
    """What it compiles it keeps beside the package, pickled."""
    frame = sys._getframe(2)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("numba.core."):
            return True
        frame = frame.f_back
    return False
