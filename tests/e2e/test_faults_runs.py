"""One fault of every kind that may meet a run; `python -m eval.faults_runs` tries a hundred."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.runfaults.bench import Bench, MissedError
from tests.runfaults.disks import UnavailableError
from tests.runfaults.kinds import KINDS
from tests.running import starting

SEED = 5


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    # Also other users work here, and pytest keeps its own directories from them.
    with TemporaryDirectory(prefix="moe-rco-faults-") as home, starting("tests.runfaults.kinds") as start:
        Path(home).chmod(0o755)
        yield Bench(Path(home), start, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_disturbed_run_says_why_and_goes_on_to_the_same_bytes(bench: Bench, kind: str) -> None:
    draw = random.Random(f"{SEED} {kind}")
    for _ in range(12):
        try:
            KINDS[kind][0](bench, draw)
        except MissedError:
            continue
        except UnavailableError as error:
            pytest.skip(str(error))
        return
    pytest.fail("it always came too late")
