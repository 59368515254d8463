"""docs/new-family.md, followed to the letter: in a copy without OLMoE it is added, and the family's tests pass."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from eval.mutations import ROOT, copy
from tests.tiny_models import save_tiny

PAGE = (ROOT / "docs" / "new-family.md").read_text(encoding="utf-8")
TITLED: dict[str, str] = dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE, re.DOTALL))
ADAPTER, TINY, RECIPE = TITLED


def test_the_page_has_what_is_there() -> None:
    assert len(PAGE.splitlines()) <= 80
    assert (ROOT / ADAPTER).read_text() == TITLED[ADAPTER]
    assert TITLED[TINY] in (ROOT / TINY).read_text()
    assert (ROOT / RECIPE).read_text().endswith(TITLED[RECIPE])
    for name in re.findall(r"`([\w/]+\.py)`", PAGE):
        assert (ROOT / name).exists() or (ROOT / "moe_rco" / "adapters" / name).exists(), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_following_it_adds_the_family(tmp_path: Path) -> None:
    model, place = save_tiny("olmoe", tmp_path / "model"), copy(tmp_path / "copy")
    (place / ADAPTER).unlink()
    (place / RECIPE).unlink()
    (place / TINY).write_text((place / TINY).read_text().replace(TITLED[TINY], ""))
    environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *words],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    before = run("moe_rco.cli", "inspect", str(model))
    assert before.returncode == 2
    assert "model_type 'olmoe' in config.json is not supported" in before.stderr

    (place / ADAPTER).write_text(TITLED[ADAPTER])
    start, families, rest = (place / TINY).read_text().partition("FAMILIES: dict[str, dict[str, Any]] = {\n")
    (place / TINY).write_text(start + families + TITLED[TINY] + rest)
    (place / RECIPE).write_text(TITLED[RECIPE])
    inspected = run("moe_rco.cli", "inspect", str(model))
    assert inspected.returncode == 0, inspected.stderr
    assert "olmoe" in inspected.stdout
    assert run("moe_rco.cli", "validate", "olmoe-1b-7b-12gb").returncode == 0
    (command,) = re.findall(r"```bash\npython -m (pytest .*)\n", PAGE)
    passed = run(*shlex.split(command), "-p", "no:cacheprovider", "--rootdir", str(place))
    assert passed.returncode == 0, passed.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", passed.stdout)[0]) > 10
