"""Makes an unmodified vLLM know our checkpoints: entry point `moe_rco` of the group `vllm.general_plugins`.

vLLM calls `register` in each of its processes, whatever model it serves, so little is imported here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from moe_rco.adapters import Adapter, get_adapter
from moe_rco.errors import ModelError
from moe_rco.plan import METHOD
from moe_rco.serve.config import check_tensors, dense_options, expected_tensors, layer_options
from moe_rco.types import Group


def register() -> None:
    """Register quantisation method `moe_rco` with vLLM."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    register_quantization_config(METHOD)(MoeRcoConfig)


class MoeRcoConfig(QuantizationConfig):
    """The `quantization_config` of one of our checkpoints, checked against the model it is of."""

    def __init__(self, entries: dict[str, Any]) -> None:
        super().__init__()
        self.entries = entries
        self._deployment_checked = False
        self._waiting, self._held, self._on_disk = 0, 0, 0.0

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # bfloat16, and Marlin

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MoeRcoConfig:
        from moe_rco.serve import vllm_compat  # raises UserError for a vLLM we do not know

        del vllm_compat
        return cls(config)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check the plan against the model, and against the files where these are in a directory.

        Raises ModelError, PlanError.
        """
        config = hf_config.to_dict()
        self.adapter: Adapter = get_adapter(config)
        self.model_config = config
        self.layers = layer_options(self.entries, self.adapter, config)
        self.dense = dense_options(self.entries, self.adapter, config)
        expected = expected_tensors(self.layers, self.adapter, config, self.dense)
        if Path(model_name).is_dir():
            from moe_rco.ckpt.manifest import check_quickly
            from moe_rco.ckpt.reader import Checkpoint

            check_quickly(Path(model_name), self.entries)
            check_tensors(expected, Checkpoint(model_name, allow_quantized=True).tensors)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from moe_rco.serve.vllm_compat import (
            LinearBase,
            RoutedExperts,
            UnquantizedLinearMethod,
            VocabParallelEmbedding,
        )

        if not self._deployment_checked:
            from moe_rco.serve.vllm_deployment import check_deployment

            check_deployment(self.layers, self._groups, self.dense)
            self._deployment_checked = True
        if isinstance(layer, LinearBase):
            return self._dense_method(prefix) or UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            from moe_rco.serve.vllm_compat import ParallelLMHead

            # Not every model of vLLM says what its embeddings are called.
            return self._dense_method(
                "lm_head" if isinstance(layer, ParallelLMHead) else "model.embed_tokens"
            )
        if isinstance(layer, RoutedExperts):
            from moe_rco.serve.vllm_method import MoeRcoMethod

            found = re.search(r"\.layers\.(\d+)\.", prefix)
            index = int(found[1]) if found else -1
            if index not in self.layers:
                raise ModelError(f"quantization_config says nothing of the experts {prefix}")
            options = self.layers[index]
            if len(options) != layer.global_num_experts:
                raise ModelError(
                    f"{prefix} has {layer.global_num_experts} experts in vLLM, {len(options)} in config.json"
                )
            self._waiting += 1
            return MoeRcoMethod(layer.moe_config, self._groups(index), options, self._layer_loaded)
        return None

    def _dense_method(self, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer with weights of a quantised dense group; None for any other."""
        tied = prefix == "lm_head" and self.adapter.tied(self.model_config)
        name = "model.embed_tokens" if tied else prefix
        for group, option in self.dense.items():
            if option.is_quantized and name in layers_of(group):
                from moe_rco.serve.vllm_dense import DenseMethod, matrices_of

                return DenseMethod(group, option, matrices_of(prefix), tied)
        return None

    def _groups(self, layer: int) -> list[Group]:
        return [
            self.adapter.expert(self.model_config, layer, expert) for expert in range(len(self.layers[layer]))
        ]

    def _layer_loaded(self, held: int, on_disk: float) -> None:
        self._waiting -= 1
        self._held += held
        self._on_disk += on_disk
        if self._waiting == 0:
            from moe_rco.serve.vllm_compat import init_logger

            init_logger("vllm.moe_rco").info(
                "moe_rco: routed experts take %d bytes in this process, its share on disk is %.0f bytes",
                self._held,
                self._on_disk,
            )


def layers_of(group: Group) -> tuple[str, ...]:
    """The names of the layers of vLLM that have a dense group's weights."""
    if group.kind == "shared_experts":
        return f"{group.name}.gate_up_proj", f"{group.name}.down_proj"
    return (group.name,)
