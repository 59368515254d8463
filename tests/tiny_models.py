"""Tiny random models of every supported family, written the way transformers writes real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_QWEN: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_COMMON, **_QWEN, "head_dim": 16, "norm_topk_prob": True},
    "qwen2_moe": {**_COMMON, **_QWEN, "shared_expert_intermediate_size": 128, "norm_topk_prob": False},
    "mixtral": {**_COMMON, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {**_COMMON, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False},
}


def save_tiny(
    family: str,
    path: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "150KB",
    **config_overrides: Any,
) -> Path:
    """Write a random model (config, shards with an index, generation settings) to `path`, and return it.

    Dimensions are multiples of 64. Weights are larger than at a usual initialisation, so that every expert
    and every routing decision is visible in the logits.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**FAMILIES[family], **config_overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                scale = 1.0 if name.endswith("gate.weight") or "embed" in name else 1.5
                parameter.normal_(0, scale * parameter.shape[-1] ** -0.5 if "embed" not in name else 1.0)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return Path(path)
