"""The stock layout on disk: a smaller model of the same family, as vLLM and transformers read it without us.

Every layer keeps n experts, numbered anew from 0 in the order of their original ids; routers lose the other
experts' rows; config.json counts n experts. Precision is told by a `quantization_config` of
compressed-tensors, whose packing our experts already have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_rco.adapters.base import Adapter
from moe_rco.ckpt.header import TensorInfo
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.writer import CHUNK_BYTES, Entry
from moe_rco.errors import ModelError
from moe_rco.types import BF16, Assignment, Option

QUANT_METHOD = "compressed-tensors"
_COUNTS = ("num_experts", "num_local_experts")


@dataclass(frozen=True)
class Renumbering:
    """`experts`: name on disk of a kept expert -> its name as written. `routers`: name of a router's weight ->
    the rows it keeps, ascending. Both are empty for the mixed layout.
    """

    experts: dict[str, str]
    routers: dict[str, tuple[int, ...]]


def renumbering(assignment: Assignment, adapter: Adapter, config: dict[str, Any]) -> Renumbering:
    """The new names and rows of an assignment's table."""
    if assignment.table.layout != "stock":
        return Renumbering({}, {})
    experts, routers = {}, {}
    for layer in assignment.table.layers:
        kept = tuple(assignment.kept(layer))
        routers[adapter.router_name(layer)] = kept
        for new, old in enumerate(kept):
            experts[adapter.expert(config, layer, old).name] = adapter.expert(config, layer, new).name
    return Renumbering(experts, routers)


def check_routers(checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Raise ModelError where a router has tensors besides its weight, which we would not know how to cut."""
    for layer in adapter.moe_layers(checkpoint.config):
        weight = adapter.router_name(layer)
        prefix = weight.removesuffix("weight")
        for name, tensor in checkpoint.tensors.items():
            if name.startswith(prefix) and name != weight:
                raise ModelError(
                    f"{tensor.file} holds router tensor {name}, which layout stock cannot cut to fewer experts; "
                    "use layout: mixed"
                )


def rows(tensor: TensorInfo, kept: Sequence[int]) -> Entry:
    """An entry of some rows of a tensor in a file, copied as bytes."""
    size = tensor.nbytes // tensor.shape[0]

    def chunks() -> Iterator[bytes]:
        with tensor.file.open("rb") as file:
            for row in kept:
                file.seek(tensor.offset + row * size)
                left = size
                while left:
                    chunk = file.read(min(left, CHUNK_BYTES))
                    if not chunk:
                        raise OSError(f"{tensor.file} became shorter while tensor {tensor.name} was read")
                    left -= len(chunk)
                    yield chunk

    return Entry(tensor.name, tensor.dtype, (len(kept), *tensor.shape[1:]), chunks)


def precisions(assignment: Assignment) -> dict[int, Option]:
    """Layer -> the one option of the experts it keeps."""
    return {
        layer: next(option for option in assignment.layer_options(layer) if not option.is_prune)
        for layer in assignment.table.layers
    }


def transformers_reads(layers: Iterable[Option]) -> bool:
    """Whether transformers reads layers at these options: up to 5.19 only at one bit width, or all at bf16."""
    return len({option.bits for option in layers}) == 1


def stock_config(assignment: Assignment, adapter: Adapter, config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the smaller model."""
    count = len(assignment.kept(assignment.table.layers[0]))
    result = {key: count if key in _COUNTS and value is not None else value for key, value in config.items()}
    quantization = quantization_config(precisions(assignment), adapter)
    return result if quantization is None else {**result, "quantization_config": quantization}


def quantization_config(layers: dict[int, Option], adapter: Adapter) -> dict[str, Any] | None:
    """The compressed-tensors entry for layers at these options; None where all are bf16.

    The widest option comes first: transformers reads all layers at the bits of the first group, and so meets
    tensors that are too small and refuses, where it would otherwise misread those that are too large.
    """
    options = sorted({option for option in layers.values() if option != BF16}, key=_order)
    if not options:
        return None
    # Imported late: it costs seconds.
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        QuantizationStrategy,
        QuantizationType,
    )

    packed = CompressionFormat.pack_quantized
    groups: dict[str, Any] = {}
    for number, option in enumerate(options):
        strategy = QuantizationStrategy.GROUP if option.group_size else QuantizationStrategy.CHANNEL
        weights = QuantizationArgs(
            num_bits=option.bits,
            type=QuantizationType.INT,
            symmetric=option.symmetric,
            strategy=strategy,
            group_size=option.group_size,
            observer=None,
        )
        targets = [_target([layer for layer, other in layers.items() if other == option], adapter)]
        groups[f"group_{number}"] = QuantizationScheme(targets=targets, weights=weights, format=packed)
    plain = [layer for layer, option in layers.items() if option == BF16]
    entry = QuantizationConfig(
        config_groups=groups,
        quant_method=QUANT_METHOD,
        format=packed.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head", *([_target(plain, adapter)] if plain else [])],
    )
    return entry.model_dump(mode="json", exclude_none=True)


def _order(option: Option) -> tuple[int, int]:
    return -option.bits, option.group_size or 0


def _target(layers: Sequence[int], adapter: Adapter) -> str:
    """compressed-tensors' pattern for all expert projections of some layers."""
    numbers = "|".join(map(str, sorted(layers)))
    projections = "|".join(adapter.projections)
    return rf"re:.*\.layers\.({numbers})\.{re.escape(adapter.block)}\.experts\.\d+\.({projections})$"
