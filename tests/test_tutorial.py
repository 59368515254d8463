"""The tutorial, command by command, with little calibration text; and the page on budgets."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import requests
import yaml

from moe_rco import recipe
from moe_rco.recipe import DEMO_MODEL
from tests.documents import blocks, commands
from tests.e2e.test_prune import QUICK, command

pytest.importorskip("vllm", reason="vLLM is not installed")

DOCS = Path(__file__).resolve().parent.parent / "docs"
TUTORIAL = (DOCS / "tutorial.md").read_text(encoding="utf-8")
BUDGET = (DOCS / "budget.md").read_text(encoding="utf-8")
INSTALLS = ("make demo", ".venv/bin/pip", "source ")  # what runs this test has done that
LITTLE = [part for setting in QUICK for part in ("--set", setting)]
DRY = "moe-rco prune --recipe demo --output out/first --dry-run"
PATIENCE = 280


def run(place: Path, words: list[str]) -> str:
    environment = {**os.environ, "MOE_RCO_CACHE": str(place / "cache")}
    done = subprocess.run(
        words, cwd=place, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, (words, done.stderr[-2000:])
    return done.stdout


@contextmanager
def served(place: Path, words: list[str], port: str) -> Iterator[None]:
    with (place / "server.log").open("wb") as log:
        process = subprocess.Popen(words, cwd=place, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert process.poll() is None, (place / "server.log").read_text()[-2000:]
            with suppress(requests.ConnectionError):
                if requests.get(f"http://localhost:{port}/health", timeout=10).ok:
                    break
            time.sleep(0.5)
        yield
    finally:
        process.send_signal(signal.SIGINT)  # killed, it would leave its engine running
        process.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_does_what_the_page_says(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    waiting: list[str] = []
    printed: dict[str, str] = {}
    for line in commands(TUTORIAL):
        if line.startswith(INSTALLS):
            continue
        words = shlex.split(line.replace("8000", port).replace("/models/Qwen3-30B-A3B", str(DEMO_MODEL)))
        if words[0] == "curl":  # the server that the command before started
            with served(tmp_path, waiting, port):
                answer = json.loads(run(tmp_path, words))
            assert re.search(r"[0-9]", answer["choices"][0]["text"])
            continue
        words = command(*words[1:])
        match line.split()[1]:
            case "serve":  # compiled it starts in tests/e2e/test_serve.py
                waiting = [*words, "--enforce-eager"]
                continue
            case "prune":
                words += LITTLE
                if "my.yaml" in words:
                    words += ["--set", "calibration.data=demo", "--set", "options=[prune, int4-g64, bf16]"]
            case "eval":
                words += ["--limit", "2", "--tasks", "demo_choice_code"]
        printed[line] = " ".join(run(tmp_path, words).split())
    dry, inspected, verified = blocks(TUTORIAL, "text")
    for line in dry.splitlines():
        assert line == "..." or " ".join(line.split()) in printed[DRY], line
    assert inspected.splitlines()[0] in printed["moe-rco inspect out/demo"]
    for line in verified.splitlines():
        assert " ".join(line.split()[:2]) in printed["moe-rco verify out/demo"], line
    for file in ("report.html", "report.json", "plan.json", "recipe.yaml", "manifest.json"):
        assert (tmp_path / "out" / "demo" / file).is_file()
    assert (tmp_path / "compare.html").is_file()
    assert not (tmp_path / "out" / "first").exists()


def test_what_the_tutorial_shows_adds_up() -> None:
    """The figures of a whole run, which is not made here."""
    _, inspected, verified = blocks(TUTORIAL, "text")
    _, columns, *layers, last = inspected.splitlines()
    assert re.findall(r"\S+-g\d+", columns) == ["int2-g64", "int3-g64", "int4-g64", "int4-g32"]
    rows = [[int(number.replace(",", "")) for number in line.split()] for line in layers]
    assert [row[0] for row in rows] == list(range(6))
    assert all(row[1] == sum(row[2:6]) == 32 for row in rows)
    sums = [sum(column) for column in zip(*rows, strict=True)]
    assert [int(number.replace(",", "")) for number in last.split()[1:]] == sums[1:]
    assert f"experts take {sums[-1]:,} bytes of 2,359,296" in verified
    assert recipe.load("demo").budget[0].ratio == 0.25


def test_the_budgets_are_read_as_the_page_says() -> None:
    base = {
        "version": 1,
        "model": "demo",
        "options": ["int4-g64"],
        "calibration": {"data": "demo"},
        "output": "x",
    }
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (.*) \|$", BUDGET, re.MULTILINE)
    assert [form for form, _ in rows] == ["fit", "bytes", "ratio", "avg_bits"]
    for form, examples in rows:
        for example in re.findall(r"`([^`]+)`", examples):
            loaded = recipe.parse(yaml.safe_dump(base | {"budget": yaml.safe_load(example)}))
            assert loaded.budget[0].form == form
    for block in blocks(BUDGET, "yaml"):
        recipe.parse(yaml.safe_dump(base | yaml.safe_load(block)))
    (line,) = commands(BUDGET)
    setting = shlex.split(line)[shlex.split(line).index("--set") + 1]
    found = recipe.parse(yaml.safe_dump(base | {"budget": "99%"}), overrides=[setting])
    assert [budget.ratio for budget in found.budget] == [0.5, 0.35, 0.25]
