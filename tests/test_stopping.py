"""Ctrl-C and SIGTERM as processes meet them, wherever they are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moe_rco.stopping import LINE

BEGIN = """\
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import moe_rco.recipe
def send(number):
    os.kill(os.getpid(), number)
def load(*_):
    {}
moe_rco.recipe.load = load
from moe_rco.cli import main
sys.argv = ["moe-rco", "validate", "x"]
main()
"""
LIBRARY = """
    try:
        send(signal.SIGINT)
    except BaseException:
        raise ImportError("initialization failed")
"""
NOWHERE = """
    class Thing:
        def __del__(self):
            send(signal.SIGINT)
    Thing()
    time.sleep(20)
"""
CLEANING = """
    try:
        send(signal.SIGINT)
    finally:
        try:
            send(signal.SIGINT)
        except BaseException:
            time.sleep(20)
"""
AT_ONCE = """
    import moe_rco.cli
    moe_rco.cli._stopping.line = "gone"
    moe_rco.cli._stopping.at_once()
    try:
        send(signal.SIGINT)
    finally:
        time.sleep(20)
"""
ARGUMENTS = [
    ("send(signal.SIGINT)", 130),
    ("send(signal.SIGTERM)", 143),
    (LIBRARY, 130),
    (NOWHERE, 130),
    (CLEANING, 130),
]


def process(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BEGIN.format(body)], capture_output=True, text=True, check=False, timeout=15
    )


@pytest.mark.parametrize(
    ("body", "code"), ARGUMENTS, ids=["SIGINT", "SIGTERM", "masked", "in __del__", "twice"]
)
def test_one_line_and_the_code_a_shell_expects(body: str, code: int) -> None:
    result = process(body)
    assert (result.stdout, result.stderr, result.returncode) == ("", f"{LINE}\n", code)


def test_where_nothing_is_to_be_cleaned_up_it_ends_at_once() -> None:
    result = process(AT_ONCE)
    assert (result.stdout, result.stderr, result.returncode) == ("", "gone\n", 130)


def test_a_signal_that_was_to_be_ignored_is() -> None:
    command = [
        sys.executable,
        "-c",
        BEGIN.replace("default_int_handler", "SIG_IGN").format("send(signal.SIGINT)\n    raise KeyError(7)"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=15)
    assert result.returncode == 1
    assert "KeyError" in result.stderr


def test_an_error_that_cannot_be_printed_keeps_its_exit_code() -> None:
    """The log lies on the disk that is full."""
    code = BEGIN.format("raise OSError(28, 'No space left on device', 'x')")
    with open("/dev/full", "w") as log:
        result = subprocess.run([sys.executable, "-c", code], stderr=log, check=False, timeout=15)
    assert result.returncode == 2


def test_debug_shows_where_the_system_refused() -> None:
    code = BEGIN.format("raise OSError(28, 'No space left on device', 'x')")
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MOE_RCO_DEBUG": "1"},
    )
    assert shown.returncode == 2
    assert "Traceback" in shown.stderr
    assert "the disk is full" in shown.stderr.splitlines()[-1]
