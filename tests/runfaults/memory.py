"""Too little memory: where it ends is random."""

from __future__ import annotations

import os
import random
import re
import signal
from functools import partial

from tests.runfaults import child
from tests.runfaults.bench import Bench, said_for

SETTINGS = r"execution\.memory_limit|execution\.mode|calibration\.sequence|search\.batch"
ABORTED = (-signal.SIGABRT, -signal.SIGSEGV, 127)  # the last by the C library, for a thread's own data
NATIVE = (
    r"(LLVM ERROR|Fatal glibc error): .*memory|memory allocation of \d+ bytes failed|bad_alloc"
    r"|cannot allocate memory for thread-local data: ABORT"
)
"""What compilers and libraries say before they end the process themselves."""


def too_little(bench: Bench, draw: random.Random) -> None:
    place = bench.place()
    job = bench.job(*(bench.spilling() if draw.random() < 0.4 else ()))
    extra = int(10 ** draw.uniform(5.5, 8))
    run = bench.start(place, *job.arguments, before=partial(child.memory_ends, extra))
    if run.ends() in ABORTED and re.search(NATIVE, run.log):
        said_for(run)
        bench.notes["memory ended in native code, which aborts: said by the witness"] += 1
    else:
        bench.refused(run, "out of memory", SETTINGS, "run the same command again")
    assert set(os.listdir(place)) <= {"out.work"}
    bench.completes(place, job)
