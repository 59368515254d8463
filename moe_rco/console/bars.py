"""Progress: bars, or plain lines where there is no terminal, as in a log or a notebook."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moe_rco.console.parts import stderr
from moe_rco.units import format_duration

_QUIET_SECONDS = 10.0


class RichProgress:
    """Bars with elapsed and remaining time; without a terminal plain lines, at most one in ten seconds."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or stderr()
        self._clock = clock
        self._bars: Progress | None = None

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """See types.Progress. Stages may be opened inside one another."""
        plain = self._console.is_dumb_terminal or self._console.is_jupyter  # where bars would need widgets
        if plain or not self._console.is_terminal:
            with self._lines(title, total) as advance:
                yield advance
        elif self._bars is not None:
            with _bar(self._bars, title, total) as advance:
                yield advance
        else:
            self._bars = Progress(
                TextColumn("{task.description:<28}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            try:
                with self._bars as bars, _bar(bars, title, total) as advance:
                    yield advance
            finally:
                self._bars = None

    @contextmanager
    def _lines(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        start = said = self._clock()
        done = 0

        def advance(units: int) -> None:
            nonlocal done, said
            done += units
            now = self._clock()
            if now - said >= _QUIET_SECONDS and 0 < done < total:
                said = now
                left = (now - start) * (total - done) / done
                self._console.print(
                    f"{title}: {done * 100 // total} %, {format_duration(left)} left", soft_wrap=True
                )

        self._console.print(f"{title} ...", soft_wrap=True)
        yield advance
        self._console.print(f"{title}: done in {format_duration(self._clock() - start)}", soft_wrap=True)


@contextmanager
def _bar(bars: Progress, title: str, total: int) -> Iterator[Callable[[int], None]]:
    task = bars.add_task(title, total=max(total, 1))

    def advance(units: int) -> None:
        bars.advance(task, units)

    yield advance
    bars.update(task, completed=max(total, 1))
