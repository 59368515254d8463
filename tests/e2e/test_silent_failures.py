"""What has gone wrong unnoticed in tools of this kind: a run ends, the files load, and the model is not what it should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_rco import recipe as recipes
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.integrity import verify
from moe_rco.pipeline import prune
from moe_rco.report import Report
from tests.tiny_job import save_job


def run(place: Path, *settings: str, **model: Any) -> tuple[Report, Path]:
    place.mkdir(exist_ok=True)
    job = save_job(place, steps=0, refine=0, **model)
    return run_again(job, "out", *settings)


def run_again(job: Path, name: str, *settings: str) -> tuple[Report, Path]:
    output = job.parent / name
    return prune(recipes.load(str(job), [f"output={output}", *settings])), output


@pytest.mark.parametrize(
    "model",
    [
        {"family": "qwen2_moe"},
        {"family": "qwen2_moe", "norm_topk_prob": True},
        {"family": "qwen3_moe", "norm_topk_prob": False},
        {"family": "qwen3_moe", "tie_word_embeddings": True},
        {"family": "mixtral"},
    ],
    ids=lambda model: " ".join(map(str, model.values())),
)
def test_only_routed_experts_change_and_nothing_is_written_twice(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    """Shared experts, routers, embeddings and the head keep every bit; tied ones are there once; settings of the router stay."""
    report, output = run(tmp_path, **model)
    (found,) = verify(output, tmp_path / "model")
    assert found.passed, found
    before, after = (Checkpoint(d, allow_quantized=True) for d in (tmp_path / "model", output))
    others = [{name for name in c.tensors if ".experts." not in name} for c in (before, after)]
    assert others[0] == others[1]
    assert ("lm_head.weight" in others[1]) is not model.get("tie_word_embeddings", False)
    assert {**after.config, "quantization_config": None} == {**before.config, "quantization_config": None}
    assert sum(tensor.nbytes for tensor in after.tensors.values()) == report.bytes.total


def test_experts_that_saw_no_token_are_quantised_all_the_same_and_told(tmp_path: Path) -> None:
    settings = (
        "calibration.sequences=2",
        "calibration.sequence_length=8",
        "calibration.holdout=0.5",
        "options=[int4-g64]",
        "budget.ratio=0.3",
    )
    report, output = run(tmp_path, *settings)
    unseen = {
        (layer.layer, e) for layer in report.layers for e, tokens in enumerate(layer.tokens) if not tokens
    }
    assert unseen
    assert unseen <= {(layer, e) for layer, of in report.quantizer.undersampled.items() for e in of}
    written = Checkpoint(output, allow_quantized=True)
    scales = [name for name in written.tensors if name.endswith("weight_scale")]
    assert len(scales) == 3 * sum(len(layer.tokens) for layer in report.layers)
    for name in scales:
        values = written.read(name)
        assert bool(torch.isfinite(values).all()), name
        assert bool((values != 0).all()), name
    rounded, _ = run(tmp_path / "rtn", *settings, "quantizer.method=rtn")
    assert report.kl < 3 * rounded.kl  # on eight tokens: no noise


def test_text_that_is_measured_on_after_it_was_calibrated_on_is_told(tmp_path: Path) -> None:
    """The same documents twice: some fall on both sides."""
    clean, _ = run(tmp_path)
    assert clean.warnings == ()
    text = tmp_path / "model" / "text.jsonl"
    short = [json.loads(line)["text"][:400] for line in text.read_text().splitlines()]
    text.write_text("".join(json.dumps({"text": part}) + "\n" for part in short for _ in range(2)))
    report, _ = run_again(tmp_path / "recipe.yaml", "twice", "calibration.sequences=110")
    (warning,) = report.warnings
    share, _, rest = warning.partition(" ")
    assert 5 < int(share.removesuffix("%")) <= 100
    assert "also in the text for gradients" in rest


def test_the_router_is_asked_as_the_model_was_trained(tmp_path: Path) -> None:
    """`norm_topk_prob` ignored would show before anything is compressed: the original's loss is transformers'."""
    from transformers import AutoModelForCausalLM

    for number, normalised in enumerate((True, False)):
        place = tmp_path / str(number)
        report, _ = run(
            place, "options=[bf16]", "budget.ratio=1", family="qwen2_moe", norm_topk_prob=normalised
        )
        assert report.kl < 1e-4
        model: Any = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
        assert model.config.norm_topk_prob is normalised
        other: Any = AutoModelForCausalLM.from_pretrained(place / "out", dtype=torch.float32)
        ids = torch.arange(32)[None] * 7919 % model.config.vocab_size
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=0, atol=0.02)
