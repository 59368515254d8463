"""What transformers calls while it loads one of our checkpoints. Importing this imports transformers; see
`hf.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_rco.adapters import get_adapter
from moe_rco.adapters.base import HEAD
from moe_rco.ckpt.header import HeaderError, TensorInfo, read_header
from moe_rco.errors import ModelError
from moe_rco.plan import METHOD
from moe_rco.serve.config import check_tensors, dense_options, expected_tensors, layer_options
from moe_rco.serve.experts import PackedEmbedding, PackedLinear, PrunedRouting, RoutedExperts, TiedHead
from moe_rco.types import Group, Option


class MoeRcoConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json, kept as it is so that it is saved as it was."""

    def __init__(self, **entries: Any) -> None:
        self.__dict__.update(entries)
        self.quant_method: Any = entries.get("quant_method", METHOD)


class MoeRcoQuantizer(HfQuantizer):
    """Puts `RoutedExperts` in the place of each layer's experts before the weights are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = model.config.to_dict()
        adapter = get_adapter(config)
        layers = layer_options(self.quantization_config.to_dict(), adapter, config)
        dense = dense_options(self.quantization_config.to_dict(), adapter, config)
        expected = expected_tensors(layers, adapter, config, dense)
        if checkpoint_files is not None:
            check_tensors(expected, _headers(checkpoint_files))
        for layer, options in layers.items():
            block = model.base_model.layers[layer].mlp
            groups = [adapter.expert(config, layer, expert) for expert in range(len(options))]
            block.experts = RoutedExperts(groups, options, block.experts.act_fn)
            if any(option.is_prune for option in options):
                routing = PrunedRouting(options, adapter.top_k(config), adapter.renormalise(config))
                block.gate.register_forward_hook(routing)
        for group, option in dense.items():
            if option.is_quantized:
                _replace(model, group, option, adapter.tied(config))
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        # transformers leaves the dtype on disk to every parameter it loads under another name (Mixtral's
        # routers).
        for name, parameter in model.named_parameters():
            if parameter.dtype != self._dtypes[name]:
                parameter.data = parameter.data.to(self._dtypes[name])
        for name, module in model.named_modules():
            if isinstance(module, RoutedExperts | PackedLinear):
                _check_filled(name, module)

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Keep the renamings, drop what merges the experts of a layer into one tensor."""
        return [
            conversion
            for conversion in weight_conversions
            if not (
                isinstance(conversion, WeightConverter)
                and any("experts" in target for target in conversion.target_patterns)
            )
        ]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _replace(model: Any, group: Group, option: Option, tied: bool) -> None:
    """Put modules with packed weights in the place of a dense group's."""
    for weight in group.weights:
        path = weight.name.removesuffix(".weight")
        old = model.get_submodule(path)
        if group.kind != "embeddings":
            model.set_submodule(path, PackedLinear(weight.shape, option, old.bias))
            continue
        packed = PackedEmbedding(weight.shape, option, old.weight.dtype)
        model.set_submodule(path, packed)
        if tied:
            model.lm_head = TiedHead(packed)
            model.all_tied_weights_keys.pop(HEAD, None)  # there is no parameter left to be tied


def _headers(files: Sequence[str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        try:
            tensors |= read_header(Path(file))
        except (HeaderError, OSError) as error:
            raise ModelError(f"{file}: {error}; copy the model again") from error
    return tensors


def _check_filled(name: str, module: nn.Module) -> None:
    for buffer_name, buffer in module.named_buffers():
        if buffer.device == torch.device("meta"):
            raise ModelError(f"{name}.{buffer_name} was not loaded; copy the model again")
