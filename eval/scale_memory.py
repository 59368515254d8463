"""The whole job on models that do not fit into the memory it may use; and how fast the result is written."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from eval.timing import ratio
from moe_rco import pipeline
from moe_rco import recipe as recipes
from moe_rco.calib.search import knapsack
from moe_rco.checks import make_ready
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.rewrite import rewrite
from moe_rco.ckpt.store import Store
from moe_rco.ckpt.workdir import WorkDirectory
from moe_rco.job import size
from moe_rco.plan import Plan
from moe_rco.recipe import DEMO_CALIBRATION
from moe_rco.report import Report
from moe_rco.types import Silent

RECIPE = """\
version: 1
model: {model}
options: [prune, int4-g128, bf16]
budget: {{ratio: 0.3}}
quantizer: {{method: gptq}}
calibration: {{data: {text}, sequences: 10, sequence_length: 128, holdout: 0.2}}
search: {{steps: 2, refine: 2, samples: 2, batch: 2, evaluate_every: 1}}
execution: {{mode: streaming, memory_limit: {limit}}}
output: {output}
"""


def model_of(work: Path, layers: int) -> Path:
    """A model with random weights, made once."""
    path = work / f"model-{layers}"
    if not (path / "config.json").exists():
        shutil.rmtree(path, ignore_errors=True)
        command = [sys.executable, "-m", "eval.random_model", str(path), "--layers", str(layers)]
        subprocess.run(command, check=True)
    return path


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One run of the command for every number of layers; the peak is what the operating system counted."""
    text = arguments.work / "text.txt"
    lines = DEMO_CALIBRATION.read_text(encoding="utf-8").splitlines()[:200]
    text.write_text("\n".join(json.loads(line)["text"] for line in lines), encoding="utf-8")
    rows = []
    for layers in arguments.layers:
        model, output = model_of(arguments.work, layers), arguments.work / f"result-{layers}"
        path = arguments.work / f"recipe-{layers}.yaml"
        path.write_text(
            RECIPE.format(model=model, text=text, limit=arguments.limit, output=output), encoding="utf-8"
        )
        started = time.monotonic()
        command = [sys.executable, "-m", "moe_rco.cli", "prune", "--recipe", str(path), "--overwrite"]
        run = subprocess.Popen(command)
        _, status, usage = os.wait4(run.pid, 0)
        if status:
            raise RuntimeError(f"{' '.join(command)} ended with status {status}")
        seconds, peak = time.monotonic() - started, usage.ru_maxrss * 1024
        report = Report.load(output)
        longest = max(report.stages, key=lambda stage: stage.seconds)
        assert report.memory is not None
        weights = sum(tensor.nbytes for tensor in Checkpoint(model).tensors.values())
        rows.append(
            {
                "layers": layers,
                "weights": f"{weights / 2**30:.2f} GiB",
                "limit": arguments.limit,
                "peak": f"{peak / 2**30:.2f} GiB",
                "predicted": f"{report.memory.predicted_host / 2**30:.2f} GiB",
                "took": f"{seconds:.0f} s",
                "predicted, of the stages": f"{sum(stage.predicted or 0 for stage in report.stages):.0f} s",
                "longest stage": f"{longest.name}, {longest.seconds:.0f} s (predicted {longest.predicted:.0f})",
            }
        )
        print(rows[-1], flush=True)
    return rows


def writing(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of writing a plan over those of copying what it wrote, both flushed to the disk."""
    model, work = model_of(arguments.work, arguments.layers[0]), arguments.work / "writing"
    shutil.rmtree(work, ignore_errors=True)
    sets = [f"model={model}", "options=[prune,int4-g128,bf16]", "quantizer.method=rtn", "budget={ratio: 0.5}"]
    sets += ["calibration.sequences=4", "calibration.sequence_length=32", "execution.mode=streaming"]
    recipe = recipes.load("demo", [*sets, f"output={work / 'result'}"])
    sized = size(recipe)
    kept = WorkDirectory(work)
    found = pipeline.prepare(make_ready(recipe), kept.path, Silent())
    store: Store = found.store
    choice = knapsack(found.effects, sized.table, sized.budgets[0])
    plan = Plan.from_assignment(choice, sized.budgets[0], model_digest="", recipe_digest="", losses={})
    results, copies = [], []
    for number in range(arguments.repeats):
        target, copy = work / f"written-{number}", work / f"copy-{number}"
        start = time.perf_counter()
        rewrite(found.checkpoint, choice, plan, store, target, "", overwrite=True)
        results.append(time.perf_counter() - start)
        start = time.perf_counter()
        copied(target, copy)
        copies.append(time.perf_counter() - start)
        written = sum(path.stat().st_size for path in target.iterdir())
        shutil.rmtree(target)
        shutil.rmtree(copy)
    shutil.rmtree(work)
    speed = written / min(results) / 1e6
    options = ", ".join(f"{name}: {count}" for name, count in choice.counts().items())
    return [
        {
            "written": f"{written / 1e9:.2f} GB",
            "experts": options,
            "speed": f"{speed:.0f} MB/s",
            "speed over copying": ratio(copies, results),
        }
    ]


def copied(source: Path, target: Path) -> None:
    """Copy a directory's files and flush them, as `rewrite` does with what it writes."""
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as reading, (target / path.name).open("wb") as writing_:
            shutil.copyfileobj(reading, writing_, 1 << 22)
            writing_.flush()
            os.fsync(writing_.fileno())
