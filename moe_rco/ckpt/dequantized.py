"""Reads a compressed-tensors checkpoint into full tensors, by that library's own code and the checkpoint's config.

transformers reads such experts only where all layers have one bit width, and only in the dtype of the scales
(see `stock.py`); this reads them all, and exactly.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from moe_rco.ckpt.reader import Checkpoint
from moe_rco.errors import ModelError

_PACKED = "weight_packed"


def read_dequantized(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name -> tensor in `dtype`, packed weights multiplied out in float32 first.

    Raises ModelError where quantization_config names no scheme for a packed weight, or one for a plain one.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(checkpoint.config["quantization_config"])
    compressor: Any = BaseCompressor.get_value_from_registry(config.format)
    modules: dict[str, dict[str, Tensor]] = {}
    for name in checkpoint.tensors:
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = checkpoint.read(name)
    result: dict[str, Tensor] = {}
    for module, tensors in modules.items():
        scheme = _scheme(config, module)
        if (scheme is None) == (_PACKED in tensors):
            what = "names no scheme for" if scheme is None else "promises packed weights of"
            raise ModelError(f"{checkpoint.directory}: quantization_config {what} {module}")
        if scheme is not None:
            tensors["weight_scale"] = tensors["weight_scale"].float()
            tensors = {"weight": compressor.decompress(tensors, scheme)["weight"]}
        result |= {f"{module}.{suffix}": tensor.to(dtype) for suffix, tensor in tensors.items()}
    return result


def _scheme(config: Any, module: str) -> Any:
    """The scheme of the first group with a pattern for a module; None if it is ignored or no group has."""

    def matches(patterns: list[str]) -> bool:
        return any(re.match(pattern.removeprefix("re:"), module) for pattern in patterns)

    if matches(config.ignore or []):
        return None
    return next((group for group in config.config_groups.values() if matches(group.targets)), None)
