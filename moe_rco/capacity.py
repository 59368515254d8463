"""What serving takes of GPUs beside the routed experts, and so what is left for them: the budget form `fit`.

Other weights are exact, and so is the KV cache: vLLM keeps whole blocks of it. What a batch takes while it is computed, and what
CUDA takes for itself, are estimates.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_rco.adapters import Adapter
from moe_rco.adapters.base import Config, get_field
from moe_rco.budget import Fit
from moe_rco.calib.refusals import REFUSALS, reason
from moe_rco.errors import BudgetError, ModelError
from moe_rco.types import Room
from moe_rco.units import exact_size, format_size

BLOCK = 16
"""Tokens of a block of vLLM's KV cache."""
RESERVE = 1 << 30
"""Bytes of a GPU for CUDA's context, its libraries' workspaces, and CUDA graphs."""
LARGE_GPU = 70 << 30
"""From so many bytes on vLLM computes more tokens at once."""
ITEM = 2
"""Bytes of an unquantised weight, a key or a value as vLLM holds them unless told otherwise."""


def kv_bytes(config: Config, tensor_parallel: int = 1, itemsize: int = ITEM) -> int:
    """Bytes of keys and values of one token on one of the GPUs that share the heads, all layers. Raises ModelError."""
    heads = int(get_field(config, "num_attention_heads"))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or get_field(config, "hidden_size") // heads)
    return (
        2
        * int(get_field(config, "num_hidden_layers"))
        * max(1, kv_heads // tensor_parallel)
        * head_dim
        * itemsize
    )


def batched_tokens(gpu_memory: int) -> int:
    """vLLM's own default of --max-num-batched-tokens where a server is started."""
    return 8192 if gpu_memory >= LARGE_GPU else 2048


def activation_bytes(config: Config, adapter: Adapter, tokens: int, sequences: int) -> int:
    """About what a batch takes of one GPU: a layer's hidden states and its experts' inputs, and the logits in float32."""
    hidden, intermediate = adapter.expert_shape(config)
    top_k = adapter.top_k(config)
    # vLLM's fused experts have two buffers: gate and up, whose place the outputs take later, and what comes of the two.
    experts = top_k * (max(2 * intermediate, hidden) + intermediate)
    logits = (
        3 * 4 * sequences * int(config.get("vocab_size") or 0)
    )  # as they are, scaled, and sorted or as probabilities
    return tokens * (4 * hidden + experts) * ITEM + logits


def room(fit: Fit, config: dict[str, Any], adapter: Adapter, covered: int) -> Room:
    """What `fit` leaves of its GPUs for what the budget covers of a model, which are `covered` weights.

    Raises BudgetError where that is nothing, or the model does not reach so far; ModelError where transformers refuses the
    configuration.
    """
    longest = config.get("max_position_embeddings")
    if longest is not None and fit.max_model_len > int(longest):
        raise BudgetError(
            f"budget: fit.max_model_len is {fit.max_model_len:,}, but the model reads {int(longest):,} tokens at most"
        )
    devices = fit.tensor_parallel_size
    tokens = fit.max_num_seqs * -(-fit.max_model_len // BLOCK) * BLOCK
    batch = min(tokens, batched_tokens(fit.gpu_memory))
    found = Room(
        serve=fit.serve,
        usable=int(fit.gpu_memory * fit.gpu_memory_utilization) * devices,
        other_weights=(model_numel(config) - covered) * ITEM,
        kv_cache=kv_bytes(config, devices) * tokens * devices,
        activations=activation_bytes(config, adapter, batch, fit.max_num_seqs) * devices,
        reserve=RESERVE * devices,
    )
    if found.left <= 0:
        raise BudgetError(
            f"budget: fit leaves nothing for the routed experts: of {format_size(found.usable)} on {devices} x "
            f"{exact_size(fit.gpu_memory)}, other weights take {format_size(found.other_weights)}, the KV cache "
            f"{format_size(found.kv_cache)}, activations {format_size(found.activations)} and CUDA "
            f"{format_size(found.reserve)}; lower fit.max_num_seqs or fit.max_model_len, or raise fit.tensor_parallel_size"
        )
    return found


def model_numel(config: dict[str, Any]) -> int:
    """All weights of the model that a configuration describes, tied ones once. Raises ModelError where it is refused."""
    try:
        described = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described)
    except REFUSALS as error:
        raise ModelError(f"transformers cannot use this config.json ({reason(error)}); correct it") from error
    return sum(parameter.numel() for parameter in model.parameters())
