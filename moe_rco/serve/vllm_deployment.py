"""Refuses what vLLM was asked to do with a model that we cannot, before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from moe_rco.errors import ModelError, UserError
from moe_rco.serve.config import LayerOptions
from moe_rco.serve.vllm_compat import current_platform, get_current_vllm_config
from moe_rco.serve.vllm_shard import check_split
from moe_rco.types import Group, Option

MARLIN_GROUPS = (None, 32, 64, 128)


def check_deployment(
    layers: LayerOptions, groups: Callable[[int], Sequence[Group]], dense: Mapping[Group, Option]
) -> None:
    """Check the platform and the parallelism that vLLM was configured with.

    groups: the experts of a layer. dense: what became of other groups. Raises UserError (a feature we lack), ModelError (the
    model's sizes).
    """
    config = get_current_vllm_config()
    parallel = config.parallel_config
    if parallel.enable_eplb:
        raise UserError("moe_rco models cannot be served with --enable-eplb: its experts differ in size")
    if config.lora_config is not None:
        raise UserError("moe_rco models cannot be served with --enable-lora: vLLM would wrap the experts")
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise UserError(f"moe_rco models run on CUDA and on CPUs, not on {current_platform.device_name}")
    for group, option in dense.items():
        for weight in group.weights:
            if weight.name.endswith((".o_proj.weight", ".down_proj.weight")):
                check_split(weight, option, parallel.tensor_parallel_size)
        if current_platform.is_cuda() and group.kind != "embeddings":
            _check_cuda(group, option)
    parts = parallel.tensor_parallel_size * parallel.data_parallel_size
    parts *= getattr(parallel, "prefill_context_parallel_size", 1)
    for layer, options in layers.items():
        for group, option in zip(groups(layer), options, strict=True):
            if option.is_prune:
                continue
            if not parallel.enable_expert_parallel:
                check_split(group.weights[2], option, parts)
            if current_platform.is_cuda():
                _check_cuda(group, option)


def _check_cuda(group: Group, option: Option) -> None:
    if not option.is_quantized:
        return
    hidden = group.weights[0].shape[1]
    if option.bits in (2, 3):
        raise ModelError(
            f"{group.name} is {option}, which no CUDA kernel of vLLM runs yet; "
            "serve it on a CPU, or search again without int2 and int3"
        )
    if option.group_size not in MARLIN_GROUPS or hidden % 128:
        raise ModelError(
            f"{group.name} is {option} of {hidden} inputs; vLLM's Marlin kernel needs inputs in multiples of 128 "
            "and groups of 32, 64 or 128 or none"
        )
