"""What serving takes beside the routed experts: of the real models exactly, and what is left for the experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_rco import capacity
from moe_rco.adapters import get_adapter
from moe_rco.budget import BudgetSpec, Fit
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.errors import BudgetError, ModelError
from moe_rco.quant.packing import cost_table
from moe_rco.recipe import DEMO_MODEL
from moe_rco.types import BF16, PRUNE, CostTable, Option
from tests.real_models import MIXTRAL_8X7B, QWEN3_30B_A3B, QWEN15_MOE_A27B, REAL

INT4 = Option(4, 128)


def room(fit: Fit, config: dict[str, Any]) -> capacity.Room:
    adapter = get_adapter(config)
    return capacity.room(fit, config, adapter, sum(group.numel for group in adapter.groups(config)))


def table(config: dict[str, Any]) -> CostTable:
    adapter = get_adapter(config)
    groups = adapter.groups(config)
    original = 2 * sum(group.numel for group in groups)
    return cost_table(groups, (PRUNE, INT4, BF16), adapter.top_k(config), original)


@pytest.mark.parametrize(("config", "total"), REAL.values(), ids=REAL)
def test_the_real_models_have_their_published_size(config: dict[str, Any], total: int) -> None:
    assert 2 * capacity.model_numel(config) == total


def test_tied_weights_count_once() -> None:
    tied = capacity.model_numel(QWEN3_30B_A3B | {"tie_word_embeddings": True})
    assert capacity.model_numel(QWEN3_30B_A3B) - tied == 151_936 * 2048


def test_what_transformers_refuses_is_told() -> None:
    with pytest.raises(ModelError, match="transformers cannot use this config"):
        capacity.model_numel(QWEN3_30B_A3B | {"num_attention_heads": "many"})


def test_a_configuration_without_heads_is_told() -> None:
    config = {key: value for key, value in QWEN3_30B_A3B.items() if key != "num_attention_heads"}
    with pytest.raises(ModelError, match="no 'num_attention_heads'"):
        room(Fit(gpu_memory=24 * 10**9), config)


def test_the_demo_s_own_files() -> None:
    checkpoint = Checkpoint(DEMO_MODEL)
    numel = sum(tensor.nbytes for tensor in checkpoint.tensors.values()) // 2
    assert capacity.model_numel(checkpoint.config) == numel


@pytest.mark.parametrize(
    "config", [QWEN3_30B_A3B, QWEN15_MOE_A27B, MIXTRAL_8X7B], ids=lambda c: c["model_type"]
)
def test_the_cache_is_as_large_as_transformers_makes_it(config: dict[str, Any]) -> None:
    """In a model of two layers, for which there is memory."""
    small: dict[str, Any] = config | {
        "num_hidden_layers": 2,
        "intermediate_size": 8,
        "moe_intermediate_size": 8,
        "vocab_size": 32,
    }
    small |= {
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 8,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small), dtype=torch.bfloat16)
    kept = model(torch.arange(10)[None], use_cache=True).past_key_values
    size = sum(part.nbytes for layer in kept.layers for part in (layer.keys, layer.values))
    assert capacity.kv_bytes(small) * 10 == size
    assert capacity.kv_bytes(config) == size // 10 * config["num_hidden_layers"] // 2


def test_what_is_left_is_what_the_parts_leave() -> None:
    found = room(Fit(gpu_memory=24 * 10**9, max_model_len=8191, max_num_seqs=4), QWEN3_30B_A3B)
    assert found.usable == 216 * 10**8
    assert found.kv_cache == 4 * 8192 * 2 * 48 * 4 * 128 * 2  # in whole blocks
    assert found.other_weights == 61_064_245_248 - 57_982_058_496
    left = found.usable - found.other_weights - found.kv_cache - found.activations - found.reserve
    budget = BudgetSpec(fit=Fit(gpu_memory=24 * 10**9)).resolve(table(QWEN3_30B_A3B), found)
    assert budget.bytes == found.left == left
    assert budget.room == found


def test_two_gpus_are_twice_one_but_for_the_weights() -> None:
    one, two = (room(Fit(gpu_memory=48 * 10**9, tensor_parallel_size=n), MIXTRAL_8X7B) for n in (1, 2))
    assert two.usable == 2 * one.usable
    assert two.other_weights == one.other_weights
    assert two.kv_cache == one.kv_cache  # eight heads of keys are shared out
    many = room(Fit(gpu_memory=48 * 10**9, tensor_parallel_size=16), MIXTRAL_8X7B)
    assert many.kv_cache == 2 * one.kv_cache  # with more GPUs than those, some have the same
    assert two.left == pytest.approx(2 * one.left + one.other_weights + one.kv_cache)


@pytest.mark.parametrize(
    ("fit", "config", "message"),
    [
        (Fit(gpu_memory=4 << 30), QWEN3_30B_A3B, "leaves nothing for the routed experts.*fit.max_num_seqs"),
        (Fit(gpu_memory=24 << 30, max_num_seqs=100), QWEN3_30B_A3B, "KV cache 75.00 GiB"),
        (
            Fit(gpu_memory=80 << 30, max_model_len=8193),
            QWEN15_MOE_A27B,
            "8,193, but the model reads 8,192 tokens",
        ),
    ],
)
def test_what_cannot_be_fitted_says_why(fit: Fit, config: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        room(fit, config)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("10GiB", "is what fit leaves, and is too small"),
        ("141GB", "is what fit leaves, and is more than"),
    ],
)
def test_too_little_or_nothing_to_do(memory: str, message: str) -> None:
    spec = BudgetSpec.model_validate({"fit": {"gpu_memory": memory, "max_num_seqs": 1}})
    assert spec.fit is not None
    costs = table(MIXTRAL_8X7B)
    with pytest.raises(BudgetError, match=message):
        spec.resolve(costs, room(spec.fit, MIXTRAL_8X7B))


def test_a_budget_in_words() -> None:
    short = BudgetSpec.model_validate({"fit": "24GB"})
    assert short.fit == Fit(gpu_memory=24 * 10**9)
    assert short.text == "fits a GPU of 24GB with 4 x 8,192 tokens"
    assert short.name == "fit-24GB-4x8192"
    long = BudgetSpec.model_validate(
        {
            "fit": {
                "gpu_memory": "80GiB",
                "tensor_parallel_size": 2,
                "gpu_memory_utilization": 0.95,
                "max_num_seqs": 1,
            }
        }
    )
    assert long.name == "fit-2x80GiB-0.95-1x8192"
    assert long.fit is not None
    assert long.fit.serve == (
        "--max-model-len 8192 --max-num-seqs 1 --gpu-memory-utilization 0.95 --tensor-parallel-size 2"
    )
