"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): a shared expert beside the routed ones, weights not renormalised."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_rco.adapters.base import Adapter


class Qwen2Moe(Adapter):
    model_type = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"

    def always_on(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        modules: Any = block
        return torch.sigmoid(modules.shared_expert_gate(x)) * modules.shared_expert(x)
