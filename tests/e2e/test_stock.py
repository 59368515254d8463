"""`layout: stock` as a user runs it: a tiny model, then a reader that has never heard of us."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_rco.ckpt.reader import Checkpoint
from moe_rco.inspection import inspect
from moe_rco.pipeline import preflight
from moe_rco.plan import Plan
from moe_rco.recipe import DEMO_CALIBRATION, DEMO_MODEL, load
from tests.tiny_models import save_tiny

SETTINGS = (
    "layout=stock",
    "experimental=false",
    "calibration.sequences=16",
    "calibration.sequence_length=64",
    "search.steps=2",
    "search.refine=2",
    "search.samples=2",
    "search.batch=2",
    "quantizer.method=rtn",
)
READ = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("def main(", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] - ids.shape[1])
assert not [name for name in sys.modules if name.split(".")[0] == "moe_rco"]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny(
        "qwen3_moe", tmp_path_factory.mktemp("e2e") / "model", vocab_size=4096, num_hidden_layers=3
    )
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, path)
    # Little text of its own: the demo's held-out text would take most of the time.
    with DEMO_CALIBRATION.open(encoding="utf-8") as source:
        (path / "text.jsonl").write_text("".join(next(source) for _ in range(40)), encoding="utf-8")
    return path


def command(model: Path, output: Path, options: str, ratio: float) -> list[str]:
    sets = (
        *SETTINGS,
        f"model={model}",
        f"calibration.data={model / 'text.jsonl'}",
        f"options={options}",
        f"budget.ratio={ratio}",
    )
    arguments = [part for setting in sets for part in ("--set", setting)]
    base = [sys.executable, "-m", "moe_rco.cli", "prune", "--recipe", "demo", "--output", str(output)]
    return [*base, *arguments]


def run(arguments: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize(("options", "ratio"), [("[prune, bf16]", 0.6), ("[prune, int4-g64, int4-g32]", 0.2)])
def test_a_model_that_needs_nothing_of_ours(model: Path, tmp_path: Path, options: str, ratio: float) -> None:
    out = tmp_path / "out"
    printed = run(command(model, out, options, ratio)).stdout
    assert "Read without moe_rco by vLLM and transformers." in printed
    report, plan = json.loads((out / "report.json").read_text()), Plan.load(out)
    counts = {len(plan.kept(layer)) for layer in plan.layers}
    assert counts == {report["stock"]["experts_per_layer"]}
    assert 2 <= min(counts) < 8
    assert report["stock"]["kl"] == next(
        c["kl"] for c in report["candidates"] if c["name"] == report["winner"]
    )
    assert f"{report['stock']['mixed']['kl']:.5f}" in printed
    assert report["reload"]["passed"]
    checkpoint = Checkpoint(out, allow_quantized=True)
    size = sum(tensor.nbytes for name, tensor in checkpoint.tensors.items() if ".experts." in name)
    assert size == report["bytes"]["experts_after"] == plan.cost <= report["bytes"]["budget"]
    shown = inspect(out)
    assert [list(layer.options) for layer in shown.layers] == [layer["options"] for layer in report["layers"]]
    done = run([sys.executable, "-c", READ, str(out)], cwd=tmp_path)
    assert done.stdout.strip() == "5"
    assert "newly initialized" not in done.stderr


@pytest.mark.slow
def test_several_widths_are_checked_by_our_reader(model: Path, tmp_path: Path) -> None:
    """Without pruning the budget has room for eight bits in two layers of three."""
    out = tmp_path / "out"
    printed = run(command(model, out, "[int4-g64, int8-g64]", 0.45)).stdout
    report = json.loads((out / "report.json").read_text())
    assert report["reload"]["passed"]
    assert report["counts"] == {"int4-g64": 8, "int8-g64": 16}
    assert not report["stock"]["transformers_reads"]
    assert "Read without moe_rco by vLLM.\n" in printed


@pytest.mark.parametrize(
    ("layout", "options", "told"),
    [
        ("stock", "[prune, int4, bf16]", True),
        ("stock", "[prune, int8]", False),
        ("mixed", "[int4, int8]", False),
    ],
)
def test_a_dry_run_warns_of_several_widths(
    model: Path, tmp_path: Path, layout: str, options: str, told: bool
) -> None:
    sets = (
        *SETTINGS,
        f"output={tmp_path / 'out'}",
        f"model={model}",
        f"options={options}",
        f"layout={layout}",
        "budget.ratio=0.6",
    )
    found = preflight(load("demo", sets))
    assert found.layout == layout
    assert any("not by transformers" in warning for warning in found.warnings) == told
