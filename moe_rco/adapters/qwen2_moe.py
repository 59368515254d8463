"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): a shared expert beside the routed ones, weights not renormalised."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_rco.adapters.base import Adapter, Config, get_field
from moe_rco.types import Group, Weight


class Qwen2Moe(Adapter):
    model_type = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"

    def shared_expert(self, config: Config, layer: int) -> Group:
        hidden = int(get_field(config, "hidden_size"))
        inner = int(get_field(config, "shared_expert_intermediate_size"))
        name = f"model.layers.{layer}.{self.block}.shared_expert"
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        weights = tuple(
            Weight(f"{name}.{projection}.weight", shape)
            for projection, shape in zip(self.projections, shapes, strict=True)
        )
        return Group(name, layer, 0, weights, "shared_experts")

    def always_on(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        modules: Any = block
        return torch.sigmoid(modules.shared_expert_gate(x)) * modules.shared_expert(x)
