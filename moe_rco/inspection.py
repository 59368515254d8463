"""Describes a model directory: which experts are there, in which form, and how many bytes they take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_rco.adapters import get_adapter
from moe_rco.adapters.base import Adapter
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.plan import METHOD
from moe_rco.serve.config import check_tensors, expected_tensors, layer_options


@dataclass(frozen=True)
class LayerInspection:
    """One MoE layer: the option of each expert by its id, and the experts' bytes in the files."""

    layer: int
    options: tuple[str, ...]
    bytes: int

    @property
    def kept(self) -> int:
        return sum(option != "prune" for option in self.options)


@dataclass(frozen=True)
class Inspection:
    """A model directory. `expert_numel` counts the weights of all routed experts before pruning."""

    directory: Path
    family: str
    top_k: int
    num_experts: int
    hidden: int
    intermediate: int
    layers: tuple[LayerInspection, ...]
    expert_numel: int
    other_bytes: int

    @property
    def expert_bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)


def inspect(directory: str | Path) -> Inspection:
    """Read config and file headers of an original model or of our output, no weights. Raises ModelError."""
    checkpoint = Checkpoint(directory, allow_quantized=True)
    config = checkpoint.config
    adapter = get_adapter(config)
    hidden, intermediate = adapter.expert_shape(config)
    sizes = _expert_sizes(checkpoint)
    layers = tuple(
        LayerInspection(
            layer,
            options,
            sum(sizes.get(adapter.expert(config, layer, index).name, 0) for index in range(len(options))),
        )
        for layer, options in _options(checkpoint, adapter).items()
    )
    everything = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    return Inspection(
        directory=checkpoint.directory,
        family=adapter.model_type,
        top_k=adapter.top_k(config),
        num_experts=adapter.num_experts(config),
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        expert_numel=sum(group.numel for group in adapter.groups(config)),
        other_bytes=everything - sum(layer.bytes for layer in layers),
    )


def _options(checkpoint: Checkpoint, adapter: Adapter) -> dict[int, tuple[str, ...]]:
    """Layer -> each expert's option, checked against the tensors; of an original model the storage type."""
    config = checkpoint.config
    experts = range(adapter.num_experts(config))
    quantization = config.get("quantization_config")
    if quantization is None:
        checkpoint.check_experts(adapter)
        return {
            layer: tuple(
                checkpoint.tensors[adapter.expert(config, layer, index).weights[0].name].dtype.lower()
                for index in experts
            )
            for layer in adapter.moe_layers(config)
        }
    method = str(quantization.get("quant_method"))
    if method != METHOD:
        # Somebody else's format: the bytes are right, the experts' form is what its config calls it.
        return {layer: (method,) * len(experts) for layer in adapter.moe_layers(config)}
    layers = layer_options(quantization, adapter, config)
    check_tensors(expected_tensors(layers, adapter, config), checkpoint.tensors)
    return {layer: tuple(option.name for option in options) for layer, options in layers.items()}


def _expert_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of an expert's tensors by its name on disk (`model.layers.0.mlp.experts.7`)."""
    sizes: dict[str, int] = {}
    for name, tensor in checkpoint.tensors.items():
        before, found, after = name.partition(".experts.")
        if found:
            expert = f"{before}{found}{after.partition('.')[0]}"
            sizes[expert] = sizes.get(expert, 0) + tensor.nbytes
    return sizes
