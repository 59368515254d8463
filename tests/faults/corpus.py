"""All bad input there is: sound directories are made once, and every case changes a copy."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from eval.faults_table import Row
from tests.faults import checkpoints, outputs, recipes, stores, texts
from tests.faults.judge import Case, judged
from tests.killing import written
from tests.tiny_job import save_job

KINDS = {"recipe": 0.42, "checkpoint": 0.25, "output": 0.16, "text": 0.12, "store": 0.05}
"""Which share of the cases is of which kind."""
TITLES = {
    "recipe": "recipes and settings: fuzzed YAML, bombs, wrong types and values",
    "checkpoint": "checkpoints: cut, contradictory, lying, leading out of their directory, not finite",
    "output": "outputs changed by hand or by a bit: plan, report, manifest, config, weights",
    "text": "calibration text: empty, binary, broken, huge, of the wrong form",
    "store": "what an interrupted run has kept: flipped bits, lost and foreign files",
}


class Corpus:
    """Cases below a directory; the same seed gives the same ones."""

    def __init__(self, place: Path) -> None:
        self.place, self.job = place, _saved(place / "job")

    def cases(self, kind: str, count: int, seed: int) -> list[Case]:
        """Some of a kind of `KINDS`."""
        rng = random.Random(f"{kind} {seed}")
        if kind == "output":
            return outputs.cases(self._finished(), self._several(), count, rng)
        if kind == "store":
            expected = written(self._finished() / "done")
            return stores.cases(self._interrupted(), expected, count, rng)
        if kind == "checkpoint":
            return checkpoints.cases([self.job, *self._other_families()], count, rng)
        module = {"recipe": recipes, "text": texts}[kind]
        return module.cases(self.job, count, rng)

    def tried(self, kind: str, count: int, seed: int, only: int | None = None) -> Iterator[tuple[int, str]]:
        """Number and what went wrong, if anything, of every case."""
        for number, case in enumerate(self.cases(kind, count, seed)):
            if only is None or number == only:
                yield number, judged(case, seed * 100_003 + number, self.place / "case")

    def row(self, kind: str, count: int, seed: int) -> Row:
        found = dict(self.tried(kind, count, seed))
        failed = [f"--kinds {kind} --seed {seed} --only {n}: {wrong}" for n, wrong in found.items() if wrong]
        return Row(TITLES[kind], len(found), failed)

    def _other_families(self) -> list[Path]:
        made = []
        for family in ("qwen2_moe", "mixtral"):
            place = self.place / family
            made.append(place if place.exists() else _saved(place, family))
        return made

    def _command(self, directory: Path, *settings: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "moe_rco.cli", "prune", "--recipe", "recipe.yaml"]
        sets = [part for setting in settings for part in ("--set", setting)]
        return subprocess.Popen(
            [*command, *sets], cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _copy(self, name: str) -> Path:
        return shutil.copytree(self.job, self.place / name)

    def _done(self, name: str, *settings: str) -> Path:
        """A directory with a finished output, `done`, and nothing else."""
        place = self.place / name
        if not place.exists():
            run = self._copy(f"{name}-run")
            if self._command(run, *settings).wait():
                raise RuntimeError("the sound job failed")
            place.mkdir()
            (run / "out").rename(place / "done")
        return place

    def _finished(self) -> Path:
        return self._done("finished")

    def _several(self) -> Path:
        return self._done("several", "budget=[40%,17%]", "search.steps=0")

    def _interrupted(self) -> Path:
        """A directory with a job that was killed in its search."""
        place = self.place / "interrupted"
        if not place.exists():
            self._copy(place.name)
            process, search = self._command(place), place / "out.work" / "search.safetensors"
            while process.poll() is None and not search.exists():
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            if not search.exists():
                raise RuntimeError("the sound job was over before it could be killed")
        return place


def _saved(place: Path, family: str = "qwen3_moe") -> Path:
    """A directory with a sound job. Cases are copies of it: the recipe must not lead back to the first one."""
    place.mkdir(parents=True)
    save_job(place, steps=30, refine=0, family=family)
    path = place / "recipe.yaml"
    path.write_text(path.read_text().replace(f"{place}/", ""))
    return place
