"""`moe-rco eval` as a user runs it: real processes, lm-eval with both backends, the shipped demo model compressed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from moe_rco import cli
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.recipe import DEMO_MODEL
from moe_rco.report import Report
from tests.compressed import random_job
from tests.e2e.test_prune import command
from tests.forging import change_json
from tests.reports import report

TASKS = ("demo_arithmetic", "demo_choice_code", "demo_text_arithmetic")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model at random precisions, damaged enough to be seen, with a report that names the original."""
    place = tmp_path_factory.mktemp("compressed")
    options = ("prune", "int3-g64", "int4-g64", "bf16")
    random_job(DEMO_MODEL, place / "store", 0, options).write(place / "model", shard_bytes=10**9)
    report(model="demo", model_digest=Checkpoint(DEMO_MODEL).digest()).save(place / "model")
    return place / "model"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def start(cache: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("eval", *map(str, arguments)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MOE_RCO_CACHE": str(cache)},
        # A shell starts background jobs with SIGINT ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def evaluate(cache: Path, *arguments: str | Path) -> tuple[str, str]:
    process = start(cache, *arguments)
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    return output, errors


def files(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def options(tasks: tuple[str, ...] = TASKS, limit: int = 4) -> tuple[str, ...]:
    return ("--tasks", ",".join(tasks), "--limit", str(limit))


def scores(directory: Path, backend: str) -> dict[str, dict[str, Any]]:
    found = json.loads((directory / "report.json").read_text())["scores"]
    return {score["task"]: score for score in found if score["backend"] == backend}


@pytest.fixture(scope="module")
def evaluated(compressed: Path, cache: Path) -> tuple[Path, str]:
    """After one evaluation with transformers: the directory and what was shown."""
    output, errors = evaluate(cache, compressed, *options())
    assert errors.splitlines()[-2:] == ["scoring demo with hf ...", f"scoring {compressed} with hf ..."]
    return compressed, output


@pytest.mark.slow
def test_the_report_has_what_lm_eval_measured(evaluated: tuple[Path, str]) -> None:
    directory, _ = evaluated
    Report.load(directory).check()
    rows = scores(directory, "hf")
    assert rows.keys() == set(TASKS)
    for task, row in rows.items():
        assert (row["items"], row["limit"], row["dtype"]) == (4, 4, "float32")
        own, base = (
            json.loads((directory / row["files"] / part / "results.json").read_text())["results"][task]
            for part in ("", "baseline")
        )
        label = f"{row['metric']},{row['filter']}"
        assert row["score"] == own[label]
        assert row["baseline"]["score"] == base[label]
        assert row["baseline"]["difference"] == pytest.approx(own[label] - base[label])
        assert (directory / row["files"] / f"samples_{task}.jsonl").read_text().count("\n") == 4
    # The original can add; at these precisions text is a little less likely.
    assert rows["demo_arithmetic"]["baseline"]["score"] == 1
    assert rows["demo_text_arithmetic"]["baseline"]["difference"] > 0
    assert rows["demo_text_arithmetic"]["baseline"]["p"] == 0.125  # four items, all worse: 2 of 16 patterns


@pytest.mark.slow
def test_the_table_shows_it(evaluated: tuple[Path, str]) -> None:
    directory, shown = evaluated
    for task, row in scores(directory, "hf").items():
        line = next(line for line in shown.splitlines() if task in line)
        assert f"{row['baseline']['score']:.3f}" in line
        assert f"{row['score']:.3f}" in line
        assert f"{row['baseline']['difference']:+.4f}" in line
        assert len(line) <= 80
    assert str(directory / "report.json") in shown


@pytest.mark.slow
def test_the_original_is_not_scored_again(evaluated: tuple[Path, str], cache: Path) -> None:
    directory, shown = evaluated
    before = (directory / "report.json").read_bytes()
    again, errors = evaluate(cache, directory, *options())
    assert "scoring demo" not in errors
    assert "demo was scored before" in errors
    assert again == shown
    assert (directory / "report.json").read_bytes() == before


@pytest.mark.slow
def test_vllm_gives_the_same_scores(
    evaluated: tuple[Path, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # tests share the cores
    directory, _ = evaluated
    hf = scores(directory, "hf")
    evaluate(cache, directory, "--backend", "vllm", *options())
    assert scores(directory, "hf") == hf
    vllm = scores(directory, "vllm")
    assert vllm.keys() == hf.keys()
    for task, row in vllm.items():
        assert row["score"] == pytest.approx(hf[task]["score"], rel=1e-5)
        assert row["baseline"]["score"] == pytest.approx(hf[task]["baseline"]["score"], rel=1e-5)


@pytest.mark.slow
def test_interrupted_it_leaves_everything_as_it_was(compressed: Path, cache: Path) -> None:
    before = files(compressed)
    process = start(cache, compressed, "--no-baseline", "--tasks", "demo_text_prose")
    log = compressed / "eval" / "hf" / ".demo_text_prose.part" / "log.txt"
    deadline = time.monotonic() + 200
    while not log.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("interrupted")
    assert files(compressed) == before
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.slow
def test_a_killed_command_takes_its_scoring_process_along(compressed: Path, cache: Path) -> None:
    process = start(cache, compressed, "--no-baseline", "--tasks", "demo")
    log = compressed / "eval" / "hf" / ".demo.part" / "log.txt"
    deadline = time.monotonic() + 200
    while not log.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=10)  # scoring all of this would take minutes
    assert not alive


@pytest.mark.slow
def test_an_original_needs_no_report(cache: Path, tmp_path: Path) -> None:
    before = sorted(DEMO_MODEL.iterdir())
    shown, _ = evaluate(cache, DEMO_MODEL, "--output", tmp_path / "out", *options(TASKS[1:2], limit=2))
    assert "demo_choice_code" in shown
    assert "difference" not in shown
    assert len(list(tmp_path.rglob("results.json"))) == 1
    assert sorted(DEMO_MODEL.iterdir()) == before


def test_another_model_than_the_original_is_not_compared_silently(compressed: Path, tmp_path: Path) -> None:
    for path in compressed.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    report(model="demo", model_digest="0" * 64).save(tmp_path)
    result = CliRunner().invoke(cli.app, ["eval", str(tmp_path), *options()])
    assert result.exit_code == 2, result.output
    assert "not, or no longer, the model that this one was made from" in result.stderr
    assert not (tmp_path / "eval").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"max_position_embeddings": 64}, "lm-eval cannot score {}/model so: Invalid configuration: requested max"),
        ({"use_sliding_window": 3}, "hf cannot load {}/model: StrictDataclassFieldValidationError"),
    ],
)  # fmt: skip
def test_what_a_library_refuses_is_said_and_its_log_kept(
    entry: dict[str, int], message: str, tmp_path: Path
) -> None:
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", lambda config: config.update(entry))
    process = start(tmp_path, tmp_path / "model", "--output", tmp_path / "out", *options(TASKS[:1], limit=1))
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 2, errors
    last = errors.splitlines()[-1]
    assert message.format(tmp_path) in last
    log = Path(last.rpartition("(log: ")[2].removesuffix(")"))
    assert "Traceback" in log.read_text()
    assert list((tmp_path / "out").rglob("*")) == [log.parent, log]
