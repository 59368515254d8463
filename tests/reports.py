"""A complete, consistent report made by hand: 3 layers of 8 experts."""

from __future__ import annotations

from typing import Any

from moe_rco.report import Preflight, Report, TaskScore

LAYERS = [
    ["prune", "int4-g64", "int4-g64", "bf16", "int2-g64", "int8-g64", "prune", "int3-g64"],
    ["int4-g64"] * 8,
    ["bf16"] * 4 + ["prune"] * 4,
]


def report_data() -> dict[str, Any]:
    """As in report.json; change what a test needs before validating."""
    counts: dict[str, int] = {}
    for options in LAYERS:
        for option in options:
            counts[option] = counts.get(option, 0) + 1
    return {
        "version": "0.1.0",
        "software": {"python": "3.11.7", "packages": {"torch": "2.13.0"}},
        "model": "demo",
        "model_digest": "a" * 64,
        "family": "qwen3_moe",
        "recipe_digest": "b" * 64,
        "seed": 0,
        "output": "out/[demo]",
        "budget": {"text": "ratio 0.25", "bytes": 1_000_000},
        "bytes": {
            "experts_before": 4_000_000,
            "experts_after": 999_000,
            "budget": 1_000_000,
            "slack": 1_000,
            "slack_ratio": 0.001,
            "other": 500_000,
            "total": 1_499_000,
        },
        "layers": [
            {"layer": index, "options": options, "tokens": range(index, index + 8)}
            for index, options in enumerate(LAYERS)
        ],
        "counts": counts,
        "candidates": [
            {"name": "uniform int4-g64", "kl": 0.25, "cost": 990_000},
            {"name": "fisher seed", "kl": 0.125, "cost": 999_500},
            {"name": "rco step 40", "kl": 0.0625, "cost": 999_000},
        ],
        "winner": "rco step 40",
        "domains": [
            {
                "name": name,
                "tokens": 1234,
                "loss_before": 2.0,
                "loss_after": 2.0625,
                "kl": 0.0625,
                "kl_stderr": 0.001,
            }
            for name in ("prose", "python")
        ],
        "kl": 0.0625,
        "kl_stderr": 0.0007,
        "quantizer": {
            "method": "gptq",
            "options": {"int4-g64": {"rtn_error": 0.02, "gptq_error": 0.01}},
            "undersampled_experts": 3,
            "undersampled": {"0": [2, 5], "2": [7]},
        },
        "reload": {"max_logit_difference": 1.2e-6, "tolerance": 1e-4, "passed": True},
        "search": {"steps": 40, "history": [{"step": 0, "kl": 0.2}]},
        "stages": [{"name": "search", "seconds": 61.0}, {"name": "quantise", "seconds": 12.0}],
    }


def report(**changes: Any) -> Report:
    return Report.model_validate({**report_data(), **changes})


FITTED = {
    "text": "fits a GPU of 24GB with 4 x 8,192 tokens",
    "bytes": 2_400_000,
    "room": {
        "serve": "--max-model-len 8192 --max-num-seqs 4",
        "usable": 20 << 30,
        "other_weights": 3 << 30,
        "kv_cache": 2 << 30,
        "activations": 100 << 20,
        "reserve": 1 << 30,
    },
}
"""A budget that a GPU leaves."""


def preflight(**changes: object) -> Preflight:
    data: dict[str, object] = {
        "model": "demo",
        "family": "qwen3_moe",
        "layers": 6,
        "experts_per_layer": 32,
        "top_k": 4,
        "options": [
            {"name": "prune", "bytes_per_expert": 0},
            {"name": "int4-g64", "bytes_per_expert": 13_000},
        ],
        "experts_before": 9_437_184,
        "other_bytes": 2_000_000,
        "smallest": 300_000,
        "largest": 9_437_184,
        "budgets": [{"text": "ratio 0.25", "bytes": 2_359_296}],
        "sequences": 640,
        "tokens": 163_840,
        "holdout_sequences": 128,
        "search_method": "rco",
        "search_steps": 60,
        "search_races": 0,
        "search_samples": 4,
        "output": "out/demo",
        "disk_needed": 2**24,
        "disk_free": 2**36,
        "memory": 2**30,
    }
    return Preflight.model_validate({**data, **changes}, strict=False)


def score(task: str, metric: str = "acc", **changes: Any) -> TaskScore:
    """A score 0.05 below the original's, significant."""
    values: dict[str, Any] = {
        "backend": "hf",
        "task": task,
        "group": None,
        "metric": metric,
        "filter": "none",
        "num_fewshot": 0,
        "limit": None,
        "dtype": "float32",
        "higher_is_better": True,
        "items": 1234,
        "score": 0.65,
        "stderr": 0.0125,
        "files": "eval/hf/x",
        "baseline": {
            "model": "demo",
            "digest": "a" * 64,
            "score": 0.7,
            "stderr": 0.0121,
            "difference": -0.05,
            "difference_stderr": 0.0123,
            "p": 0.0321,
            "test": "McNemar, exact",
        },
    }
    return TaskScore.model_validate({**values, **changes})
