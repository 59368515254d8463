"""Several processes share one run: the result is one process's, and a lost one costs nothing but its time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.killing import written
from tests.tiny_job import save_job


def command(recipe: Path, output: Path, processes: int = 1) -> list[str]:
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*start, "moe_rco.cli", "prune", "--recipe", str(recipe), "--output", str(output)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(recipe: Path, output: Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(recipe, output, processes),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=environment(),
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A recipe for a tiny model, and what one process makes of it."""
    place = tmp_path_factory.mktemp("team")
    recipe = save_job(place, steps=12, refine=24)
    done = run(recipe, place / "alone")
    assert done.returncode == 0, done.stderr
    return recipe, written(place / "alone")


@pytest.mark.slow
def test_two_processes_write_what_one_writes(alone: tuple[Path, dict[str, Any]]) -> None:
    recipe, expected = alone
    output = recipe.parent / "two"
    done = run(recipe, output, 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Reloaded") == 1  # one of them talks
    assert written(output) == expected


def workers(parent: int) -> Iterator[psutil.Process]:
    for process in psutil.Process(parent).children(recursive=True):
        if "moe_rco.cli" in process.cmdline():
            yield process


@pytest.mark.slow
def test_a_lost_process_ends_the_run_and_one_alone_goes_on(alone: tuple[Path, dict[str, Any]]) -> None:
    recipe, expected = alone
    output = recipe.parent / "lost"
    work = output.with_name("lost.work")
    started = subprocess.Popen(
        command(recipe, output, 2),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + 240
    while not (work / "search.safetensors").exists() and time.monotonic() < deadline:
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.02)
    last = next(p for p in workers(started.pid) if p.environ().get("RANK") == "1")
    last.send_signal(signal.SIGKILL)
    _, errors = started.communicate(timeout=100)
    assert started.returncode != 0
    assert not output.exists()
    assert "internal error" not in errors
    done = run(recipe, output)
    assert done.returncode == 0, done.stderr
    assert written(output) == expected
