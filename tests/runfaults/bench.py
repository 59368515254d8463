"""A tiny job, what it gives undisturbed, and the rules by which a disturbed run of it is judged."""

from __future__ import annotations

import itertools
import math
import os
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_rco.explain import unsaid
from tests.killing import tree, written
from tests.running import Start, Started
from tests.tiny_job import save_job

THREE = ("--set", "budget=[40%, 25%, 17%]")
_NOISE = ("Traceback", "internal error", "Exception ignored", "terminate called", "Aborted")
PATIENCE = 100


class MissedError(Exception):
    """The fault came too late to be one."""


@dataclass
class Job:
    """A recipe with some overrides. `output` is what it gives undisturbed, `expected` its bytes, `stages` what it says it
    does, in `seconds`.
    """

    arguments: tuple[str, ...]
    output: Path
    expected: dict[str, Any]
    stages: tuple[str, ...]
    seconds: float


@dataclass
class Bench:
    """Places below `home` in which runs are disturbed, each in one of its own."""

    home: Path
    start: Start
    steps: int = 8
    jobs: dict[tuple[str, ...], Job] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    notes: Counter[str] = field(default_factory=Counter)
    _spilling: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.home.chmod(0o755)  # also other users work here
        self.recipe = save_job(self.home, steps=self.steps, refine=2 * self.steps)
        self.model = self.home / "model"

    def job(self, *overrides: str) -> Job:
        if overrides not in self.jobs:
            place = self.place()
            arguments = ("--recipe", str(self.recipe), *overrides)
            if not self.jobs:
                self.ended(self.start(place, *arguments), 0)  # what it imports is then in the disk's cache
                shutil.rmtree(place / "out")
            began = time.monotonic()
            run = self.start(place, *arguments)
            self.ended(run, 0)
            seconds = time.monotonic() - began
            stages = tuple(re.findall(r"^(.*) \.\.\.$", run.log, re.MULTILINE))
            self.jobs[overrides] = Job(arguments, place / "out", written(place / "out"), stages, seconds)
        return self.jobs[overrides]

    def spilling(self) -> tuple[str, ...]:
        """Overrides with which memory is so small that activations are kept in files."""
        if not self._spilling:
            streaming = ("--set", "execution.mode=streaming", "--set", "execution.memory_limit=1MiB")
            line = self.refused(self.start(self.place(), "--recipe", str(self.recipe), *streaming))
            least = re.search(r"at least ([0-9.]+) MiB", line)
            assert least is not None, line
            limit = math.ceil(float(least[1]))
            self._spilling = (*streaming[:3], f"execution.memory_limit={limit}MiB")
        return self._spilling

    def place(self) -> Path:
        path = self.home / f"place{next(self.numbers)}"
        path.mkdir()
        return path

    def copy_of_model(self, place: Path) -> tuple[str, ...]:
        """A model of a place's own, to be damaged, and the arguments that name it."""
        model = shutil.copytree(self.model, place / "model")
        return "--set", f"model={model}", "--set", f"calibration.data={model / 'text.jsonl'}"

    @staticmethod
    def ended(run: Started, *codes: int) -> int:
        code = run.ends()
        assert code in codes, f"exit {code}, not {codes}: {_tail(run.log)}"
        for noise in _NOISE:
            assert noise not in run.log, f"{noise} in: {_tail(run.log)}"
        return code

    def refused(self, run: Started, *parts: str, code: int = 2) -> str:
        """That a run ended as it should where it cannot go on: with one line, and no output. The line.

        Each of `parts` is a pattern. Raises MissedError where the run came to its end.
        """
        if self.ended(run, 0, code) == 0:
            raise MissedError
        lines = [line for line in run.log.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, f"{len(lines)} lines of error: {_tail(run.log)}"
        assert run.log.splitlines()[-1] == lines[0], f"not the last line: {_tail(run.log)}"
        for part in parts:
            assert re.search(part, lines[0]), f"'{part}' is not in: {lines[0]}"
        return lines[0]

    def old_output(self, place: Path) -> dict[str, bytes | None]:
        """What another recipe gave lies where the run is to write; its bytes."""
        shutil.copytree(self.job("--set", "budget=40%").output, place / "out")
        return tree(place / "out")

    def completes(self, place: Path, job: Job, *arguments: str) -> None:
        """That the same command, undisturbed, ends in the same bytes, and leaves nothing else."""
        self.ended(self.start(place, *job.arguments, *arguments), 0)
        self.right(place, job)

    def right(self, place: Path, job: Job) -> None:
        found = written(place / "out")
        different = sorted(
            name for name in found.keys() | job.expected.keys() if _differs(name, found, job.expected)
        )
        assert not different, f"other bytes in {different}"
        left = {name for name in os.listdir(place) if name.startswith(("out", ".out"))}
        assert left == {"out"}, f"left behind: {left}"


def _differs(name: str, found: dict[str, Any], expected: dict[str, Any]) -> bool:
    ours, theirs = found.get(name), expected.get(name)
    if name.endswith("recipe.yaml") and ours and theirs:  # it says where the model was
        ours, theirs = ([line for line in lines if "/model" not in line] for lines in (ours, theirs))
    if (
        name.endswith(("report.json", "plan.json", "manifest.json", "curve.json", "curve.svg"))
        and ours
        and theirs
    ):
        return _placeless(ours) != _placeless(theirs)
    return ours != theirs


_PLACED = ("model", "recipe_digest", "recipe", "manifest", "plan.json")
"""What tells of the recipe, which names the model, and digests of what does."""


def _placeless(value: Any) -> Any:
    """Without digests of the recipe and names of the model, which has been copied."""
    if isinstance(value, dict):
        return {key: part for key, part in value.items() if key not in _PLACED}
    if isinstance(value, bytes):
        return re.sub(rb"\S*/model\b|\b[0-9a-f]{64}\b", b"", value)
    return value


def said_for(run: Started) -> None:
    """That one line, the last, was said for a run that could not itself."""
    said = run.log.splitlines()
    assert said[-1:] == [f"error: {unsaid()}"], f"not said: {_tail(run.log)}"
    assert sum(line.startswith("error: ") for line in said) == 1, _tail(run.log)


def reached(run: Started, text: str) -> None:
    """Wait until a run has said something. Raises MissedError where it ended before."""
    waited(run, lambda: text in run.log)


def waited(run: Started, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if not run.process.is_alive():
            raise MissedError
        assert time.monotonic() < deadline, _tail(run.log)
        time.sleep(0.001)


def a_moment(run: Started, job: Job, draw: random.Random) -> str:
    """Wait for a random moment of a random stage; its name."""
    stage = draw.choice(job.stages)
    reached(run, f"{stage} ...")
    time.sleep(draw.choice((0, draw.uniform(0, 0.1), draw.uniform(0, job.seconds / 8))))
    return stage


def _tail(log: str) -> str:
    return " | ".join(log.splitlines()[-30:])[-1500:] or "(nothing was printed)"
