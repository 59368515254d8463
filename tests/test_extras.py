"""Commands in an environment that has what the package and one of its extras declare, and nothing else."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from moe_rco.recipe import DEMO_MODEL
from tests.e2e.test_prune import QUICK

LITTLE = [part for setting in QUICK for part in ("--set", setting)]


def declared(name: str, extras: frozenset[str], seen: set[tuple[str, str]]) -> Iterator[str]:
    """The distributions that an installer would bring along, itself first."""
    yield name
    for extra in (extras | {""}) - {extra for known, extra in seen if known == name}:
        seen.add((name, extra))
        for line in distribution(name).requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                yield from declared(canonicalize_name(needed.name), frozenset(needed.extras), seen)


def environment(place: Path, extra: str) -> Path:
    """The Python of an environment as ``pip install moe_rco[extra]`` makes it, of links into this one."""
    venv.create(place, symlinks=True)
    (site,) = place.glob("lib/python*/site-packages")
    for name in set(declared("moe-rco", frozenset({extra}), set())):
        found = distribution(name)
        for entry in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / entry).exists():
                (site / entry).symlink_to(Path(str(found.locate_file(entry))))
    return place / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("", ("prune", "--recipe", "demo", "--output", "{}/out", *LITTLE)),
        ("eval", ("eval", DEMO_MODEL, "--tasks", "demo_choice_code", "--limit", "2", "--output", "{}/out")),
    ],
)
def test_a_command_needs_nothing_undeclared(tmp_path: Path, extra: str, arguments: tuple[str, ...]) -> None:
    python = environment(tmp_path / "environment", extra)
    words = [str(word).format(tmp_path) for word in arguments]
    done = subprocess.run(
        [python, "-m", "moe_rco.cli", *words],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "MOE_RCO_CACHE": str(tmp_path / "cache")},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out").is_dir()
    absent = subprocess.run([python, "-c", "import pytest"], capture_output=True, check=False)
    assert absent.returncode == 1
