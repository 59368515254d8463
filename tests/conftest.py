"""Settings for every test: no network, one thread, no colour; and a recipe to start from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None)  # how long an example takes depends on what else runs
settings.load_profile("suite")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and their tensors are small
for _name in ("FORCE_COLOR", "COLUMNS", "MOE_RCO_DEBUG"):
    os.environ.pop(_name, None)

import torch  # noqa: E402

from moe_rco.adapters import FAMILIES  # noqa: E402
from tests.calibrated import Calibration, calibration_of  # noqa: E402

torch.set_num_threads(1)

MINIMAL = """\
version: 1
model: demo
options: [prune, int4-g64, int8-g64, bf16]
budget: {ratio: 0.25}
calibration:
  data: demo
output: out/test
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads in each of two processes on two cores wait for each other: thirty times as long."""
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(1)
    assert left == 1, f"this test leaves torch with {left} threads to all that follow"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A small valid recipe in a file; rewrite it to make it wrong."""
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def ready(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """A tiny model of every family, calibrated and quantised."""
    return calibration_of(request.param, tmp_path_factory.mktemp("calibrated"))
