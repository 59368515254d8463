"""The `quantization_config` of our checkpoints: read, and checked against the model and its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from moe_rco.adapters.base import Adapter, Config
from moe_rco.ckpt.header import DTYPE_NAMES, TensorInfo
from moe_rco.errors import ModelError, PlanError, RecipeError
from moe_rco.files import first_complaint
from moe_rco.plan import DENSE_FORMAT_VERSION, FORMAT_VERSION, METHOD, DenseGroups, Layers, by_expert, by_name
from moe_rco.quant.packing import cost_table, layout
from moe_rco.types import Group, Option

LayerOptions = dict[int, tuple[Option, ...]]
"""Decoder layer -> the option of each of its experts, in order of their ids."""


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: str
    format_version: int
    layers: Layers
    dense: DenseGroups = {}


def _read(quantization_config: Mapping[str, Any]) -> _Schema:
    """Raises ModelError for what is not of our making, of another version, or damaged."""
    version = quantization_config.get("format_version")
    if quantization_config.get("quant_method") != METHOD:
        raise ModelError(
            f"quantization_config is of '{quantization_config.get('quant_method')}', not of {METHOD}"
        )
    if version not in (FORMAT_VERSION, DENSE_FORMAT_VERSION):
        raise ModelError(
            f"quantization_config has format_version {version}, this moe_rco reads {FORMAT_VERSION} and "
            f"{DENSE_FORMAT_VERSION}; install the version that wrote the model"
        )
    try:
        found = _Schema.model_validate(dict(quantization_config))
    except ValidationError as error:
        raise ModelError(f"quantization_config is damaged: {first_complaint(error)}") from error
    if bool(found.dense) != (version == DENSE_FORMAT_VERSION):
        raise ModelError(
            f"quantization_config is damaged: 'dense' does not belong to format_version {version}"
        )
    return found


def layer_options(quantization_config: Mapping[str, Any], adapter: Adapter, config: Config) -> LayerOptions:
    """What every expert of a model became. Raises ModelError unless each expert of each MoE layer has one
    option.
    """
    try:
        options = by_expert(_read(quantization_config).layers)
    except PlanError as error:
        raise ModelError(f"quantization_config is damaged: {error}") from error
    experts = range(adapter.num_experts(config))
    expected = {(layer, expert) for layer in adapter.moe_layers(config) for expert in experts}
    if wrong := expected ^ options.keys():
        layer, expert = min(wrong)
        what = "has no option for" if (layer, expert) in expected else "names"
        end = "" if (layer, expert) in expected else ", which the model does not have"
        raise ModelError(f"quantization_config {what} expert {expert} of layer {layer}{end}")
    result = {
        layer: tuple(options[layer, expert] for expert in experts) for layer in adapter.moe_layers(config)
    }
    for layer, chosen in result.items():
        kept = sum(not option.is_prune for option in chosen)
        if kept < adapter.top_k(config):
            raise ModelError(
                f"quantization_config keeps {kept} experts of layer {layer}, "
                f"but {adapter.top_k(config)} are used per token"
            )
    return result


def dense_options(
    quantization_config: Mapping[str, Any], adapter: Adapter, config: Config
) -> dict[Group, Option]:
    """What became of the dense groups that were chosen for. Raises ModelError unless each is the model's, and can be that."""
    try:
        options = by_name(_read(quantization_config).dense)
    except PlanError as error:
        raise ModelError(f"quantization_config is damaged: {error}") from error
    groups = {group.name: group for group in (adapter.every_dense(config) if options else ())}
    for name, option in options.items():
        if name not in groups:
            raise ModelError(f"quantization_config names {name}, which the model does not have")
        if not groups[name].admits(option):
            raise ModelError(f"quantization_config is damaged: {name} cannot be {option}")
    return {groups[name]: option for name, option in options.items()}


def expected_tensors(
    layers: LayerOptions, adapter: Adapter, config: Config, dense: Mapping[Group, Option] | None = None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name on disk -> (shape, dtype) of every tensor of experts and dense groups. Raises ModelError for impossible group
    sizes.
    """
    tensors = {}
    for group, option in (dense or {}).items():
        tensors |= _tensors_of(group, option)
    for layer, options in layers.items():
        groups = [adapter.expert(config, layer, expert) for expert in range(len(options))]
        try:
            cost_table(groups, tuple(dict.fromkeys(options)), 0, 0)
        except RecipeError as error:
            raise ModelError(f"quantization_config is damaged: {error}") from error
        for group, option in zip(groups, options, strict=True):
            tensors |= _tensors_of(group, option)
    return tensors


def _tensors_of(group: Group, option: Option) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {
        f"{weight.name.removesuffix('.weight')}.{suffix}": form
        for weight in group.weights
        for suffix, form in layout(weight.shape, option).items()
    }


def kind_of(name: str) -> str:
    """What to call a tensor in messages."""
    return "expert tensor" if ".experts." in name else "tensor"


def check_tensors(
    expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]], found: Mapping[str, TensorInfo]
) -> None:
    """Check that a checkpoint holds exactly the tensors of experts and dense groups promised. Raises ModelError naming the first
    wrong.
    """
    for name, (shape, dtype) in expected.items():
        tensor = found.get(name)
        if tensor is None:
            raise ModelError(
                f"{kind_of(name)} {name}, which quantization_config promises, is missing; copy the model again"
            )
        if (tensor.shape, tensor.dtype) != (shape, DTYPE_NAMES[dtype]):
            raise ModelError(
                f"{kind_of(name)} {name} in {tensor.file} is {tensor.dtype} {list(tensor.shape)}, "
                f"quantization_config promises {DTYPE_NAMES[dtype]} {list(shape)}; copy the model again"
            )
    matrices = {name.rpartition(".")[0] for name in expected}
    for name, tensor in found.items():
        of_ours = ".experts." in name or (name.rpartition(".")[0] in matrices and not name.endswith(".bias"))
        if of_ours and name not in expected:
            raise ModelError(
                f"{tensor.file} holds {kind_of(name)} {name}, which quantization_config does not account for; "
                "copy the model again"
            )
