"""Seconds of search steps: streamed over resident, by two processes over one, and by the number of experts."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from eval.prepared import Subject, recipe_of, subject
from eval.timing import ratio
from moe_rco.adapters import get_adapter
from moe_rco.calib.bank import OptionBank
from moe_rco.calib.losses import SampledLoss
from moe_rco.calib.objective import AssignedModel
from moe_rco.calib.runner import Runner
from moe_rco.calib.search import knapsack
from moe_rco.calib.streaming import Streaming
from moe_rco.calib.team import joined
from moe_rco.recipe import Recipe
from moe_rco.types import Budget

MODELS = ("mixtral", "qwen2_moe", "demo")
SETTINGS = ("calibration.sequences=64",)
NUMBERS = (16, 32, 64, 128)
STREAMING = Streaming(window=1 << 26, tokens=1 << 15, workspace=1 << 28)


def one_hot(found: Subject, recipe: Recipe, count: int) -> list[torch.Tensor]:
    """Assignments near the Fisher seed, as straight-through samples."""
    q, table = found.prepared.effects, found.prepared.model.table
    budget = recipe.budget[0].resolve(table)
    rng = np.random.default_rng(0)
    noisy = (q * rng.lognormal(0, 0.3, q.shape) for _ in range(count))
    choices = [knapsack(losses, table, budget).choice for losses in noisy]
    size = len(table.options)
    return [torch.nn.functional.one_hot(torch.from_numpy(c), size).double().requires_grad_() for c in choices]


def loss_of(found: Subject, recipe: Recipe, model: AssignedModel) -> SampledLoss:
    prepared = found.prepared
    return SampledLoss(model, prepared.effects, prepared.pools[0], prepared.calibrated.train, recipe.search)


def streamed(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One process, one core; the recipe's samples and batch."""
    rows = []
    for name in MODELS:
        recipe = recipe_of(name, 0, SETTINGS)
        found = subject(name, recipe)
        resident, checkpoint = found.prepared.model, found.prepared.checkpoint
        adapter = get_adapter(checkpoint.config)
        bank = OptionBank(checkpoint, resident.table, torch.device("cpu"), torch.float32, STREAMING)
        runner = Runner(checkpoint, adapter, torch.device("cpu"), torch.float32, STREAMING)
        ours = AssignedModel(runner, adapter, checkpoint.config, bank, found.prepared.store)
        samples, times = one_hot(found, recipe, recipe.search.samples), ([], [])
        for number in range(arguments.repeats + 1):
            for which, model in enumerate((ours, resident)):
                start = time.perf_counter()
                loss_of(found, recipe, model).together(samples)
                if number:  # the first warms up
                    times[which].append(time.perf_counter() - start)
        rows.append(
            {
                "model": name,
                "streamed": f"{min(times[0]):.2f} s",
                "resident": f"{min(times[1]):.2f} s",
                "ratio": ratio(*times),
            }
        )
        print(rows[-1], flush=True)
    return rows


def shared(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each process has one core. A step and a judgement on the kept-out text, as often as there are repeats."""
    rows = []
    for name in MODELS:
        recipe = recipe_of(name, 0, SETTINGS)
        subject(name, recipe)  # quantised once, not by every process
        seconds: dict[int, list[float]] = {1: [], 2: []}
        sent = 0
        for _ in range(arguments.repeats):
            for processes, times in seconds.items():
                command = [sys.executable, "-m"]
                if processes > 1:
                    command += [
                        "torch.distributed.run",
                        "--standalone",
                        f"--nproc-per-node={processes}",
                        "-m",
                    ]
                result = subprocess.run([*command, "eval.scale_steps", name], capture_output=True, check=True)
                told = json.loads(result.stdout.decode().strip().splitlines()[-1])
                times.append(told["seconds"])
                sent = told["sent"] if processes > 1 else sent
        rows.append(
            {
                "model": name,
                "one": f"{min(seconds[1]):.2f} s",
                "two": f"{min(seconds[2]):.2f} s",
                "two over one": ratio(seconds[2], seconds[1]),
                "bytes each sends a step": f"{sent:,}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def work(name: str) -> None:
    """What one process of `shared` does; the first one tells how long it took."""
    torch.set_num_threads(1)
    recipe = recipe_of(name, 0, SETTINGS)
    with joined() as team:
        found = team.in_turn(lambda: subject(name, recipe))
        found.prepared.model.team = team
        samples = one_hot(found, recipe, recipe.search.samples)
        loss = loss_of(found, recipe, found.prepared.model)
        loss.together(samples)
        team.wait()
        start, before = time.perf_counter(), team.sent
        loss.together(samples)
        sent = team.sent - before
        prepared = found.prepared
        choice = samples[0].detach().argmax(1).numpy()
        prepared.model.divergences(choice, prepared.pools[1], prepared.calibrated.kept_out)
        if team.leads:
            print(json.dumps({"seconds": time.perf_counter() - start, "sent": sent}))


def by_experts(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Random models of one layer shape; the same tokens, two of the experts a token."""
    rows: list[dict[str, Any]] = []
    for experts in NUMBERS:
        path = arguments.work / f"experts-{experts}"
        recipe = recipe_of("demo", 0, [*SETTINGS, f"model={_random(path, experts)}", "quantizer.method=rtn"])
        found = subject(f"random-{experts}", recipe)
        found_budget: Budget = recipe.budget[0].resolve(found.prepared.model.table)
        samples, times = one_hot(found, recipe, recipe.search.samples), []
        for number in range(arguments.repeats + 1):
            start = time.perf_counter()
            loss_of(found, recipe, found.prepared.model).together(samples)
            if number:
                times.append(time.perf_counter() - start)
        first = rows[0]["seconds"] / rows[0]["experts a layer"] if rows else min(times) / experts
        rows.append(
            {
                "experts a layer": experts,
                "groups": len(found.prepared.model.table.groups),
                "budget": f"{found_budget.bytes:,}",
                "seconds": round(min(times), 3),
                "over the first, by expert": f"{min(times) / experts / first:.2f}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def _random(path: Path, experts: int) -> Path:
    """A small Qwen3-MoE with the demo's tokenizer."""
    if not (path / "config.json").exists():
        demo = recipe_of("demo").model_directory or Path()
        config = Qwen3MoeConfig.from_pretrained(demo)
        config.num_experts = config.num_local_experts = experts
        torch.manual_seed(0)
        model: Any = Qwen3MoeForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(path)
        for file in demo.glob("tokenizer*"):
            (path / file.name).write_bytes(file.read_bytes())
    return path


if __name__ == "__main__":
    work(sys.argv[1])
