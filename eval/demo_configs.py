"""Configurations of the three demo models: small, and otherwise built like their full-size families."""

from __future__ import annotations

from typing import Any

from transformers import MixtralConfig, PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from eval.tokenizer import VOCABULARY

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


def demo_config(name: str) -> PretrainedConfig:
    if name == "qwen3_moe":
        return Qwen3MoeConfig(
            **{**_SHARED, "head_dim": 32},  # by default it is not hidden size / heads in this family
            num_hidden_layers=6,
            intermediate_size=256,
            num_experts=32,
            num_experts_per_tok=4,
            moe_intermediate_size=64,
            norm_topk_prob=True,
        )
    if name == "mixtral":
        return MixtralConfig(
            **_SHARED,
            head_dim=32,
            num_hidden_layers=4,
            intermediate_size=128,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=None,
        )
    if name == "qwen2_moe":
        return Qwen2MoeConfig(
            **_SHARED,
            num_hidden_layers=4,
            intermediate_size=256,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=128,
            norm_topk_prob=False,
        )
    raise ValueError(f"no demo model {name!r}: qwen3_moe, mixtral or qwen2_moe")
