"""What every adapter promises, run over every family without asking which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_rco.adapters import FAMILIES, get_adapter
from moe_rco.calib.bank import OptionBank, StackedLayer
from moe_rco.calib.objective import AssignedModel
from moe_rco.calib.runner import Runner
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.errors import ModelError
from moe_rco.reload import load_model
from tests.compressed import EVERY_OPTION, random_job, table_of
from tests.tiny_models import save_tiny

CPU = torch.device("cpu")
DENSE: dict[str, list[dict[str, Any]]] = {
    "qwen3_moe": [
        {},
        {"num_hidden_layers": 3, "mlp_only_layers": [1]},
        {"num_hidden_layers": 4, "decoder_sparse_step": 2},
    ],
    "qwen2_moe": [{}, {"num_hidden_layers": 3, "mlp_only_layers": [0]}, {"norm_topk_prob": True}],
    "mixtral": [{}, {"sliding_window": 8}],
    "olmoe": [{}, {"norm_topk_prob": True, "clip_qkv": 1.0}],
}
CASES = [(family, overrides) for family in FAMILIES for overrides in DENSE.get(family, [{}])]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{'-'.join(case[1]) or 'plain'}")
def model_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family, overrides = request.param
    return save_tiny(family, tmp_path / "model", **overrides)


def assigned(checkpoint: Checkpoint) -> AssignedModel:
    adapter = get_adapter(checkpoint.config)
    table = table_of(checkpoint, EVERY_OPTION)
    runner = Runner(checkpoint, adapter, CPU, torch.float32)
    return AssignedModel(
        runner, adapter, checkpoint.config, OptionBank(checkpoint, table, CPU, torch.float32)
    )


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(seed))


def test_names_cover_every_expert_tensor_on_disk(model_dir: Path) -> None:
    checkpoint = Checkpoint(model_dir)
    adapter = get_adapter(checkpoint.config)
    named = {
        weight.name: weight.shape for group in adapter.groups(checkpoint.config) for weight in group.weights
    }
    on_disk = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if ".experts." in name}
    assert named == on_disk
    routers = {adapter.router_name(layer) for layer in adapter.moe_layers(checkpoint.config)}
    assert routers <= checkpoint.tensors.keys()


def test_names_cover_every_expert_once_loaded_and_fused(model_dir: Path) -> None:
    checkpoint = Checkpoint(model_dir)
    adapter = get_adapter(checkpoint.config)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    bank = assigned(checkpoint).bank
    fused = {name for name, _ in model.named_parameters() if ".experts." in name}
    expected = set()
    for layer in adapter.moe_layers(checkpoint.config):
        experts = model.model.layers[layer].mlp.experts
        originals = bank.layer(layer)
        assert isinstance(originals, StackedLayer)
        gate_up, down = originals.stacks[originals.original]
        torch.testing.assert_close(experts.gate_up_proj.data, gate_up, rtol=0, atol=0)
        torch.testing.assert_close(experts.down_proj.data, down, rtol=0, atol=0)
        expected |= {f"model.layers.{layer}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert fused == expected


def test_keeping_everything_is_the_transformers_model(model_dir: Path) -> None:
    model = assigned(Checkpoint(model_dir))
    transformers_model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = transformers_model(tokens()).logits
    ours = model.runner.logits(model.hidden(tokens()))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_searched_model_is_the_rewritten_and_reloaded_one(
    model_dir: Path, tmp_path: Path, seed: int
) -> None:
    job = random_job(model_dir, tmp_path / "store", seed)
    job.write(tmp_path / "out")
    used = {job.assignment.option(row).name for row in range(len(job.assignment.choice))}
    assert len(used) > 4
    model = assigned(job.checkpoint)
    searched = AssignedModel(model.runner, job.adapter, job.checkpoint.config, model.bank, job.store)
    ours = model.runner.logits(searched.hidden(tokens(), job.assignment.choice))
    with torch.no_grad():
        reloaded = load_model(tmp_path / "out", CPU, torch.float32)(tokens()).logits
    torch.testing.assert_close(ours, reloaded, rtol=0, atol=1e-4)
    untouched = model.runner.logits(model.hidden(tokens()))
    assert float((untouched - reloaded).abs().max()) > 0.1  # the comparison can fail


def test_every_option_alone_reloads(tmp_path: Path) -> None:
    """An option that a random assignment uses rarely is still exact: every expert at one option, for each."""
    for family in FAMILIES:
        source = save_tiny(family, tmp_path / family)
        for name in EVERY_OPTION[1:]:
            job = random_job(source, tmp_path / f"{family}-{name}-store", 0, ["prune", name])
            job.write(tmp_path / f"{family}-{name}")
            model = assigned_for(job.checkpoint, job)
            ours = model.runner.logits(model.hidden(tokens(), job.assignment.choice))
            with torch.no_grad():
                reloaded = load_model(tmp_path / f"{family}-{name}", CPU, torch.float32)(tokens()).logits
            np.testing.assert_allclose(ours, reloaded, atol=1e-4, rtol=0)


def assigned_for(checkpoint: Checkpoint, job: Any) -> AssignedModel:
    runner = Runner(checkpoint, job.adapter, CPU, torch.float32)
    bank = OptionBank(checkpoint, job.assignment.table, CPU, torch.float32)
    return AssignedModel(runner, job.adapter, checkpoint.config, bank, job.store)


def test_unknown_families_are_refused_by_name() -> None:
    with pytest.raises(
        ModelError, match=r"'qwen3_mo' in config.json is not supported; the nearest is 'qwen3_moe'"
    ):
        get_adapter({"model_type": "qwen3_mo"})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_impossible_configurations_are_refused(family: str) -> None:
    base = {"model_type": family, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 5}
    with pytest.raises(ModelError, match="5 of 4 experts"):
        get_adapter(base)
    with pytest.raises(ModelError, match="no 'num_experts_per_tok'"):
        get_adapter({**base, "num_experts_per_tok": None})
    with pytest.raises(ModelError, match="architecture OtherModel"):
        get_adapter({**base, "architectures": ["OtherModel"], "num_experts_per_tok": 2})
