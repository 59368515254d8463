"""What the stages of a run take in time and memory, beside what was predicted."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from moe_rco.report import MemoryPart, Preflight, Stage
from moe_rco.types import Progress


@dataclass
class Clock:
    """Passes progress on, with the name of the budget if it has one, and notes how long each stage took.

    `under` are the stages that have begun and not come to their end, also for who asks after an error.
    """

    progress: Progress
    taken: list[tuple[str, float]] = field(default_factory=list)
    under: list[str] = field(default_factory=list)
    name: str = ""
    expected: Preflight | None = None
    times: Mapping[str, float] = field(default_factory=dict)

    def at(self, name: str) -> Clock:
        """The same clock, for a stage of one of several budgets."""
        return replace(self, name=name)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        start = time.monotonic()
        self.under.append(title)
        with self.progress.stage(f"{self.name}: {title}" if self.name else title, total) as advance:
            yield advance
        self.under.remove(title)
        self.taken.append((title, round(time.monotonic() - start, 3)))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What has been done so far."""
        return tuple(
            Stage(name=name, seconds=seconds, predicted=self.times.get(name)) for name, seconds in self.taken
        )

    @property
    def memory(self) -> MemoryPart | None:
        """The largest use so far; None where nothing was predicted."""
        if self.expected is None:
            return None
        # Kilobytes everywhere but on macOS.
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return MemoryPart(
            host=host,
            predicted_host=self.expected.memory,
            device=torch.cuda.max_memory_reserved() if self.expected.device_memory else 0,
            predicted_device=self.expected.device_memory,
        )
