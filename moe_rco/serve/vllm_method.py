"""Loads and runs the routed experts of one layer in vLLM.

Experts keep their original ids and the gate all its rows; a token's experts are chosen among those not pruned: on a
GPU by vLLM's own router from masked logits, on a CPU by the operator that runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_rco.adapters.base import MASKED_LOGIT
from moe_rco.errors import ModelError
from moe_rco.quant.packing import PACKED, SCALE, SHAPE, WEIGHT, ZERO_POINT, layout
from moe_rco.serve.vllm_compat import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    MoEActivation,
    current_platform,
    get_current_vllm_config,
)
from moe_rco.serve.vllm_shard import shard
from moe_rco.types import Group, Option

_MATRICES = {"w1": 0, "w3": 1, "w2": 2}
"""vLLM's names of gate, up and down, in the order of a group's weights."""
_SUFFIXES = (WEIGHT, PACKED, SCALE, ZERO_POINT, SHAPE)


class MoeRcoMethod(FusedMoEMethodBase):
    """What vLLM calls for one layer's experts.

    groups, options: of every expert, by id. loaded: called once the layer is complete, with the bytes this
    process holds and its share of the bytes on disk.
    """

    def __init__(
        self,
        moe: FusedMoEConfig,
        groups: Sequence[Group],
        options: Sequence[Option],
        loaded: Callable[[int, float], None],
    ) -> None:
        super().__init__(moe)
        self.groups, self.options, self._report = groups, options, loaded
        self._loaded: set[tuple[int, int, str]] = set()

    @property
    def is_monolithic(self) -> bool:
        # Monolithic methods are given the router's logits, which the mask must change before any choice.
        return True

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate what is on disk for this process, and register handles by which vLLM passes us tensors."""
        hidden = self.groups[0].weights[0].shape[1]
        if hidden_size != hidden:
            raise ModelError(f"{layer.layer_name}: vLLM pads the hidden size {hidden} to {hidden_size} here")
        if layer.activation != MoEActivation.SILU:
            raise ModelError(f"{layer.layer_name}: the activation {layer.activation} is not supported")
        to_local = layer.expert_map_manager.map_global_to_local
        self.local = {
            expert: option
            for expert, option in enumerate(self.options)
            if not option.is_prune and to_local(expert) != -1
        }
        layer.experts = self._experts(layer, hidden_size, intermediate_size_per_partition)
        pruned = torch.tensor([option.is_prune for option in self.options])
        layer.register_buffer("pruned_experts", pruned if pruned.any() else None, persistent=False)
        for kind in ("w13", "w2"):
            for suffix in _SUFFIXES:
                handle = nn.Parameter(torch.empty(0), requires_grad=False)
                handle.weight_loader = partial(self._load, layer, suffix)  # pyright: ignore[reportAttributeAccessIssue]
                layer.register_parameter(f"{kind}_{suffix}", handle)
        # The runner, which has the router, registers itself here after this layer was made.
        self._runners = get_current_vllm_config().compilation_config.static_forward_context

    def _load(
        self,
        layer: Any,
        suffix: str,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        option, matrix = self.options[expert_id], _MATRICES[shard_id]
        weight = self.groups[expert_id].weights[matrix]
        name = f"{weight.name.removesuffix('.weight')}.{suffix}"
        promised = layout(weight.shape, option).get(suffix)
        found = f"{str(loaded_weight.dtype).removeprefix('torch.')} {list(loaded_weight.shape)}"
        if promised is None:
            raise ModelError(
                f"expert tensor {name} does not belong to an expert of option {option}; copy the model again"
            )
        shape, dtype = promised
        if (tuple(loaded_weight.shape), loaded_weight.dtype) != (shape, dtype):
            raise ModelError(
                f"expert tensor {name} is {found}, quantization_config promises "
                f"{str(dtype).removeprefix('torch.')} {list(shape)}; copy the model again"
            )
        if suffix == SHAPE and loaded_weight.tolist() != list(weight.shape):
            raise ModelError(
                f"expert tensor {name} is {loaded_weight.tolist()}, not {list(weight.shape)}; copy the model again"
            )
        if expert_id in self.local:
            if suffix != SHAPE:
                parallel = self.moe.moe_parallel_config
                part = shard(
                    loaded_weight,
                    suffix,
                    option,
                    weight.shape,
                    matrix == 2,
                    parallel.tp_rank,
                    parallel.tp_size,
                )
                layer.experts.load(expert_id, matrix, suffix, part)
            self._loaded.add((expert_id, matrix, suffix))
        return expert_id in self.local if return_success else None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse a layer with a tensor missing; make the rest ready to run."""
        on_disk = 0
        for expert, option in self.local.items():
            for matrix, weight in enumerate(self.groups[expert].weights):
                for suffix, (shape, dtype) in layout(weight.shape, option).items():
                    if (expert, matrix, suffix) not in self._loaded:
                        name = f"{weight.name.removesuffix('.weight')}.{suffix}"
                        raise ModelError(f"expert tensor {name} is missing; copy the model again")
                    on_disk += torch.Size(shape).numel() * dtype.itemsize
        layer.experts.prepare()
        self._router = self._runners[layer.layer_name].router
        self._report(layer.experts.nbytes, on_disk / self.moe.moe_parallel_config.tp_size)

    def apply_monolithic(
        self, layer: Any, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None
    ) -> Tensor:
        """x [T, H], router_logits [T, E] -> this process's part of the experts' output [T, H]."""
        if current_platform.is_cpu():
            return layer.experts(x, router_logits)
        if layer.pruned_experts is not None:
            lowest = max(MASKED_LOGIT, torch.finfo(router_logits.dtype).min)
            router_logits = router_logits.masked_fill(layer.pruned_experts, lowest)
        weights, ids = self._router.select_experts(
            hidden_states=x, router_logits=router_logits, input_ids=input_ids
        )
        return layer.experts(x, weights, ids)

    def _experts(self, layer: Any, hidden: int, intermediate: int) -> nn.Module:
        if current_platform.is_cpu():
            from moe_rco.serve.vllm_cpu import CpuExperts

            unusual = (layer.use_grouped_topk, layer.custom_routing_function, layer.e_score_correction_bias)
            if layer.scoring_func != "softmax" or unusual != (False, None, None):
                raise ModelError(
                    f"{layer.layer_name}: only routing by a softmax over all experts is supported"
                )
            return CpuExperts(
                self.options, self.local, hidden, intermediate, layer.top_k, bool(layer.renormalize)
            )
        from moe_rco.serve.vllm_cuda import CudaExperts

        return CudaExperts(self.local, len(self.options), hidden, intermediate)
