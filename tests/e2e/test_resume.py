"""The main job killed (SIGKILL) again and again: it goes on, and ends in the same bytes as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_rco import progress
from moe_rco.ckpt.shards import read_manifest
from moe_rco.ckpt.store import listed
from moe_rco.ckpt.workdir import TRIAL, WorkDirectory
from tests.killing import written
from tests.running import KILLED, Start, Started, starting
from tests.tiny_job import save_job

Count = Callable[[WorkDirectory], int]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a tiny model, with the demo's tokenizer and a little text."""
    return save_job(tmp_path_factory.mktemp("resume"), steps=24, refine=48)


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    with starting() as begin:
        yield begin


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, start: Start) -> Path:
    run = start(recipe.parent / "undisturbed", "--recipe", str(recipe))
    assert run.ends() == 0, run.log
    return run.place / "out"


def begun(work: WorkDirectory) -> int:
    return work.run.exists()


def stored(work: WorkDirectory) -> int:
    return len(listed(work.store)[1])


def measured(work: WorkDirectory) -> int:
    return (work.path / "measured.safetensors").exists()


def searched(stage: str) -> Count:
    """Steps or passes, as `moe-rco status` counts them."""

    def count(work: WorkDirectory) -> int:
        if not measured(work):
            return 0
        return next(part.done for part in progress.status(work.path).stages if part.name == stage)

    return count


def shards(work: WorkDirectory) -> int:
    return len((read_manifest(work.part().shards) or {"shards": ()})["shards"])


def reloading(work: WorkDirectory) -> int:
    return (work.checkpoint / "model.safetensors.index.json").exists()


def moments(draw: random.Random) -> list[tuple[Count, int]]:
    """When to kill: what to count, and how much of it must be done."""

    def some(count: Count, below: int, kills: int) -> list[tuple[Count, int]]:
        return [(count, least) for least in sorted(draw.sample(range(1, below), kills))]

    return [
        (begun, 0),
        (begun, 1),
        *some(stored, 8, 4),
        (stored, 8),
        (measured, 1),
        *some(searched("search steps"), 24, 3),
        *some(searched("refining passes"), 900, 4),
        *some(shards, 18, 4),
        (reloading, 1),
    ]


def wait_for(run: Started, work: WorkDirectory, count: Count, least: int) -> None:
    deadline = time.monotonic() + 100
    while count(work) < least and run.process.is_alive():
        assert time.monotonic() < deadline, run.log
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute and a half where nothing else runs
def test_killed_twenty_times_it_ends_in_the_same_bytes(recipe: Path, start: Start, undisturbed: Path) -> None:
    draw = random.Random(0)
    place = recipe.parent / "killed"
    work = WorkDirectory(place / "out.work")
    done, names = dict[str, int](), set[str]()
    for number, (count, least) in enumerate(moments(draw)):
        run = start(place, "--recipe", str(recipe))
        wait_for(run, work, count, least)
        time.sleep(draw.uniform(0, 0.02) if number else 0.5)
        assert run.kill() == KILLED, (number, count, least, run.log)
        assert count(work) >= least
        assert os.listdir(place) in ([], ["out.work"])
        found = progress.status(place / "out")
        assert found.state == ("interrupted" if work.run.exists() else "not started")
        for stage in found.stages:
            assert done.get(stage.name, 0) <= stage.done <= max(stage.total, 0), (number, stage)
            done[stage.name] = stage.done
        kept = (path.name for path in work.path.glob("*") if not path.name.startswith(TRIAL))
        names |= {name.removesuffix(".tmp") for name in kept}
    assert number == 19
    run = start(place, "--recipe", str(recipe))
    assert run.ends() == 0, run.log
    assert os.listdir(place) == ["out"]
    assert progress.status(place / "out").state == "finished"
    assert names == {
        "lock", "run.json", "store", "measured.safetensors", "search.safetensors", "checkpoint", "shards.json"
    }  # fmt: skip
    expected = written(undisturbed)
    assert expected["report.json"]["winner"] == "rco, refined", (
        "nothing hangs on the search: choose another recipe"
    )
    assert written(place / "out") == expected


@pytest.mark.slow
def test_a_search_goes_on_with_less_memory(recipe: Path, start: Start) -> None:
    """As the message of a run that had too little advises."""
    place = recipe.parent / "less"
    work, steps = WorkDirectory(place / "out.work"), searched("search steps")
    run = start(place, "--recipe", str(recipe))
    wait_for(run, work, steps, 12)
    assert run.kill() == KILLED, run.log
    done, noted = steps(work), work.run.read_bytes()
    assert done >= 12
    run = start(place, "--recipe", str(recipe), "--set", "execution.mode=streaming")
    wait_for(run, work, lambda work: work.run.read_bytes() != noted, 1)
    assert steps(work) >= done, "the search began anew"
    assert run.ends() == 0, run.log
    assert written(place / "out")["report.json"]["bytes"]["slack"] >= 0


@pytest.mark.slow
def test_two_runs_in_one_place(recipe: Path, start: Start) -> None:
    run = start(recipe.parent / "two", "--recipe", str(recipe))
    work = WorkDirectory(run.place / "out.work")
    wait_for(run, work, stored, 1)
    os.kill(run.process.pid, signal.SIGSTOP)  # it would be ready before the others have begun
    command = [sys.executable, "-m", "moe_rco.cli"]
    refused = subprocess.run(
        [*command, "prune", "--recipe", recipe], cwd=run.place, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert len(refused.stderr.splitlines()) == 1
    assert f"process {run.process.pid} on {socket.gethostname()}, since" in refused.stderr
    shown = subprocess.run(
        [*command, "status", "out", "--json"], cwd=run.place, capture_output=True, text=True, check=True
    )
    status = json.loads(shown.stdout)
    run.kill()
    assert (status["state"], status["process"]["pid"]) == ("running", run.process.pid)
    assert progress.status(run.place / "out").state == "interrupted"
