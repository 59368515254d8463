"""What a compressed checkpoint means, written down a second time: numpy unpacking and a plain masked
router.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moe_rco.types import Option
from tests.compressed import Job


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def unpack(packed: np.ndarray, bits: int, length: int) -> np.ndarray:
    """int32 [R, W] -> codes [R, length]: `32 // bits` codes a word, lowest bits first, offset by
    2^(bits-1).
    """
    per_word = 32 // bits
    words = packed.astype(np.int64) & 0xFFFFFFFF
    codes = (words[:, :, None] >> (bits * np.arange(per_word))) & (2**bits - 1)
    return codes.reshape(len(packed), -1)[:, :length] - 2 ** (bits - 1)


def decode(tensors: dict[str, Tensor], base: str, option: Option) -> Tensor:
    """The weight [R, C] in float32 that the tensors under `base` stand for."""
    if option.name == "bf16":
        return tensors[f"{base}.weight"].float()
    rows, columns = tensors[f"{base}.weight_shape"].tolist()
    codes = unpack(tensors[f"{base}.weight_packed"].numpy(), option.bits, columns)
    scale = tensors[f"{base}.weight_scale"].float().numpy()
    repeat = columns // scale.shape[1]
    zero = np.zeros_like(scale)
    if f"{base}.weight_zero_point" in tensors:
        zero = unpack(tensors[f"{base}.weight_zero_point"].numpy().T, option.bits, rows).T
    weight = (codes - np.repeat(zero, repeat, 1)) * np.repeat(scale, repeat, 1)
    return torch.from_numpy(weight.astype(np.float32))


def reference_model(job: Job, out: Path) -> Any:
    """The original in float32 with the written experts' weights in its fused parameters and its routers
    masked.

    Pruned experts are NaN, so that any use of them shows.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.checkpoint.directory, dtype=torch.float32, experts_implementation="eager"
    )
    tensors, table, config = tensors_of(out), job.assignment.table, job.checkpoint.config
    with torch.no_grad():
        for group, option, _ in job.assignment.dense():
            for weight in group.weights:
                decoded = decode(tensors, weight.name.removesuffix(".weight"), option)
                model.get_parameter(weight.name).copy_(decoded)
    renormalise = config["model_type"] == "mixtral" or config["norm_topk_prob"]
    for layer in table.layers:
        block = model.model.layers[layer].mlp
        kept = torch.zeros(len(table.rows(layer)), dtype=torch.bool)
        for row in table.rows(layer):
            group, option = table.groups[row], job.assignment.option(row)
            kept[group.index] = not option.is_prune
            if option.is_prune:
                gate = up = down = torch.nan
                block.experts.gate_up_proj.data[group.index] = torch.nan
                block.experts.down_proj.data[group.index] = torch.nan
                continue
            gate, up, down = (
                decode(tensors, weight.name.removesuffix(".weight"), option) for weight in group.weights
            )
            block.experts.gate_up_proj.data[group.index] = torch.cat([gate, up])
            block.experts.down_proj.data[group.index] = down
        block.gate.forward = masked_router(block.gate, kept, config["num_experts_per_tok"], renormalise)
    return model


def masked_router(gate: nn.Module, kept: Tensor, top_k: int, renormalise: bool) -> Any:
    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight: Any = gate.weight
        logits = hidden.reshape(-1, hidden.shape[-1]) @ weight.T
        probabilities = logits.masked_fill(~kept, -torch.inf).softmax(-1)
        weights, ids = probabilities.topk(top_k, -1)
        if renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, ids

    return forward
