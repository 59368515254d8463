"""Bad input as `python -m eval.faults` tries it, less of it; and that its judge sees what is wrong."""

from __future__ import annotations

import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults import judge
from tests.faults.judge import Case, judged
from tests.tiny_job import save_job


@pytest.mark.slow
def test_every_case_is_handled(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "eval.faults",
        "--cases",
        "24",
        "--seed",
        "1",
        "--output",
        str(tmp_path / "table.md"),
    ]
    kinds = ["--kinds", "recipe", "checkpoint", "output", "text", "store"]
    done = subprocess.run([*command, *kinds], capture_output=True, text=True, check=False, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "| all | 24 | 24 | 0 |" in (tmp_path / "table.md").read_text()


def leave(place: Path, rng: random.Random) -> list[str]:
    return ["init", "model", "-o", "stray.yaml"]


def fine(place: Path, rng: random.Random) -> list[str]:
    return ["validate", "recipe.yaml"]


def nothing(place: Path, rng: random.Random) -> list[str]:
    return ["validate"]


@pytest.mark.parametrize(
    ("make", "refused", "expected"),
    [
        (leave, False, "changed stray.yaml"),
        (fine, True, "was not refused"),
        (fine, False, ""),
        (nothing, True, ""),
    ],
)
def test_the_judge(
    make: Callable[[Path, random.Random], list[str]], refused: bool, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    save_job(tmp_path / "base", steps=0, refine=0)
    found = judged(Case("kind", "name", tmp_path / "base", make, refused), 0, tmp_path / "case")
    assert found.partition(": ")[2] == expected


def elsewhere() -> None:
    (Path.cwd().parent / "stray").write_text("x")


def through_a_link() -> None:
    Path("out").symlink_to(Path.cwd().parent)
    (Path("out") / "stray").mkdir()


def moved_out() -> None:
    Path("out").mkdir()
    Path("out").rename(Path.cwd().parent / "stray")


def removed_elsewhere() -> None:
    directory = os.open("..", os.O_RDONLY)
    with suppress(OSError):
        os.unlink("nothing", dir_fd=directory)


def ran_code() -> None:
    exec(compile("pass", str(Path.cwd() / "model" / "modeling.py"), "exec"))


def unpickled() -> None:
    pickle.loads(pickle.dumps(Path("x")))  # noqa: S301


def started() -> None:
    subprocess.run(["true"], check=True)


def connected() -> None:
    with socket.socket() as own, suppress(OSError):
        own.connect(("127.0.0.1", 9))


def kept_a_temporary_file() -> None:
    tempfile.mkstemp()


def swallowed_memory() -> None:
    try:
        bytearray(8 << 30)
    except MemoryError:
        sys.stderr.write("error: out of memory; give it more\n")
        sys.exit(2)


def failed() -> None:
    raise ValueError("of no use to anyone")


def hung() -> None:
    time.sleep(30)


def worked_for_ever() -> None:
    while True:
        pass


def crashed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def harmless() -> None:
    with tempfile.TemporaryFile(dir=".") as file:
        file.write(b"x")
    Path(os.devnull).write_text("x")


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (elsewhere, "did open"),
        (through_a_link, "did os.mkdir"),
        (moved_out, "did os.rename"),
        (removed_elsewhere, "did os.remove"),
        (ran_code, "did ran"),
        (unpickled, "did unpickled"),
        (started, "did subprocess.Popen"),
        (connected, "did socket.connect"),
        (kept_a_temporary_file, "left tmp"),
        (swallowed_memory, "took more than"),
        (failed, "ended with 1: ValueError"),
        (hung, "no end after"),
        (worked_for_ever, "no end after"),
        (crashed, "ended with -9"),
        (harmless, ""),
    ],
)
def test_the_judge_sees_what_a_command_does(
    action: Callable[[], None], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "recipe.yaml").write_text("version: 1")
    monkeypatch.setattr(judge.cli, "app", lambda arguments, prog_name: action())
    monkeypatch.setattr(judge, "SECONDS", 1)
    monkeypatch.setattr(judge, "PATIENCE", 4 if action is hung else 300)
    found = judged(Case("kind", "name", tmp_path / "base", fine), 0, tmp_path / "case")
    wrong = found.partition(": ")[2]
    assert wrong.startswith(expected) if expected else not wrong, wrong
