"""What is said of processes that end in every way there is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from moe_rco.witness import Witness

BEGIN = """\
import ctypes, os, resource, signal, subprocess, sys, time
from moe_rco.witness import Witness
witness = Witness()
witness.begin("it died")
{}
"""


def ended(what: str) -> tuple[int, str]:
    """The exit code of a process that begins with a witness, and what was printed until both had ended."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN.format(what)], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.abort()", -signal.SIGABRT),
        ("resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); ctypes.string_at(0)", -signal.SIGSEGV),
        ("os._exit(127)", 127),  # as the C library does
        ("os.killpg(os.getpgrp(), signal.SIGKILL) if os.setpgrp() is None else None", -signal.SIGKILL),
        ("os.execv('/bin/sleep', ['sleep', '0'])", 0),
    ],
)
def test_it_speaks_for_who_cannot(what: str, code: int) -> None:
    assert ended(what) == (code, "it died\n")


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("witness.over()", 0),
        ("witness.over(); os._exit(3)", 3),
        ("witness.over(); os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_it_is_silent_about_who_has_spoken(what: str, code: int) -> None:
    assert ended(what) == (code, "")


def test_a_program_that_the_run_leaves_behind_does_not_keep_it_waiting() -> None:
    left = (
        "subprocess.Popen(['sleep', '60'], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL); os.abort()"
    )
    code, said = ended(f"resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); {left}")
    assert (code, said) == (-signal.SIGABRT, "it died\n")


def test_a_run_does_without_where_there_is_no_process_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", refused)
    witness = Witness()
    witness.begin("it died")
    witness.over()
