"""Every kind of fault, and how many of a hundred are of it."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.runfaults import disk, files, memory, signals, together
from tests.runfaults.bench import Bench

Fault = Callable[[Bench, random.Random], None]
"""Disturbs one run and judges it. Raises AssertionError where it is not as it should be, MissedError, UnavailableError."""

KINDS: dict[str, tuple[Fault, int]] = {
    "killed (SIGKILL) at any moment": (signals.killed, 12),
    "Ctrl-C at any moment of any stage": (signals.interrupted, 12),
    "Ctrl-C twice": (signals.interrupted_twice, 5),
    "asked to end (SIGTERM)": (signals.asked_to_end, 6),
    "disk too small, any size": (disk.too_small, 8),
    "disk out of files (inodes)": (disk.too_few_files, 4),
    "disk full from one moment to the next": (disk.full_at_once, 9),
    "disk full, with the log on it": (disk.full_log, 2),
    "files limited in size (ulimit -f)": (disk.files_too_large, 6),
    "read-only before the run": (disk.read_only_before, 2),
    "read-only during the run": (disk.read_only_during, 4),
    "directory or work directory of another user": (disk.not_permitted, 3),
    "model file removed, cut or changed": (files.model_file, 8),
    "file of the run removed or cut": (files.own_file, 6),
    "directory of the run removed": (files.directory, 4),
    "out of memory (RLIMIT_AS)": (memory.too_little, 8),
    "clock jumps by decades, files of any time": (files.clock, 4),
    "two runs, one output": (together.one_output, 2),
    "two runs, one model and cache": (together.one_model, 2),
    "lock of a machine that is gone": (together.stale_lock, 2),
}
