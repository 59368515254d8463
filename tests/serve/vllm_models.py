"""Tiny mixed checkpoints of every family that vLLM's CPU kernels accept, and what transformers says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from moe_rco.serve.hf import register
from tests.compressed import Job, random_job
from tests.tiny_models import save_tiny

register()

# vLLM on a CPU wants heads of 32 or more. 128 intermediate: two processes still have whole groups of 64.
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_HEADS,
            "head_dim": 32,
            "moe_intermediate_size": 128,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2_moe": ("qwen2_moe", {**_HEADS, "moe_intermediate_size": 128}),
    "mixtral": ("mixtral", {**_HEADS, "intermediate_size": 128}),
    "olmoe": ("olmoe", {**_HEADS}),
    "demo": (
        "qwen3_moe",
        {
            "hidden_size": 128,
            "head_dim": 32,
            "moe_intermediate_size": 64,
            "num_experts": 32,
            "num_experts_per_tok": 4,
        },
    ),
}
PROMPTS = [
    torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (1, 7, 40)
]
TOKENS = 8


def write(name: str, directory: Path, dense: bool = False, **more: Any) -> Job:
    """A random job of that name, with `dense` of all its groups; the checkpoint is in `directory / "out"`."""
    family, overrides = MODELS[name]
    model = save_tiny(family, directory / "model", **{**overrides, **more})
    job = random_job(model, directory / "store", seed=len(name), dense=dense)
    job.write(directory / "out")
    return job


def expected(directory: Path) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Log-probabilities [length, V] of every prompt and its greedy continuation, by transformers in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    probabilities, continuations = [], []
    with torch.no_grad():
        for prompt in PROMPTS:
            probabilities.append(model(torch.tensor([prompt])).logits[0].log_softmax(-1))
            tokens = list(prompt)
            for _ in range(TOKENS):
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            continuations.append(tokens[len(prompt) :])
    return probabilities, continuations


def difference(outcome: dict[str, Any], probabilities: list[torch.Tensor]) -> float:
    """Largest difference of any log-probability that vLLM returned."""
    found = [
        abs(value - float(expected[position, int(token)]))
        for prompt, expected in zip(outcome["prompts"], probabilities, strict=True)
        for position, candidates in enumerate(prompt)
        for token, value in candidates.items()
    ]
    assert len(found) >= 20 * sum(len(prompt) - 1 for prompt in PROMPTS)
    return max(found)
