"""Several budgets in one run, from the command line: killed in the middle, and what it leaves in the end."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_rco import progress
from moe_rco.ckpt.workdir import WorkDirectory
from moe_rco.recipe import DEMO_CALIBRATION, DEMO_MODEL
from tests import killing
from tests.e2e.test_prune import expert_bytes, report_of, run
from tests.tiny_models import save_tiny

RECIPE = """\
version: 1
model: {model}
options: [prune, int4-g64, bf16]
budget: [25%, 50%]
quantizer: {{method: rtn}}
calibration: {{data: {model}/text.jsonl, sequences: 24, sequence_length: 32, holdout: 0.25}}
search: {{steps: 6, refine: 6, samples: 2, batch: 2, evaluate_every: 2}}
output: out
"""
PARTS = ("50pct", "25pct")


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "moe_rco.cli", *map(str, words)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("budgets")
    model = save_tiny("qwen3_moe", place / "model", vocab_size=4096)
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, model)
    with DEMO_CALIBRATION.open(encoding="utf-8") as source:
        (model / "text.jsonl").write_text("".join(itertools.islice(source, 40)), encoding="utf-8")
    path = place / "recipe.yaml"
    path.write_text(RECIPE.format(model=model), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def written(recipe: Path) -> tuple[Path, str]:
    """One undisturbed run: its output and what it printed."""
    output = recipe.parent / "undisturbed"
    done = run(command("prune", "--recipe", recipe, "--output", output))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("calibrate and quantise: done") == 1  # once for both budgets
    return output, done.stdout


@pytest.mark.slow
def test_every_budget_has_a_model_and_the_curve_its_figures(written: tuple[Path, str]) -> None:
    output, printed = written
    assert {path.name for path in output.iterdir()} == {*PARTS, "curve.json", "curve.svg", "report.html"}
    assert not output.with_name("undisturbed.work").exists()
    curve = json.loads((output / "curve.json").read_text())
    assert [point["directory"] for point in curve["points"]] == list(PARTS)
    for point, part, divisor in zip(curve["points"], PARTS, (2, 4), strict=True):
        report, size = report_of(output / part), expert_bytes(output / part)
        budget = report["bytes"]["experts_before"] // divisor
        assert size == point["expert_bytes"] == report["bytes"]["experts_after"] <= budget
        assert point["budget_bytes"] == report["budget"]["bytes"] == budget
        assert (point["kl"], point["kl_stderr"]) == (report["kl"], report["kl_stderr"])
        assert point["candidates"] == report["candidates"]
        assert report["output"] == str(output / part)
        assert f"{size:,}" in printed
        model: Any = AutoModelForCausalLM.from_pretrained(output / part)
        assert bool(torch.isfinite(model(torch.arange(8)[None]).logits).all())
    found = progress.status(output)
    assert found.state == "finished"
    assert [result.expert_bytes for result in found.results] == [p["expert_bytes"] for p in curve["points"]]


@pytest.mark.slow
def test_the_smaller_budget_starts_from_the_larger(written: tuple[Path, str]) -> None:
    names = [{c["name"] for c in report_of(written[0] / part)["candidates"]} for part in PARTS]
    assert "from ratio 0.5" in names[1] - names[0]
    assert "fisher seed" in names[0] & names[1]


@pytest.mark.slow
def test_killed_between_and_within_budgets_it_ends_in_the_same_files(
    recipe: Path, written: tuple[Path, str]
) -> None:
    output = recipe.parent / "killed"
    work = WorkDirectory.of(output)
    first, second = (work.part(part) for part in PARTS)
    made: dict[Path, int] = {}
    for moment in (first.directory / "found.safetensors", first.checkpoint / "report.json", second.shards):
        process = subprocess.Popen(
            command("prune", "--recipe", recipe, "--output", output), stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 100
        while not moment.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL, moment
        assert not output.exists()
        files = [*work.store.rglob("*.safetensors"), first.checkpoint / "report.json"]
        now = {path: path.stat().st_mtime_ns for path in files if path.exists()}
        assert made.items() <= now.items()  # neither the store nor the first model is made again
        made = now
    assert first.checkpoint / "report.json" in made
    stages = {stage.name: (stage.done, stage.total) for stage in progress.status(output).stages}
    assert stages["budgets finished"] == (1, 2)
    assert stages["search steps"] == (12, 12)
    done = run(command("prune", "--recipe", recipe, "--output", output))
    assert done.returncode == 0, done.stderr
    assert "50pct" not in done.stderr
    assert killing.written(output) == killing.written(written[0])
    assert not work.path.exists()


@pytest.mark.slow
def test_what_was_written_can_be_replaced_and_nothing_else(recipe: Path, written: tuple[Path, str]) -> None:
    output = recipe.parent / "replaced"
    shutil.copytree(written[0], output)
    one = ("--set", "budget=50%", "--set", "search.method=fisher")
    arguments = command("prune", "--recipe", recipe, "--output", output, "--overwrite", *one)
    (output / "mine.txt").write_text("x")
    refused = run(arguments)
    assert refused.returncode == 2
    assert "was not written by moe-rco" in refused.stderr
    (output / "mine.txt").unlink()
    assert run(arguments).returncode == 0
    assert (output / "report.json").is_file()
    assert not (output / "curve.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "parts"),
    [
        ("[50%,0.5%]", ["ratio 0.005", "too small"]),
        ("[50%,99999GiB]", ["97.66 TiB", "nothing needs to be done"]),
        ("[50%,{avg_bits: 8.0}]", ["ratio 0.5 and 8 bits per weight are the same", "keep one of them"]),
    ],
)
def test_a_list_with_a_wrong_budget_is_refused_before_any_work(
    recipe: Path, tmp_path: Path, budget: str, parts: list[str]
) -> None:
    done = run(
        command("prune", "--recipe", recipe, "--output", tmp_path / "out", "--set", f"budget={budget}")
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    for part in parts:
        assert part in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_dry_run_has_a_row_for_every_budget(recipe: Path, tmp_path: Path) -> None:
    done = run(command("prune", "--recipe", recipe, "--output", tmp_path / "out", "--dry-run"))
    assert done.returncode == 0, done.stderr
    assert "(ratio 0.5)" in done.stdout
    assert "(ratio 0.25)" in done.stdout
    assert not list(tmp_path.iterdir())
