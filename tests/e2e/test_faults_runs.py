"""One fault of every kind that may meet a run; `python -m eval.faults_runs` tries a hundred."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from tests.runfaults.bench import Bench, MissedError
from tests.runfaults.disks import UnavailableError
from tests.runfaults.kinds import KINDS
from tests.running import starting

SEED = 5


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    home = tmp_path_factory.mktemp("faults")
    for parent in itertools.takewhile(lambda path: path.name.startswith(("pytest-", "popen-")), home.parents):
        parent.chmod(0o755)  # also other users work here
    with starting("tests.runfaults.kinds") as start:
        yield Bench(home, start, steps=2)


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
