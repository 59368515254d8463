"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B)."""

from moe_rco.adapters.base import Adapter


class Qwen3Moe(Adapter):
    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
