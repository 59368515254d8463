"""Runs of `moe-rco` in processes of their own, forked from one that has loaded torch already.

Dozens of starts would otherwise take most of the time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARD_BYTES = 20_000
KILLED = -9
_LOADED = (
    *("moe_rco.pipeline", "moe_rco.console", "moe_rco.cli", "torch._inductor.compile_fx"),
    *("compressed_tensors.compressors", "transformers.models.qwen3_moe.modeling_qwen3_moe", __name__),
)


@dataclass(frozen=True)
class Started:
    """A `moe-rco` in `place`; what it prints goes to the file `output`."""

    process: Any
    place: Path
    output: Path

    @property
    def log(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""

    def ends(self) -> int:
        self.process.join(120)
        return self.process.exitcode

    def kill(self) -> int:
        self.process.kill()
        return self.ends()

    def send(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)


Start = Callable[..., Started]


@contextmanager
def starting(*modules: str) -> Iterator[Start]:
    """A function that starts `moe-rco prune ARGUMENTS`, or another `command`, in a place. `modules` are loaded beforehand;
    whatever still runs in the end is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_LOADED, *modules])
    started: list[Started] = []

    def begin(
        place: Path,
        *arguments: str,
        command: str = "prune",
        before: Callable[[], None] | None = None,
        log: Path | None = None,
    ) -> Started:
        """`before` is called in the new process; it must be picklable."""
        place.mkdir(exist_ok=True)
        log = log or place.parent / f"{place.name}.log"
        log.unlink(missing_ok=True)
        process = context.Process(target=_run, args=(place, (command, *arguments), before, log))
        process.start()
        started.append(Started(process, place, log))
        return started[-1]

    try:
        yield begin
    finally:
        for run in started:
            run.process.kill()
            run.process.join()


def _run(place: Path, arguments: tuple[str, ...], before: Callable[[], None] | None, log: Path) -> None:
    """`moe-rco ARGUMENTS` with `place` as the current directory, and with small shards."""
    from moe_rco import cli
    from moe_rco.ckpt import rewrite

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(place)
    # A shell that starts the tests in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["moe-rco", *arguments]
    defaults = rewrite.rewrite.__kwdefaults__
    assert defaults is not None
    defaults["shard_bytes"] = SHARD_BYTES
    if before is not None:
        before()
    cli.main()
