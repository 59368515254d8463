"""config.json of the real models that the shipped recipes are for, as far as it decides sizes."""

from __future__ import annotations

from typing import Any

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "attention_bias": False,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 40960, "hidden_act": "silu",
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-06,
}  # fmt: skip
QWEN15_MOE_A27B: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "torch_dtype": "bfloat16",
    "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
    "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False, "decoder_sparse_step": 1,
    "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 8192, "hidden_act": "silu",
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-06,
}  # fmt: skip
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "torch_dtype": "bfloat16",
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 32768, "hidden_act": "silu",
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-05, "sliding_window": None,
}  # fmt: skip
OLMOE_1B_7B: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "torch_dtype": "bfloat16",
    "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
    "vocab_size": 50304, "tie_word_embeddings": False, "max_position_embeddings": 4096, "hidden_act": "silu",
    "rope_theta": 10000.0, "rms_norm_eps": 1e-05, "clip_qkv": None,
}  # fmt: skip
REAL: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen/Qwen3-30B-A3B": (QWEN3_30B_A3B, 61_064_245_248),
    "Qwen/Qwen1.5-MoE-A2.7B": (QWEN15_MOE_A27B, 28_631_568_384),
    "mistralai/Mixtral-8x7B-v0.1": (MIXTRAL_8X7B, 93_405_585_408),
    "allenai/OLMoE-1B-7B-0924": (OLMOE_1B_7B, 13_838_323_712),
}
"""By name on the Hub: the configuration, and `total_size` in the index of the published weights."""
