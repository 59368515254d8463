"""Describes a model directory: which experts are there, in which form, and how many bytes they take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_rco.adapters import get_adapter
from moe_rco.adapters.base import Adapter
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.errors import ModelError, PlanError
from moe_rco.plan import FILE_NAME, METHOD, Plan, by_expert
from moe_rco.report import DenseGroup
from moe_rco.serve.config import check_tensors, dense_options, expected_tensors, layer_options
from moe_rco.types import Layout


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
    """A model directory. `expert_numel` counts the weights of all routed experts before pruning; `dense` are other groups that
    were chosen for, which are not among the `other_bytes`.

    Of our own outputs experts are those of the original model, by their original ids, for both layouts.
    """

    directory: Path
    family: str
    top_k: int
    num_experts: int
    hidden: int
    intermediate: int
    layers: tuple[LayerInspection, ...]
    expert_numel: int
    other_bytes: int
    layout: Layout = "mixed"
    dense: tuple[DenseGroup, ...] = ()

    @property
    def dense_bytes(self) -> int:
        return sum(group.bytes for group in self.dense)

    @property
    def expert_bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)


def inspect(directory: str | Path) -> Inspection:
    """Read config and file headers of an original model or of our output, no weights. Raises ModelError."""
    checkpoint = Checkpoint(directory, allow_quantized=True)
    config = checkpoint.config
    adapter = get_adapter(config)
    hidden, intermediate = adapter.expert_shape(config)
    sizes = _layer_sizes(checkpoint, adapter)
    plan = _stock_plan(checkpoint)
    options = _options(checkpoint, adapter) if plan is None else _stock_options(checkpoint, adapter, plan)
    layers = tuple(LayerInspection(layer, chosen, sizes[layer]) for layer, chosen in options.items())
    dense = tuple(_dense(checkpoint, adapter))
    experts = sum(len(layer.options) for layer in layers)
    everything = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    return Inspection(
        directory=checkpoint.directory,
        family=adapter.model_type,
        top_k=adapter.top_k(config),
        num_experts=experts // len(layers),
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        expert_numel=experts * adapter.expert(config, layers[0].layer, 0).numel,
        other_bytes=everything - sum(part.bytes for part in (*layers, *dense)),
        layout="mixed" if plan is None else "stock",
        dense=dense,
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
    dense = dense_options(quantization, adapter, config)
    check_tensors(expected_tensors(layers, adapter, config, dense), checkpoint.tensors)
    return {layer: tuple(option.name for option in options) for layer, options in layers.items()}


def _dense(checkpoint: Checkpoint, adapter: Adapter) -> Iterator[DenseGroup]:
    """The groups besides experts that were chosen for; none where the model is not ours."""
    config = checkpoint.config
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != METHOD:
        return
    found = dense_options(quantization, adapter, config)
    for group in adapter.every_dense(config) if found else ():
        if group in found:
            names = expected_tensors({}, adapter, config, {group: found[group]})
            size = sum(checkpoint.tensors[name].nbytes for name in names)
            option = found[group].name
            yield DenseGroup(name=group.name, kind=group.kind, layer=group.layer, option=option, bytes=size)


def _stock_plan(checkpoint: Checkpoint) -> Plan | None:
    """The plan of a directory that we wrote in the stock layout; None for any other."""
    if not (checkpoint.directory / FILE_NAME).is_file():
        return None
    try:
        plan = Plan.load(checkpoint.directory)
    except PlanError:
        return None  # somebody else's file of that name
    return plan if plan.layout == "stock" else None


def _stock_options(checkpoint: Checkpoint, adapter: Adapter, plan: Plan) -> dict[int, tuple[str, ...]]:
    """Layer -> each original expert's option, checked against the tensors of the renumbered ones."""
    config, by_layer = checkpoint.config, {layer: {} for layer in adapter.moe_layers(checkpoint.config)}
    for (layer, expert), option in by_expert(plan.layers).items():
        if layer not in by_layer:
            raise ModelError(
                f"{checkpoint.directory}: the plan names layer {layer}, the model has no experts there"
            )
        by_layer[layer][expert] = option
    original = {layer: [option for _, option in sorted(of.items())] for layer, of in by_layer.items()}
    written = {layer: tuple(o for o in options if not o.is_prune) for layer, options in original.items()}
    for layer, kept in written.items():
        if len(kept) != adapter.num_experts(config):
            raise ModelError(
                f"{checkpoint.directory}: the plan keeps {len(kept)} experts of layer {layer}, config.json has "
                f"{adapter.num_experts(config)}"
            )
    check_tensors(expected_tensors(written, adapter, config), checkpoint.tensors)
    return {layer: tuple(option.name for option in options) for layer, options in original.items()}


def _layer_sizes(checkpoint: Checkpoint, adapter: Adapter) -> dict[int, int]:
    """Layer -> bytes of its routed experts' tensors."""
    prefixes = {
        adapter.expert(checkpoint.config, layer, 0).name.removesuffix("0"): layer
        for layer in adapter.moe_layers(checkpoint.config)
    }
    sizes = dict.fromkeys(prefixes.values(), 0)
    for name, tensor in checkpoint.tensors.items():
        before, found, _ = name.partition(".experts.")
        if found and before + found in prefixes:
            sizes[prefixes[before + found]] += tensor.nbytes
    return sizes
