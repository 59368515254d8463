"""Our checkpoints in a real, unmodified vLLM on the CPU: the same numbers as transformers, or a clear refusal."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.compressed import Job
from tests.serve.vllm_models import MODELS, PROMPTS, TOKENS, difference, expected, write
from tests.vllm_engine import outcomes

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TOLERANCE = 1e-4
TWO: dict[str, Any] = {"tensor_parallel_size": 2}


def job(model: Path, **settings: Any) -> dict[str, Any]:
    return {"model": str(model), "prompts": PROMPTS, "tokens": TOKENS, "settings": settings}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, Path]]:
    made = {}
    for name in MODELS:
        directory = tmp_path_factory.mktemp(name)
        made[name] = write(name, directory), directory / "out"
    return made


def damaged(out: Path, to: Path, change: str, of: str = ".experts.") -> Path:
    """A copy of a checkpoint with one tensor missing, too many or of another shape."""
    shutil.copytree(out, to)
    index = json.loads((to / "model.safetensors.index.json").read_text())
    name = next(name for name in sorted(index["weight_map"]) if of in name and name.endswith(".weight_scale"))
    file = to / index["weight_map"][name]
    tensors = load_file(file)
    if change == "missing":
        del tensors[name], index["weight_map"][name]
    elif change == "extra":
        extra = name.replace("weight_scale", "weight_zero_point")
        tensors[extra] = torch.zeros(1, 1, dtype=torch.int32)
        index["weight_map"][extra] = file.name
    elif change == "shape":
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, {"format": "pt"})
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    return to


@pytest.fixture(scope="module")
def eager(
    jobs: dict[str, tuple[Job, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Everything that one process can try one engine after the other."""
    base = tmp_path_factory.mktemp("eager")
    _, qwen3 = jobs["qwen3_moe"]
    todo = {name: job(out) for name, (_, out) in jobs.items()}
    todo["original"] = job(qwen3.parent / "model")
    for change in ("missing", "extra", "shape"):
        out = damaged(jobs["mixtral"][1], base / change, change)
        todo[f"{change}, by header"] = job(out)
        todo[f"{change}, by loader"] = job(out) | {"unchecked": True}
    other = Path(shutil.copytree(qwen3, base / "other"))
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = json.loads((jobs["qwen2_moe"][1] / "config.json").read_text())[
        "quantization_config"
    ]
    (other / "config.json").write_text(json.dumps(config))
    todo["another model's plan"] = job(other)
    return dict(zip(todo, outcomes(list(todo.values()), base / "run"), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_transformers(
    name: str, eager: dict[str, dict[str, Any]], jobs: dict[str, tuple[Job, Path]]
) -> None:
    probabilities, continuations = expected(jobs[name][1])
    assert "error" not in eager[name], eager[name]
    assert difference(eager[name], probabilities) < TOLERANCE
    assert eager[name]["tokens"] == continuations


def test_the_original_is_told_apart(
    eager: dict[str, dict[str, Any]], jobs: dict[str, tuple[Job, Path]]
) -> None:
    _, out = jobs["qwen3_moe"]
    compressed, _ = expected(out)
    original, _ = expected(out.parent / "model")
    assert difference(eager["original"], original) < TOLERANCE
    assert difference(eager["original"], compressed) > 0.1


def test_memory_is_that_of_the_plan(
    eager: dict[str, dict[str, Any]], jobs: dict[str, tuple[Job, Path]]
) -> None:
    reports = re.findall(
        r"routed experts take (\d+) bytes in this process, .* is (\d+) bytes", eager["demo"]["log"]
    )
    for (job, _), (held, on_disk) in zip(jobs.values(), reports[: len(jobs)], strict=True):
        shapes = sum(
            len(job.adapter.expert(job.checkpoint.config, layer, 0).weights) * 16
            for layer in job.assignment.table.layers
            for option in job.assignment.layer_options(layer)
            if option.is_quantized
        )
        assert int(on_disk) == job.assignment.cost
        # Without the tensors `weight_shape`, and with zero points of 3 bits in 3 bits instead of 3.2.
        assert 0.99 * (job.assignment.cost - shapes) < int(held) <= job.assignment.cost - shapes


@pytest.mark.parametrize("by", ["header", "loader"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"expert tensor \S+\.weight_scale.* is missing"),
        ("extra", r"expert tensor \S+\.weight_zero_point"),
        ("shape", r"expert tensor \S+\.weight_scale .*\[\d+, \d+\].* promises .*\[\d+, \d+\]"),
    ],
)
def test_damage_is_refused(change: str, message: str, by: str, eager: dict[str, dict[str, Any]]) -> None:
    outcome = eager[f"{change}, by {by}"]
    assert re.search(f"^ModelError: .*{message}", outcome.get("error", "none")), outcome


def test_another_models_plan_is_refused(eager: dict[str, dict[str, Any]]) -> None:
    error = eager["another model's plan"].get("error", "none")
    assert error == "ModelError: quantization_config names expert 0 of layer 1, which the model does not have"


def test_two_processes_with_whole_experts_agree(jobs: dict[str, tuple[Job, Path]], tmp_path: Path) -> None:
    """With parts of every expert they do, and compiled, in tests/serve/test_vllm_dense.py."""
    out = jobs["mixtral"][1]
    (outcome,) = outcomes([job(out, **TWO, enable_expert_parallel=True)], tmp_path)
    probabilities, continuations = expected(out)
    assert "error" not in outcome, outcome["log"][-3000:]
    assert difference(outcome, probabilities) < TOLERANCE
    assert outcome["tokens"] == continuations
