"""A process beside a run that says how it ended where the run itself cannot: killed by the system, or aborted by a library."""

from __future__ import annotations

import contextlib
import os


class Witness:
    """Forked from the run, which is to do so before it has threads and holds memory. It is in a session of its own, so that
    Ctrl-C, job control and what ends a process group do not reach it, and ends with the run, whose exit code stays as it is.
    """

    def __init__(self) -> None:
        self._run: int | None = None

    def begin(self, line: str) -> None:
        """From now on `line` is printed where this process ends without having called `over`."""
        with contextlib.suppress(OSError):  # no process or no file is to be had: the run may well do without
            ours, self._run = os.pipe()
            if os.fork():
                os.close(ours)
            else:
                self._watch(ours, self._run, f"{line}\n".encode())

    def over(self) -> None:
        """The run has said all there is to say."""
        if self._run is not None:
            with contextlib.suppress(OSError):
                os.write(self._run, b".")

    @staticmethod
    def _watch(ours: int, theirs: int, line: bytes) -> None:
        try:
            os.setsid()
            os.close(theirs)
            if not os.read(ours, 1):  # its end was closed, as the system does for the dead
                os.write(2, line)
        finally:
            os._exit(0)
