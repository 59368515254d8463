"""Ctrl-C and the request to end that batch systems send: the run stops in order, with one line, and can go on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

LINE = "interrupted; run the same command again to go on"
_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """The first signal ends the main thread's work by SystemExit, so that everything is cleaned up; the second one ends the
    process at once. What a run leaves then is no less fit to go on from: it may be killed at any moment. `line` is what it says.
    """

    def __init__(self, ending: Callable[[], None] = lambda: None) -> None:
        """`ending` is called before the process is ended at once."""
        self.number = 0
        self._ending = ending
        self._told = self._at_once = False
        self.line = LINE

    @property
    def code(self) -> int:
        """The exit code, as a shell would say it: 130 for Ctrl-C."""
        return 128 + self.number

    def install(self) -> None:
        """Take over the signals, but for those that were to be ignored, as nohup says it."""
        for number in _NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._received)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._lost

    def at_once(self) -> None:
        """From now on the first signal ends the process as the second one does: there is nothing to clean up."""
        self._at_once = True

    def tell(self) -> None:
        """Say it once; not through a stream that what was interrupted may be holding."""
        if not self._told:
            self._told = True
            with contextlib.suppress(OSError):  # nobody listens
                os.write(2, f"{self.line}\n".encode())

    def _received(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number, self.number or number
        if again or self._at_once:
            self._end()
        raise SystemExit(self.code)

    def _lost(self, unraisable: Any) -> None:
        """Python has called something that must not raise, as __del__, when the signal came: nobody else will know."""
        if self.number and isinstance(unraisable.exc_value, SystemExit):
            self._end()
        self._unraisable(unraisable)

    def _end(self) -> None:
        self.tell()
        self._ending()
        os._exit(self.code)
