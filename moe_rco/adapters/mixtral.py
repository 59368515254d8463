"""Mixtral (8x7B, 8x22B): every layer routes, other names on disk, weights always renormalised."""

from __future__ import annotations

from moe_rco.adapters.base import Adapter, Config, get_field


class Mixtral(Adapter):
    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    block = "block_sparse_moe"
    projections = ("w1", "w3", "w2")
    intermediate_key = "intermediate_size"
    quantised_embeddings = False

    def renormalise(self, config: Config) -> bool:
        return True

    def moe_layers(self, config: Config) -> list[int]:
        return list(range(int(get_field(config, "num_hidden_layers"))))

    def disk_name(self, parameter: str) -> str:
        return parameter.replace(".mlp.", f".{self.block}.")
