"""The main job as a user runs it: the command line, real processes, the shipped demo model with little text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_rco.ckpt.reader import Checkpoint
from tests import killing

SMALL = (
    "calibration.sequences=48",
    "calibration.sequence_length=128",
    "search.steps=4",
    "search.refine=4",
    "search.samples=2",
    "search.batch=2",
    "search.evaluate_every=2",
)

QUICK = (*SMALL, "search.steps=0", "search.refine=0", "quantizer.method=rtn")
"""Where something is to be there, whatever its quality."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moe_rco.cli", *arguments]


def prune_command(output: Path, *overrides: str) -> list[str]:
    sets = [part for override in (*SMALL, *overrides) for part in ("--set", override)]
    return command("prune", "--recipe", "demo", "--output", str(output), *sets)


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One finished run at 25 % of the bytes: its directory and what it printed."""
    output = tmp_path_factory.mktemp("e2e") / "demo"
    done = run(prune_command(output))
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def expert_bytes(directory: Path) -> int:
    tensors = Checkpoint(directory, allow_quantized=True).tensors
    return sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)


def report_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "report.json").read_text())


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_bytes(written: tuple[Path, str], tmp_path: Path) -> None:
    """Also where Python orders its sets otherwise."""
    arguments = prune_command(tmp_path / "again")
    done = subprocess.run(
        arguments, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "17"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert killing.written(tmp_path / "again") == killing.written(written[0])


@pytest.mark.slow
def test_files_fit_the_budget_and_the_report_says_so(written: tuple[Path, str]) -> None:
    output, _ = written
    report = report_of(output)
    size = expert_bytes(output)
    assert size == report["bytes"]["experts_after"] == json.loads((output / "plan.json").read_text())["cost"]
    budget = report["bytes"]["budget"]
    assert budget == report["bytes"]["experts_before"] // 4
    assert 0 <= budget - size < 0.005 * budget
    assert report["reload"]["passed"]
    on_disk = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert report["bytes"]["total"] <= on_disk < report["bytes"]["total"] + 500_000  # headers
    assert not output.with_name("demo.work").exists()


@pytest.mark.slow
def test_the_summary_shows_what_the_report_says(written: tuple[Path, str]) -> None:
    output, printed = written
    report = report_of(output)
    for part in (
        "before",
        "budget (ratio 0.25)",
        "after",
        f"{report['bytes']['experts_after']:,}",
        "Reloaded",
        "(predicted ",
    ):
        assert part in printed
    for domain in report["domains"]:
        assert domain["name"] in printed
        assert f"{domain['kl']:.5f}" in printed
    assert len(report["layers"]) == 6
    assert {domain["name"] for domain in report["domains"]} == {"arithmetic", "code", "prose", "technical"}
    kls = {candidate["name"]: candidate["kl"] for candidate in report["candidates"]}
    assert kls[report["winner"]] <= min(kl for name, kl in kls.items() if name != "rco")


@pytest.mark.slow
def test_transformers_loads_and_generates(written: tuple[Path, str]) -> None:
    """In a process of its own, so that nothing but `import moe_rco` can have taught transformers."""
    code = """
import sys, moe_rco
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("def main(", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] - ids.shape[1])
"""
    done = run([sys.executable, "-c", code, str(written[0])])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "5"
    assert "newly initialized" not in done.stderr


@pytest.mark.slow
def test_inspect_shows_the_result(written: tuple[Path, str]) -> None:
    done = run(command("inspect", str(written[0])))
    assert done.returncode == 0, done.stderr
    assert "int4-g64" in done.stdout


@pytest.mark.slow
def test_the_python_interface_gives_the_same_result(written: tuple[Path, str], tmp_path: Path) -> None:
    import moe_rco

    recipe = moe_rco.load_recipe("demo", [*SMALL, f"output={tmp_path / 'again'}"])
    report = moe_rco.prune(recipe)
    first = report_of(written[0])
    assert report.counts == first["counts"]
    assert [list(layer.options) for layer in report.layers] == [layer["options"] for layer in first["layers"]]
    for name in ("model.safetensors.index.json", "plan.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (written[0] / name).read_bytes()
    for path in written[0].glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.slow
def test_an_existing_output_is_kept_unless_told(written: tuple[Path, str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in written[0].iterdir()}
    done = run(prune_command(written[0]))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "exists" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in written[0].iterdir()} == before


@pytest.mark.slow
def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = run([*prune_command(tmp_path / "out"), "--dry-run"])
    assert done.returncode == 0, done.stderr
    for part in ("int4-g64", "time ", "calibrate and quantise: ", "memory "):
        assert part in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "ratio"),
    [("[prune, bf16]", 0.5), ("[int2-g64, int4-g64, int8-g64]", 0.3)],
)
def test_pruning_only_and_precision_only_are_the_same_command(
    tmp_path: Path, options: str, ratio: float
) -> None:
    done = run(
        prune_command(tmp_path / "out", f"options={options}", f"budget.ratio={ratio}", "quantizer.method=rtn")
    )
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path / "out")
    assert expert_bytes(tmp_path / "out") == report["bytes"]["experts_after"] <= report["bytes"]["budget"]
